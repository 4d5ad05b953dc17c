"""Policies of LeRobot (https://github.com/huggingface/lerobot, 0.4), steered. Importing this does not import LeRobot."""

from sb3_dsrl.policies.lerobot.policy import LeRobotPolicy

__all__ = ["LeRobotPolicy"]

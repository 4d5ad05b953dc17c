"""ManiSkill's envs on the CPU at up to twice their speed, with the same results bit for bit.

Every shortcut is a function whose docstring names the function of ManiSkill that it stands for. They are bound to the objects
of one env, never to ManiSkill's classes. A controller, robot or wrapper that none of them knows stays as it is. Several envs
in one process are evaluated together (``stack.py``).
"""

from sb3_dsrl.envs.fast.install import make_fast, wants_fast

__all__ = ["make_fast", "wants_fast"]

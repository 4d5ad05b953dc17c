"""Scripted experts that solve ManiSkill tasks in closed loop, and how episodes of theirs become a demo file."""

from sb3_dsrl.experts.expert import Expert
from sb3_dsrl.experts.lift_peg_upright import LiftPegUpright
from sb3_dsrl.experts.peg_insertion_side import PegInsertionSide
from sb3_dsrl.experts.pick_cube import PickCube
from sb3_dsrl.experts.push_cube import PushCube
from sb3_dsrl.experts.stack_cube import StackCube

EXPERTS: dict[str, type[Expert]] = {
    "LiftPegUpright-v1": LiftPegUpright,
    "PegInsertionSide-v1": PegInsertionSide,
    "PickCube-v1": PickCube,
    "PushCube-v1": PushCube,
    "StackCube-v1": StackCube,
}

"""Stage 0: a flow policy and its chunk critic from ManiSkill demos, state or images.

    python examples/train_flow.py --demo_path demos/PickCube-v1.h5 --exp_name pickcube_flow

``sb3-dsrl flow`` is the same: sb3_dsrl/cli/flow.py.
"""

from sb3_dsrl.cli.common import cli
from sb3_dsrl.cli.flow import Args, main

if __name__ == "__main__":
    cli(main, Args)

"""Make ManiSkill demonstrations on a CPU: no download, no GPU.

    python examples/make_demos.py --env-id StackCube-v1 --num-demos 500 --styles 3 --output demos/StackCube-v1.h5

``sb3-dsrl demos`` is the same: sb3_dsrl/cli/demos.py.
"""

from sb3_dsrl.cli.common import cli
from sb3_dsrl.cli.demos import Args, main

if __name__ == "__main__":
    cli(main, Args)

"""Stage 1, offline: a latent policy over the noise of a frozen flow.

    python examples/train_latent_offline.py --awsc_checkpoint runs/pickcube_flow/flow --exp_name pickcube_stage1

``sb3-dsrl stage1`` is the same: sb3_dsrl/cli/stage1.py.
"""

from sb3_dsrl.cli.common import cli
from sb3_dsrl.cli.stage1 import Args, main

if __name__ == "__main__":
    cli(main, Args)

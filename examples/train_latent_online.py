"""Stage 2, online: stock PPO improves the latent policy in the simulator.

    python examples/train_latent_online.py --awsc_checkpoint runs/pickcube_flow/flow \\
        --stage1_checkpoint runs/pickcube_stage1/stage1.pt --total_timesteps 200000 --exp_name pickcube_stage2

``sb3-dsrl stage2`` is the same: sb3_dsrl/cli/stage2.py.
"""

from sb3_dsrl.cli.common import cli
from sb3_dsrl.cli.stage2 import Args, main

if __name__ == "__main__":
    cli(main, Args)

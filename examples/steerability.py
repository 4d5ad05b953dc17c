"""Can latent steering help this flow? A report from a few hundred episodes, before any training.

    python examples/steerability.py --awsc_checkpoint runs/pickcube_flow/flow --demo_path demos/PickCube-v1.h5

``sb3-dsrl steerability`` is the same: sb3_dsrl/cli/steerability.py.
"""

from sb3_dsrl.cli.common import cli
from sb3_dsrl.cli.steerability import Args, main

if __name__ == "__main__":
    cli(main, Args)

"""Everything in one call: tries what costs nothing, learns within a budget of env steps, and keeps the best.

    python examples/improve.py --awsc_checkpoint runs/pickcube_flow/flow --budget 100000

``sb3-dsrl improve`` is the same: sb3_dsrl/cli/improve.py.
"""

from sb3_dsrl.cli.common import cli
from sb3_dsrl.cli.improve import Args, main

if __name__ == "__main__":
    cli(main, Args)

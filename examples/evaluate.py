"""Evaluates a flow, and what steers it, on the same episodes.

    python examples/evaluate.py --policy runs/pickcube_stage2/policy

``sb3-dsrl evaluate`` is the same: sb3_dsrl/cli/evaluate.py.
"""

from sb3_dsrl.cli.common import cli
from sb3_dsrl.cli.evaluate import Args, main

if __name__ == "__main__":
    cli(main, Args)

"""``sb3-dsrl <command> --flags``: which commands there are. A command's module is imported only when it is called."""

import argparse
import sys
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn

from sb3_dsrl.cli.common import cli

#: Each is a module of this folder.
COMMANDS = {
    "demos": "make demos with scripted experts, or with ManiSkill's motion planner",
    "flow": "stage 0: train a flow and its critic on demos",
    "steerability": "report whether steering can help a flow, before any training",
    "stage1": "train a latent policy offline",
    "stage2": "improve a latent policy in the simulator with PPO",
    "improve": "all of that within a budget of env steps, and the best of it",
    "evaluate": "evaluate a flow, and what steers it, on the same episodes",
}


def main() -> NoReturn:
    """Runs the command that the command line names; its flags are its own."""
    parser = argparse.ArgumentParser(prog="sb3-dsrl", description="Latent steering of frozen flow policies.")
    parser.add_argument("--version", action="version", version=version("sb3-dsrl"))
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=f"{about} (sb3-dsrl {name} --help)", add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"sb3-dsrl {command}", *sys.argv[2:]]  # what help and errors begin with
    try:
        module = import_module(f"sb3_dsrl.cli.{command}")
    except ModuleNotFoundError as error:
        if error.name != "sapien":
            raise
        parser.exit(2, f"sb3-dsrl {command}: ManiSkill is not installed: pip install 'sb3-dsrl[demos]'\n")
    cli(module.main, module.Args)

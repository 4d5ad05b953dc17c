"""Settings and fixtures shared by all test files."""

import multiprocessing
import os
import signal

import pytest
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import FlowPolicy
from tests.envs import tiny_flow
from tests.models import steered

th.set_num_threads(1)
os.environ.setdefault("SB3_DSRL_DECODE", "default")  # no test depends on timing, or writes to the user's cache folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell has started the tests in the background
# Workers start in a moment if what they need has been imported once.
multiprocessing.set_forkserver_preload(["pytest", "sb3_dsrl.envs.maniskill", "sb3_dsrl.envs.ray_workers", "tests.envs"])

#: Files that take longest come first, so that no process is left with one of them when the others have finished.
LONGEST = ("readme", "examples", "scripts", "docs", "compare", "workers", "images", "conformance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files; the order within a file stays."""
    rank = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def flow() -> FlowPolicy:
    """A frozen flow that fits the default ScriptedEnv: D = 3, A = 2, T = 4, H = 3, two frames. Do not change it."""
    return tiny_flow()


@pytest.fixture
def env(flow: FlowPolicy) -> VecEnv:
    """Two steered scripted envs."""
    return steered(flow)

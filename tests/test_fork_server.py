"""Where workers come from: servers that have imported what they need, beside the one of the user's."""

import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest

#: Prints of each process: the process it was forked from, which of some modules it holds, and the MB that are its own.
SCRIPT = """
import multiprocessing
import os
import sys
import gymnasium as gym
import psutil

NAMES = ("torch", "sb3_dsrl", "mani_skill", "sapien", "wave", "mailbox")

class Watched(gym.Wrapper):
    def found(self):
        modules = [name for name in NAMES if name in sys.modules]
        return os.getppid(), modules, psutil.Process().memory_full_info().uss / 2**20

def plain(n):
    from sb3_dsrl import ActionChunkWrapper, WorkerSettings
    from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
    make = lambda: ActionChunkWrapper(Watched(gym.make("Pendulum-v1")), 2)
    return WorkerVecEnv([make] * n, WorkerSettings(n))

def show(env):
    env.reset()
    found = env.env_method("found")
    env.close()
    return found

def theirs(pipe):
    pipe.send((os.getppid(), [name for name in NAMES if name in sys.modules]))

def ask():
    context = multiprocessing.get_context("forkserver")
    pipe, remote = context.Pipe()
    process = context.Process(target=theirs, args=(remote,))
    process.start()
    answer = pipe.recv()
    process.join()
    return answer

if __name__ == "__main__":
"""


def lines(tmp_path: Path, main: str) -> list[Any]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "".join(f"    {line}\n" for line in main.strip().splitlines()))
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, str(script)], cwd=root, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [literal_eval(line) for line in done.stdout.splitlines()]


def test_workers_share_what_their_server_imported(tmp_path: Path) -> None:
    """Also with workers that start later. They hold no simulator that they do not need, and nearly no pages of their own."""
    first, second = lines(tmp_path, "print(show(plain(2)))\nprint(show(plain(1)))")
    assert len(first) == 2 and len({server for server, _, _ in first + second}) == 1
    for _, modules, own in first + second:
        assert modules == ["torch", "sb3_dsrl"]
        assert own < 60, "torch alone takes 140 MB"


@pytest.mark.parametrize("started", [True, False])
def test_the_users_own_server_is_left_alone(started: bool, tmp_path: Path) -> None:
    """It keeps its process and its list, whether it starts before our workers or after them; they import that list, too."""
    main = """
multiprocessing.set_forkserver_preload(["wave", "mailbox"])
print(ask() if STARTED else None)
env = plain(1)
print(show(env))
print(ask())
print(ask())
"""
    before, ours, after, again = lines(tmp_path, main.replace("STARTED", str(started)))
    assert after[1] == ["wave", "mailbox"] and after == again and before in (None, after)
    server, modules, own = ours[0]
    assert server != after[0] and modules == ["torch", "sb3_dsrl", "wave", "mailbox"] and own < 60


def test_maniskill_is_imported_once_for_all_workers(tmp_path: Path) -> None:
    """Even where somebody's SubprocVecEnv has started the fork server of multiprocessing without it."""
    main = """
print(ask())
from sb3_dsrl import WorkerSettings, make_chunk_env
env = make_chunk_env("PushCube-v1", 2, workers=WorkerSettings(2))
env.reset()
workers = [process for child in psutil.Process().children() for process in child.children()]
print([(process.ppid(), process.memory_full_info().uss / 2**20) for process in workers])
env.close()
print(show(plain(1)))
"""
    theirs, ours, plain = lines(tmp_path, main)
    own = [uss for server, uss in ours if server != theirs[0]]
    assert len(own) == 2 and max(own) < 150, "with imports of their own they take 300 MB"
    assert plain[0][1] == ["torch", "sb3_dsrl"]

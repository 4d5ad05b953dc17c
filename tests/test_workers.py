"""Worker processes and Ray actors: what they share, what happens when one fails, and that none outlives the main process."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dsrl import ActionChunkWrapper, VecLatentSteering, collect_rollouts, evaluate, ppo_kwargs
from sb3_dsrl.envs.ray_workers import RayWorker
from sb3_dsrl.envs.worker_vec_env import MAX_FAILURES, WorkerVecEnv
from sb3_dsrl.envs.workers import ProcessWorker, WorkerError, WorkerSettings
from tests.envs import Numbered, numbered, tiny_flow

WORKERS = [ProcessWorker, RayWorker]


@pytest.mark.parametrize("worker", WORKERS)
def test_envs_are_spread_over_workers(worker: type) -> None:
    env = numbered(5, 2, worker)
    processes = env.env_method("process")
    assert len(set(processes)) == 2 and os.getpid() not in processes
    assert processes == [processes[0]] * 3 + [processes[3]] * 2
    assert env.get_attr("number") == [0, 1, 2, 3, 4] and env.get_attr("number", [4, 0]) == [4, 0]
    assert env.env_method("twice", 10, indices=[3, 1]) == [23, 21] and env.env_method("twice", x=1, indices=2) == [4]
    assert set(env.get_attr("threads")) == {1} and set(env.get_attr("cuda")) == {""}
    env.set_attr("gamma", 0.5, indices=[2])
    assert env.get_attr("gamma") == [0.99, 0.99, 0.5, 0.99, 0.99]
    assert env.env_is_wrapped(ActionChunkWrapper) == [True] * 5 and env.env_is_wrapped(Monitor) == [False] * 5
    assert env.has_attr("number") and not env.has_attr("no_such_thing")
    with pytest.raises(AttributeError):
        env.get_attr("no_such_thing")
    env.close()


def test_more_workers_than_envs_are_not_started() -> None:
    env = numbered(2, 8)
    assert len(set(env.env_method("process"))) == 2
    env.close()
    env = numbered(3, None)
    assert len(set(env.env_method("process"))) == min(3, len(os.sched_getaffinity(0)))
    env.close()


def test_seeds_and_options_reach_their_envs() -> None:
    ours, stock = numbered(3, 2), DummyVecEnv([lambda i=i: ActionChunkWrapper(Numbered(i), 3, 2) for i in range(3)])
    for env in (ours, stock):
        env.seed(11)
    np.testing.assert_array_equal(ours.reset(), stock.reset())
    assert not np.allclose(ours.reset(), ours.reset())  # a seed is used once
    ours.close()


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize(("fail", "sentence"), [("die", "died"), ("raise", "ValueError: env 1 is out of order")])
def test_failure_is_an_error_that_names_the_worker(worker: type, fail: str, sentence: str) -> None:
    env = numbered(4, 2, worker, fail=fail)
    env.reset()
    with pytest.raises(WorkerError, match=rf"(?s)Worker 0 \(envs 0 to 1\): .*{sentence}"):
        for _ in range(4):
            env.step(np.zeros((4, 3, 2), np.float32))
    env.close()


def test_death_names_the_signal_and_an_exception_its_traceback() -> None:
    for fail, sentence in (("die", r"process \d+ died \(signal SIGKILL\)"), ("raise", r"(?s)Traceback .*in step.*ValueError")):
        env = numbered(2, 1, fail=fail)
        env.reset()
        with pytest.raises(WorkerError, match=sentence):
            for _ in range(4):
                env.step(np.zeros((2, 3, 2), np.float32))
        env.close()


def test_env_that_cannot_be_made() -> None:
    def broken() -> gym.Env:
        raise OSError("no renderer")

    with pytest.raises(WorkerError, match=r"(?s)Worker 0 \(envs 0 to 0\): .*OSError: no renderer"):
        WorkerVecEnv([broken])


def test_unpicklable_answer_is_an_error_and_the_worker_lives_on() -> None:
    env = numbered(2, 1)
    with pytest.raises(WorkerError, match=r"(?s)Worker 0 .*[Pp]ickle"):
        env.get_attr("unpicklable")
    assert env.get_attr("number") == [0, 1]
    env.close()


@pytest.mark.parametrize(("worker", "fail"), [(ProcessWorker, "die"), (ProcessWorker, "raise"), (RayWorker, "die")])
def test_restart(worker: type, fail: str, tmp_path: Path) -> None:
    """The worker's two episodes are truncated where they were; the other two envs notice nothing."""
    env = numbered(4, 2, worker, "restart", fail=fail, marker=tmp_path / "failed")
    twin = numbered(4, 2)
    for venv in (env, twin):
        venv.seed(3)
        venv.reset()
    zeros = np.zeros((4, 3, 2), np.float32)
    failed_at = None
    for t in range(8):
        before = env._obs.copy()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            obs, rewards, dones, infos = env.step(zeros)
        expected_obs, expected_rewards, expected_dones, _ = twin.step(zeros)
        np.testing.assert_array_equal(obs[2:], expected_obs[2:])
        np.testing.assert_array_equal(rewards[2:], expected_rewards[2:])
        np.testing.assert_array_equal(dones[2:], expected_dones[2:])
        if caught:
            assert failed_at is None and "Worker 0 (envs 0 to 1)" in str(caught[0].message)
            failed_at = t
            for i in (0, 1):
                assert dones[i] and rewards[i] == 0 and infos[i]["TimeLimit.truncated"] and infos[i]["worker_failed"]
                assert infos[i]["chunk_length"] == 0 and "episode" not in infos[i]
                np.testing.assert_array_equal(infos[i]["terminal_observation"], before[i])
                assert not np.allclose(obs[i], before[i])
        elif failed_at is not None and t < failed_at + 4:
            assert dones.tolist() == [t == failed_at + 4] * 2 + expected_dones[2:].tolist()
    assert failed_at == 2 and env.n_restarts == 1
    env.close()
    twin.close()


def test_restarted_envs_play_other_episodes_than_before() -> None:
    """A worker that fails again and again must not play the same first episode again and again."""
    env = numbered(2, 2, on_failure="restart", fail="die")
    env.seed(0)
    first = [env.reset()[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(7):
            obs, _, _, infos = env.step(np.zeros((2, 3, 2), np.float32))
            if "worker_failed" in infos[1]:
                first.append(obs[1])
    assert len(first) == 3 and len(np.unique(np.stack(first)[:, 0, 0])) == 3
    env.close()


def test_worker_that_fails_at_once_is_an_error_even_with_restart(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    alive.touch()

    def make() -> gym.Env:
        if not alive.exists():
            raise OSError("the licence has expired")
        return ActionChunkWrapper(Numbered(), 3, 2)

    env = WorkerVecEnv([make], WorkerSettings(on_failure="restart"))
    env.reset()
    alive.unlink()
    os.kill(env.env_method("process")[0], signal.SIGKILL)
    with pytest.warns(UserWarning, match="started again"), pytest.raises(WorkerError, match="the licence has expired"):
        env.step(np.zeros((1, 3, 2), np.float32))
    env.close()


def test_a_worker_that_fails_at_every_step_is_an_error_even_with_restart() -> None:
    env = numbered(2, 2, on_failure="restart", fail="raise", fail_at=1)
    env.reset()
    with pytest.warns(UserWarning, match="started again"), pytest.raises(WorkerError, match="env 1 is out of order"):
        for _ in range(9):
            env.step(np.zeros((2, 3, 2), np.float32))
    assert env.n_restarts == MAX_FAILURES
    env.close()


def test_restarts_leave_nothing_behind(tmp_path: Path) -> None:
    """Neither pipes nor processes pile up."""
    env = numbered(2, 2, on_failure="restart")
    env.reset()
    main, before = psutil.Process(), []
    for _ in range(3):
        before.append((main.num_fds(), len(main.children(recursive=True))))
        os.kill(env.env_method("process")[1], signal.SIGKILL)
        with pytest.warns(UserWarning, match="started again"):
            env.step(np.zeros((2, 3, 2), np.float32))
    assert before[1:] == before[:1] * 2
    env.close()


def test_learning_and_evaluation_go_on(tmp_path: Path) -> None:
    """Lost episodes are not counted: they are played again."""
    flow = tiny_flow(pred_horizon=3, act_horizon=3)
    env = VecLatentSteering(numbered(4, 2, on_failure="restart", fail="die", marker=tmp_path / "1"), flow)
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=8, batch_size=16, n_epochs=1))
    with pytest.warns(UserWarning, match="started again"):
        model.learn(64)
    (tmp_path / "1").unlink()
    with pytest.warns(UserWarning, match="started again"):
        result = evaluate(model, env, 8)
    assert result.episodes == 8 and result.mean_length == 12
    (tmp_path / "1").unlink()
    with pytest.warns(UserWarning, match="started again"):
        rollouts = collect_rollouts("prior", env, 8)
    assert len(rollouts) == 8 * 4 and rollouts.episode.tolist() == np.repeat(range(8), 4).tolist()
    env.close()


@pytest.mark.parametrize("hide_gpu", [True, False])
def test_workers_see_the_gpu_only_if_their_envs_render_on_it(hide_gpu: bool) -> None:
    """Ray's see none in the first test of this file; with a share of a GPU they would wait here for ever."""

    def make() -> gym.Env:
        return ActionChunkWrapper(Numbered(), 3)

    env = WorkerVecEnv([make], hide_gpu=hide_gpu)
    assert env.get_attr("cuda") == ["" if hide_gpu else os.environ.get("CUDA_VISIBLE_DEVICES")]
    env.close()


MAIN = """
import sys
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_dsrl import FlowPolicy, LatentSteeringWrapper, SteerablePolicy, StateEncoder, WorkerSettings, evaluate, ppo_kwargs
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.policies.networks import VelocityNet
from sb3_dsrl.steering.vec_env import find_steering
from tests.envs import ScriptedEnv

class Env(ScriptedEnv):
    pass

class Mine(SteerablePolicy):
    def __init__(self):
        super().__init__(obs_shapes=(3,), obs_horizon=1, noise_shape=(4, 2), cond_dim=3, act_horizon=2)
        self.scale = th.nn.Parameter(th.ones(1))

    def encode(self, obs):
        return th.as_tensor(obs)[:, -1]

    def decode(self, cond, w, num_steps=None):
        return (self.scale * w).clamp(-1, 1)

class Net(VelocityNet):
    def __init__(self, action_dim, pred_horizon, cond_dim):
        super().__init__(action_dim, pred_horizon, cond_dim)
        self.scale = th.nn.Parameter(th.ones(1))

    def forward(self, x, t, d, cond):
        return self.scale * x

class Flow(FlowPolicy):
    pass

def run(flow, make_venv):
    make = lambda: LatentSteeringWrapper(gym.wrappers.TimeLimit(Env(), 12), flow)
    env = make_venv(make)
    steering = find_steering(env)
    assert type(steering.flow) is type(flow) and steering.flow.fingerprint() == flow.fingerprint()
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=4, n_epochs=1))
    model.learn(8)
    assert evaluate(model, env, 2).episodes == 2
    env.close()

"""

GUARDED = """
if __name__ == "__main__":
    for flow in (Mine(), Flow(StateEncoder(3, 1), Net(2, 4, 3), act_horizon=2)):
        run(flow, lambda make: make_vec_env(make, n_envs=2, vec_env_cls=SubprocVecEnv))
        run(flow, lambda make: WorkerVecEnv([make] * 2, WorkerSettings(2)))
    print("all done")
"""


def run_main(script: Path, text: str) -> subprocess.CompletedProcess[str]:
    script.write_text(text)
    root = Path(__file__).parent.parent
    command, env = [sys.executable, str(script)], os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240)


def test_policy_and_env_of_the_main_script(tmp_path: Path) -> None:
    """Their classes exist twice in a worker. PPO asks SB3's SubprocVecEnv for the steering, and got a bare EOFError."""
    result = run_main(tmp_path / "main.py", MAIN + GUARDED)
    assert result.returncode == 0, result.stderr
    assert "all done" in result.stdout


def test_script_that_starts_workers_when_it_is_imported(tmp_path: Path) -> None:
    """Ours say what is missing, in the worker and in the main process. (SB3's raises EOFError or ConnectionResetError.)"""
    unguarded = "run(Mine(), lambda make: WorkerVecEnv([make] * 2, WorkerSettings(2)))"
    result = run_main(tmp_path / "main.py", MAIN + unguarded)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(r"WorkerError: Worker 0 .* died \(exit code 1\) while it started; .* below `if __name__ == ", last), last
    assert result.stderr.count("WorkerError: A script that starts worker processes must do so below") >= 1


SCRIPT = """
import os, signal
import gymnasium as gym
import numpy as np
from sb3_dsrl import ActionChunkWrapper
from sb3_dsrl.envs.worker_vec_env import WorkerVecEnv
from sb3_dsrl.envs.workers import WorkerSettings
from tests.envs import ScriptedEnv

class Env(ScriptedEnv):
    def process(self):
        return os.getpid()

def make():
    return ActionChunkWrapper(gym.wrappers.TimeLimit(Env(episode_lengths=(100,)), 12), act_horizon=3)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell has started us in the background
    env = WorkerVecEnv([make] * 4, WorkerSettings(2))
    env.reset()
    print(*set(env.env_method("process")), flush=True)
    while True:
        env.step(np.zeros((4, 3, 2), np.float32))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_main_process(how: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the whole process group; SIGTERM and SIGKILL the main process alone."""
    script = tmp_path / "endless.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    main = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert main.stdout is not None and main.stderr is not None
    workers = [int(pid) for pid in main.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.5)
    if how == signal.SIGINT:
        os.killpg(main.pid, how)
    else:
        main.send_signal(how)
    try:
        errors = main.communicate(timeout=30)[1]
    finally:
        main.kill()  # or it would run beside all other tests
    assert main.returncode != 0
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in errors and "Worker" not in errors.replace("WorkerVecEnv", "")
    deadline = time.time() + 15
    while any(_runs(pid) for pid in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

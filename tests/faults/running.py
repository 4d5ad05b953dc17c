"""What happens while it runs: workers that fail, numbers that are none, disks that take nothing more."""

import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import (
    ActionChunkWrapper,
    FlowPolicy,
    LatentSteeringWrapper,
    VecLatentSteering,
    collect_rollouts,
    demo_transitions,
    load_demos,
    ppo_kwargs,
    pretrain_latent,
    train_critic,
    train_flow,
)
from sb3_dsrl.envs.workers import WorkerError
from sb3_dsrl.steering.batched import BatchedChunkEnv
from tests.demo_files import scripted_episode, write_demos
from tests.envs import BatchedScriptedEnv, Numbered, ScriptedEnv, numbered, scripted, tiny_flow, vec_steered
from tests.faults.case import Case

Play = Callable[[Path], Any]


def played(env: VecEnv, steps: int = 4) -> list[dict[str, Any]]:
    """Some macro-steps; the infos of the second env."""
    try:
        env.reset()
        return [env.step(np.zeros((env.num_envs, 3, 2), np.float32))[3][1] for _ in range(steps)]
    finally:
        env.close()


def failing(fail: str) -> Play:
    return lambda folder: played(numbered(2, 2, fail=fail, timeout=2.0 if fail == "hang" else 600.0))


def restarted(fail: str) -> Play:
    """The worker is started again, and the episode is truncated."""

    def play(folder: Path) -> None:
        env = numbered(2, 2, on_failure="restart", fail=fail, marker=folder / "once", timeout=2.0 if fail == "hang" else 600.0)
        infos = played(env)
        lost = [info for info in infos if info.get("worker_failed")]
        assert len(lost) == 1 and lost[0]["TimeLimit.truncated"] and "episode" not in lost[0] and env.n_restarts == 1

    return play


def at_reset(folder: Path) -> None:
    class Sick(ScriptedEnv):
        def _write_obs(self, action: np.ndarray) -> None:
            self._obs[:] = np.inf

    LatentSteeringWrapper(Sick(), tiny_flow()).reset()


def in_process(fail: str) -> Play:
    def play(folder: Path) -> None:
        env = ActionChunkWrapper(Numbered(1, fail), 3)
        env.reset()
        for _ in range(4):
            env.step(np.zeros((3, 2), np.float32))

    return play


def batched(fail: str) -> Play:
    def play(folder: Path) -> None:
        simulator = BatchedScriptedEnv([Numbered(0), Numbered(1, fail, fail_at=9)])  # the end of a chunk, which is seen
        env = VecLatentSteering(BatchedChunkEnv(simulator, 3, 2), tiny_flow())
        env.reset()
        for _ in range(4):
            env.step(np.zeros((2, 4, 2), np.float32))

    return play


def broken_flow(name: str) -> FlowPolicy:
    flow = tiny_flow()
    flow.get_parameter(name).data.flatten()[0] = th.nan
    return flow


def decoded(flow: Callable[[], FlowPolicy]) -> Play:
    def play(folder: Path) -> None:
        env = vec_steered(flow(), [scripted()])
        env.reset()
        env.step(np.zeros((1, 4, 2), np.float32))

    return play


def flow_with_bad_std() -> FlowPolicy:
    flow = tiny_flow()
    flow.encoder.std.zero_()
    return flow


def nan_noise(folder: Path) -> None:
    env = vec_steered(tiny_flow(), [scripted()])
    env.reset()
    env.step(np.full((1, 4, 2), np.nan, np.float32))


def diverged_policy(folder: Path) -> None:
    """What a NaN loss of PPO leaves behind: the next rollout ends."""
    env = vec_steered(tiny_flow(), [scripted()])
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=4))
    model.policy.action_net.bias.data[0] = th.nan
    model.learn(8)


def nan_loss_of_ppo(folder: Path) -> None:
    env = vec_steered(tiny_flow(), [scripted(time_limit=9)])
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=4, n_epochs=1))
    model.vf_coef = float("nan")
    model.learn(16)


def demos(folder: Path) -> Path:
    return write_demos(folder / "demos.h5", [scripted_episode(6)])


def trained(**kwargs: Any) -> Play:
    sizes = dict(pred_horizon=4, act_horizon=2, batch_size=4, n_iterations=3)
    return lambda folder: train_flow(demos(folder), **(sizes | kwargs))


def critic(folder: Path) -> None:
    flow = train_flow(demos(folder), pred_horizon=4, act_horizon=2, batch_size=4, n_iterations=1)
    transitions = demo_transitions(flow, load_demos(demos(folder)))
    transitions.reward[:] = th.inf
    train_critic(flow, transitions, n_iterations=2)


def stage_1(folder: Path) -> None:
    env = vec_steered(tiny_flow(), [scripted(time_limit=9)])
    rollouts = collect_rollouts("prior", env, 2)
    rollouts.reward[:] = th.nan
    pretrain_latent(tiny_flow(), rollouts=rollouts, n_iterations=2)


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """No file may grow beyond this: writing fails in the middle, as it does when a disk fills."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flow_to_full_disk(folder: Path) -> None:
    with full_disk():
        tiny_flow().save_pretrained(folder / "flow")


def policy_to_full_disk(folder: Path) -> None:
    env = vec_steered(tiny_flow(), [scripted()])
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=4))
    with full_disk():
        model.policy.save(folder / "stage1.pt")


def model_to_full_disk(folder: Path) -> None:
    env = vec_steered(tiny_flow(), [scripted()])
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=4))
    with full_disk(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(folder / "model.zip")


def into_a_file(folder: Path) -> None:
    (folder / "file").touch()
    tiny_flow().save_pretrained(folder / "file" / "flow")


NAN_OBS = r"Numbered: the observation after env step 7 of the episode is NaN or infinite"
NAN_REWARD = r"Numbered: the reward after env step 7 of the episode is NaN or infinite"
AGAIN = "It is started again; episodes that were lost are truncated"

CASES = [
    Case("worker raises", failing("raise"), r"(?s)Worker 1 \(envs 1 to 1\): .*ValueError: env 1 is out of order", WorkerError),
    Case("worker dies", failing("die"), r"Worker 1 \(envs 1 to 1\): process \d+ died \(signal SIGKILL\)", WorkerError),
    Case("worker hangs", failing("hang"), r"Worker 1 .*: process \d+ gave no answer for 2 s and was ended", WorkerError),
    Case("worker sees NaN", failing("nan obs"), rf"(?s)Worker 1 \(envs 1 to 1\): .*{NAN_OBS}", WorkerError),
    Case("worker gets NaN as reward", failing("nan reward"), rf"(?s)Worker 1 .*{NAN_REWARD}", WorkerError),
    Case("worker raises, restart", restarted("raise"), rf"(?s)Worker 1 .*out of order.*{AGAIN}", UserWarning),
    Case("worker dies, restart", restarted("die"), rf"(?s)Worker 1 .*SIGKILL.*{AGAIN}", UserWarning),
    Case("worker hangs, restart", restarted("hang"), rf"(?s)Worker 1 .*gave no answer for 2 s.*{AGAIN}", UserWarning),
    Case("worker sees NaN, restart", restarted("nan obs"), rf"(?s)Worker 1 .*{NAN_OBS}.*{AGAIN}", UserWarning),
    Case("worker gets NaN as reward, restart", restarted("nan reward"), rf"(?s)Worker 1 .*{NAN_REWARD}.*{AGAIN}", UserWarning),
    Case("NaN in an observation", in_process("nan obs"), NAN_OBS),
    Case("NaN as a reward", in_process("nan reward"), NAN_REWARD),
    Case("infinite first observation", at_reset, "Sick: the observation after env step 0 of the episode is NaN or infinite"),
    Case("batched: NaN in an observation", batched("nan obs"), r"The observations of envs \[1\] are NaN or infinite"),
    Case("batched: NaN as a reward", batched("nan reward"), r"The simulator: rewards of envs \[1\] are NaN or infinite"),
    Case(
        "flow that decodes to NaN",
        decoded(lambda: broken_flow("net.inlet.weight")),
        "The flow decodes finite noise to NaN or infinite values: its weights are damaged",
    ),
    Case(
        "flow that encodes to NaN",
        decoded(flow_with_bad_std),
        "The flow encodes finite observations as NaN or infinite values: its weights are damaged",
    ),
    Case("NaN as noise", nan_noise, "The noise to decode is NaN or infinite: the policy that chose it has diverged"),
    Case("policy that has diverged", diverged_policy, "Mean or std of the latent policy is NaN: its training has diverged"),
    Case("NaN as loss of PPO", nan_loss_of_ppo, "Mean or std of the latent policy is NaN: its training has diverged"),
    Case("stage 0: loss of the flow", trained(learning_rate=1e30), r"stage 0: flow: flow/\w+ is (nan|inf) at iteration \d"),
    Case(
        "stage 0: loss of the critic", critic, r"stage 0: critic: critic/td_loss is (nan|inf) at iteration 0; check the data"
    ),
    Case("stage 1: loss", stage_1, r"stage 1: stage1/loss is nan at iteration 0; check the data or lower the learning rate"),
    Case("disk full: flow", flow_to_full_disk, r"model.safetensors cannot be written: .*File too large", OSError),
    Case("disk full: latent policy", policy_to_full_disk, r"stage1.pt cannot be written: File too large", OSError),
    Case("disk full: model of SB3", model_to_full_disk, r"File too large", OSError),
    Case("folder that cannot be made", into_a_file, r"Not a directory: '.*file/flow'", OSError),
]

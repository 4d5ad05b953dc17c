"""Same seed, same bits: every stage twice, and every stage once more with an interruption."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_dsrl import (
    FlowPolicy,
    ResumeCallback,
    TrainingCheckpoint,
    collect_rollouts,
    demo_transitions,
    load_demos,
    ppo_kwargs,
    pretrain_latent,
    resume,
    train_critic,
    train_flow,
)
from sb3_dsrl.stage0.windows import ImageWindows
from sb3_dsrl.stage1 import executed, fit
from sb3_dsrl.utils.checkpoint import previous
from sb3_dsrl.utils.interrupt import Interrupted
from sb3_dsrl.utils.progress import ProgressLoop
from tests.envs import tiny_flow
from tests.stage0 import SMALL, random_demos
from tests.stage2 import KWARGS, TOTAL, Stage2, bits, run_slowly, steered
from tests.test_images import image_flow, write_image_demos


class Crash(Exception):
    """In the middle of something."""


# Stages 0 and 1


@pytest.fixture
def crash_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Lets a loop of this name fail at an iteration, once."""

    def crash(name: str, iteration: int) -> None:
        real = ProgressLoop.log

        def log(self: ProgressLoop, scalars: Any) -> None:
            if self.name == name and self._i == iteration:
                monkeypatch.setattr(ProgressLoop, "log", real)
                raise Crash
            real(self, scalars)

        monkeypatch.setattr(ProgressLoop, "log", log)

    return crash


def stage_0(checkpoint: TrainingCheckpoint | None = None, seed: int = 0) -> bytes:
    demos = random_demos()
    flow = train_flow(demos, pred_horizon=3, act_horizon=2, n_iterations=20, seed=seed, checkpoint=checkpoint, **SMALL)
    train_critic(flow, demo_transitions(flow, demos), n_iterations=20, batch_size=16, checkpoint=checkpoint)
    return bits(flow)


@pytest.fixture(scope="module")
def stage_0_bits() -> bytes:
    return stage_0()


def test_stage_0_twice(stage_0_bits: bytes) -> None:
    assert stage_0() == stage_0_bits
    assert stage_0(seed=1) != stage_0_bits


@pytest.mark.parametrize("loop", ["stage 0: flow", "stage 0: critic"])
def test_stage_0_resumed(tmp_path: Path, crash_in: Callable[[str, int], None], stage_0_bits: bytes, loop: str) -> None:
    crash_in(loop, 13)
    with pytest.raises(Crash):
        stage_0(TrainingCheckpoint(tmp_path, save_freq=6))
    assert stage_0(TrainingCheckpoint(tmp_path, resume=True)) == stage_0_bits


def test_demos_that_stream_go_on(tmp_path: Path) -> None:
    """Images of which only a part is held in memory: the same batches after a resume."""
    demos = load_demos(write_image_demos(tmp_path / "demos.h5"))
    flow = image_flow(demos)
    th.manual_seed(0)
    first = ImageWindows(flow, demos, memory=1.0, turnover=2)
    for _ in range(5):
        first.sample(4)
    state, generator = first.state_dict(), th.get_rng_state()
    expected = [first.sample(4)[1] for _ in range(6)]
    second = ImageWindows(flow, demos, memory=1.0, turnover=2)  # in another order
    second.load_state_dict(state)
    th.set_rng_state(generator)
    for chunk in expected:
        assert th.equal(second.sample(4)[1], chunk)


def stage_1(flow: FlowPolicy, weighting: str, checkpoint: TrainingCheckpoint | None = None, seed: int = 0) -> bytes:
    env = steered(flow)
    rollouts = collect_rollouts(flow, env, 6, seed=seed)
    policy = pretrain_latent(
        flow,
        rollouts=rollouts,
        weighting=weighting,  # type: ignore[arg-type]
        n_iterations=20,
        batch_size=16,
        policy_kwargs=dict(net_arch=[16]),
        seed=seed,
        checkpoint=checkpoint,
        **(dict(n_candidates=4, warm_start_value=True) if weighting == "candidates" else {}),
    )
    return bits(policy) + rollouts.w.numpy().tobytes() + rollouts.reward.numpy().tobytes()


@pytest.mark.parametrize(
    ("weighting", "loops"),
    [("executed", {"stage 1": 13}), ("candidates", {"stage 0: critic": 13, "stage 1": 13, "stage 1: value": 13})],
)
def test_stage_1(
    flow: FlowPolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash_in: Callable[[str, int], None],
    weighting: str,
    loops: dict[str, int],
) -> None:
    for module, name in ((fit, "train_critic"), (fit, "fit_value"), (executed, "executed_advantages")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), n_iterations=20))
    expected = stage_1(flow, weighting)
    checkpoint = TrainingCheckpoint(tmp_path, save_freq=6)
    for name, iteration in loops.items():  # every resume falls into the next loop's crash
        crash_in(name, iteration)
        with pytest.raises(Crash):
            stage_1(flow, weighting, checkpoint)
        checkpoint = TrainingCheckpoint(tmp_path, save_freq=6, resume=True)
    assert stage_1(flow, weighting, checkpoint) == expected
    assert stage_1(flow, weighting, seed=1) != expected


# Stage 2


class CrashAt(BaseCallback):
    """Whatever kills a process between two env steps."""

    def __init__(self, timesteps: int, number: signal.Signals | None = None) -> None:
        super().__init__()
        self.timesteps, self.signal = timesteps, number

    def _on_step(self) -> bool:
        if self.num_timesteps == self.timesteps:
            if self.signal is None:
                raise Crash
            signal.raise_signal(self.signal)
        return True


@pytest.fixture(scope="module")
def whole(flow: FlowPolicy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage2, PPO]:
    """A run that nothing interrupted."""
    stage = Stage2(tmp_path_factory.mktemp("whole"), flow)
    return stage, stage.run()


def test_stage_2_twice(whole: tuple[Stage2, PPO], flow: FlowPolicy, tmp_path: Path) -> None:
    stage, expected = whole
    again = Stage2(tmp_path, flow)
    model = again.run()
    assert bits(model.policy) == bits(expected.policy)
    for name in ("observations", "actions", "rewards", "advantages"):
        assert np.array_equal(getattr(model.rollout_buffer, name), getattr(expected.rollout_buffer, name))
    assert again.curve.history == stage.curve.history
    assert bits(Stage2(tmp_path, flow).run(seed=4).policy) != bits(expected.policy)


@pytest.mark.parametrize("timesteps", [40, 72, 128])
def test_stage_2_resumed(whole: tuple[Stage2, PPO], flow: FlowPolicy, tmp_path: Path, timesteps: int) -> None:
    """The same parameters, learning curve, records and env steps as without the crash."""
    stage, expected = whole
    crashed = Stage2(tmp_path, flow)
    with pytest.raises(Crash):
        crashed.run(crash=[CrashAt(timesteps)])
    time.sleep(1)  # TensorBoard orders files by the second
    resumed = Stage2(tmp_path, flow)
    model = resumed.run(goes_on=True)
    assert bits(model.policy) == bits(expected.policy)
    assert model.policy.prior_mix == pytest.approx(0.03 * 0.9**8)
    assert (model.num_timesteps, resumed.keeper.env_steps) == (expected.num_timesteps, stage.keeper.env_steps)
    assert resumed.curve.history == stage.curve.history and resumed.curve.env_steps == stage.curve.env_steps
    folders = list((tmp_path / "tb").iterdir())
    assert len(folders) == 1
    records = [EventAccumulator(str(f)) for f in (folders[0], stage.folder / "tb" / "run_1")]
    for record in records:
        record.Reload()
    for tag in ("train/loss", "train/learning_rate", "rollout/ep_len_mean", "eval/mean_return", "time/env_steps"):
        ours, theirs = ([(x.step, x.value) for x in record.Scalars(tag)] for record in records)
        assert ours == theirs, tag


def test_only_restarts_make_it_exact(whole: tuple[Stage2, PPO], flow: FlowPolicy, tmp_path: Path) -> None:
    """Without them a run that is never interrupted cuts no episode, and a resumed one gets others."""
    free = Stage2(tmp_path, flow)
    uncut = free.run(restart_episodes=False)
    with pytest.raises(Crash):
        free.run(crash=[CrashAt(72)], restart_episodes=False)
    model = free.run(goes_on=True, restart_episodes=False)
    assert model.num_timesteps == uncut.num_timesteps == TOTAL
    assert bits(uncut.policy) != bits(model.policy) != bits(whole[1].policy)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_stage_2_after_the_update(
    flow: FlowPolicy, tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stage = Stage2(tmp_path, flow)
    with pytest.raises(Interrupted) as stopped:
        stage.run(crash=[CrashAt(40, number)], save_freq=10**6)
    assert stopped.value.code == code
    assert f"{number.name}: stopped; a resume goes on from {stage.path}" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    steps = stage.keeper.env_steps
    assert PPO.load(stage.path).num_timesteps == 48
    assert stage.run(goes_on=True).num_timesteps == TOTAL
    assert stage.keeper.env_steps > steps


def test_a_signal_before_the_first_rollout_and_in_the_last_update(flow: FlowPolicy, tmp_path: Path) -> None:
    class Raise(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_training_start(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    stage = Stage2(tmp_path, flow)
    with pytest.raises(Interrupted):
        stage.run(crash=[Raise()])
    assert not stage.path.exists()
    with pytest.raises(Interrupted):
        stage.run(crash=[CrashAt(TOTAL, signal.SIGTERM)])


@pytest.mark.parametrize("norm_obs", [True, False])
def test_running_statistics_and_eval_callback_are_kept(flow: FlowPolicy, tmp_path: Path, norm_obs: bool) -> None:
    def run(goes_on: bool, crash: Sequence[BaseCallback] = ()) -> tuple[PPO, EvalCallback]:
        env = VecNormalize(steered(flow), norm_obs=norm_obs)
        eval_env = VecNormalize(steered(flow), training=False, norm_obs=norm_obs)
        evaluation = EvalCallback(eval_env, n_eval_episodes=2, eval_freq=8, log_path=str(tmp_path), verbose=0)
        keeper = ResumeCallback(tmp_path / "a.zip", 80, keep=[evaluation])
        model = resume(PPO, tmp_path / "a.zip", env) if goes_on else None
        model = model or PPO("LatentPolicy", env, **ppo_kwargs(steered(flow), **KWARGS))
        fresh = model.num_timesteps == 0
        model.learn(TOTAL - model.num_timesteps, [keeper, evaluation, *crash], reset_num_timesteps=fresh)
        return model, evaluation

    expected, curve = run(goes_on=False)
    with pytest.raises(Crash):
        run(goes_on=False, crash=[CrashAt(72)])
    model, resumed = run(goes_on=True)
    assert bits(model.policy) == bits(expected.policy)
    assert len(curve.evaluations_timesteps) == 8
    assert resumed.evaluations_timesteps == curve.evaluations_timesteps


def test_the_readmes_snippet_leaves_a_finished_model(flow: FlowPolicy, tmp_path: Path) -> None:
    """Fault n: a run that is shorter than save_freq, or ends between two checkpoints, is kept to its end."""
    path, total = tmp_path / "resume.zip", 4 * 16
    for wrap in (lambda env: env, VecNormalize):
        states = []
        for _ in range(2):  # the second time nothing is left to do
            env = wrap(steered(flow))
            model = resume(PPO, path, env) or PPO("LatentPolicy", env, **ppo_kwargs(env, **KWARGS))
            callback = ResumeCallback(path, save_freq=2_000)
            model.learn(total - model.num_timesteps, callback, reset_num_timesteps=model.num_timesteps == 0)
            rms = env.obs_rms.mean.tobytes() if isinstance(env, VecNormalize) else b""
            states.append((model.num_timesteps, callback.env_steps, bits(model.policy) + rms, path.read_bytes()))
        assert states[0] == states[1] and states[0][0] == total
        assert bits(PPO.load(path).policy) == bits(model.policy)
        assert not previous(path).exists()
        path.unlink()


def test_a_finished_run_keeps_its_callbacks_last_state(whole: tuple[Stage2, PPO], flow: FlowPolicy) -> None:
    stage, expected = whole
    again = Stage2(stage.folder, flow)
    model = again.run(goes_on=True)
    assert bits(model.policy) == bits(expected.policy) and model.num_timesteps == TOTAL
    assert again.curve.history == stage.curve.history and again.keeper.env_steps == stage.keeper.env_steps


def test_wrong_use(flow: FlowPolicy, tmp_path: Path) -> None:
    stage = Stage2(tmp_path, flow)
    env = steered(flow)
    assert resume(PPO, stage.path, env) is None
    with pytest.raises(Crash):
        stage.run(crash=[CrashAt(72)])
    model = resume(PPO, stage.path, env)
    assert model is not None
    with pytest.raises(ValueError, match=r"at 64 macro-steps, but learn starts at 0: call learn\(total_timesteps"):
        model.learn(TOTAL, ResumeCallback(stage.path, keep=[stage.curve]))
    model = resume(PPO, stage.path, env)
    assert model is not None
    with pytest.raises(ValueError, match="has the state of 1 callbacks, but keep has 0"):
        model.learn(TOTAL, ResumeCallback(stage.path), reset_num_timesteps=False)
    with pytest.raises(ValueError, match="flow_hash"):
        resume(PPO, stage.path, steered(tiny_flow(seed=9)))
    plain = PPO("LatentPolicy", env, **ppo_kwargs(env, **KWARGS))
    plain.save(tmp_path / "plain.zip")
    with pytest.raises(ValueError, match=r"is a model, but not a checkpoint of ResumeCallback: load it with PPO\.load"):
        resume(PPO, tmp_path / "plain.zip", env)
    with pytest.raises(ValueError, match="The state of CrashAt is unknown"):
        ResumeCallback(stage.path, keep=[CrashAt(0)])
    with pytest.raises(ValueError, match="save_freq must be at least 1 env step, found 0"):
        ResumeCallback(stage.path, 0)


def test_kill_9_and_resume(whole: tuple[Stage2, PPO], flow: FlowPolicy, tmp_path: Path) -> None:
    stage, expected = whole
    process = multiprocessing.get_context("forkserver").Process(target=run_slowly, args=(tmp_path,))
    process.start()
    while not previous(tmp_path / "resume.zip").exists():  # after the second checkpoint, in the middle of a rollout
        process.join(0.01)
        assert process.exitcode is None
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = Stage2(tmp_path, flow)
    model = resumed.run(goes_on=True)
    assert bits(model.policy) == bits(expected.policy)
    assert (model.num_timesteps, resumed.keeper.env_steps) == (expected.num_timesteps, stage.keeper.env_steps)

"""Envs of one process that are evaluated together: equal bit for bit to those that ManiSkill steps at its own speed."""

import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from mani_skill.envs.tasks.tabletop import PushCubeEnv
from mani_skill.utils.registration import REGISTERED_ENVS, register_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dsrl import ActionChunkWrapper, WorkerSettings, make_chunk_env
from sb3_dsrl.envs.fast import stack
from sb3_dsrl.envs.fast.views import NotStackable, stacked
from sb3_dsrl.envs.maniskill_wrappers import unbatched
from sb3_dsrl.steering.lockstep import LockstepVecEnv
from tests.identity import OBJECTS, WINS, differences, hold, state, touched

TASKS = list(OBJECTS)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks, after which the results are those of the envs by themselves."""
    monkeypatch.setattr(stack, "FIRST_CHECKS", 0)
    monkeypatch.setattr(stack, "CHECK_EVERY", sys.maxsize)


class Groups:
    """
    The same envs twice, one after the other at ManiSkill's own speed, and together; whatever is done is done to both, and
    must have the same results.
    """

    def __init__(self, env_id: str, n_envs: int, act_horizon: int = 4, fast: bool = True, **kwargs: Any) -> None:
        kwargs = dict(obs_mode="state", render_backend="none", reward_mode="normalized_dense") | kwargs

        def make(fast: bool) -> gym.Env:
            return ActionChunkWrapper(unbatched(gym.make(env_id, **kwargs), fast), act_horizon, obs_horizon=2)

        self.plain = DummyVecEnv([lambda: make(False)] * n_envs)
        self.together = LockstepVecEnv([lambda: make(fast)] * n_envs)
        self.n, self.env_id, self.touched = n_envs, env_id, np.zeros(n_envs, int)
        self.holding = np.zeros(n_envs, bool)

    @property
    def stack(self) -> Any:
        return self.together._together

    def bases(self, i: int) -> list[Any]:
        return [venv.envs[i].unwrapped for venv in (self.plain, self.together)]

    def reset(self, seed: int) -> None:
        for venv in (self.plain, self.together):
            venv.seed(seed)
        self._same([venv.reset() for venv in (self.plain, self.together)])

    def hold(self, i: int) -> None:
        for base in self.bases(i):
            hold(base, OBJECTS[self.env_id])
        self.holding[i] = True

    def win(self, i: int) -> None:
        for base in self.bases(i):
            WINS[self.env_id](base)

    def step(self, rng: np.random.Generator, scale: float = 0.4) -> tuple[Any, ...]:
        """A random chunk in each env; those that hold something close their fingers."""
        chunks = rng.normal(0, scale, (self.n, *self.together.action_space.shape)).clip(-1, 1).astype(np.float32)
        chunks[self.holding, :, :-1] *= 0.2
        chunks[self.holding, :, -1] = -1
        results = [venv.step(chunks) for venv in (self.plain, self.together)]
        for *_, infos in results:
            for info in infos:
                info.pop("episode", None)  # it holds seconds
        self.holding &= ~results[0][2]
        self._same(results)
        return results[1]

    def close(self) -> None:
        for venv in (self.plain, self.together):
            venv.close()

    def _same(self, results: list[Any]) -> None:
        found = list(differences(*results)) + list(differences(self.plain.reset_infos, self.together.reset_infos))
        for i in range(self.n):
            bases = self.bases(i)
            found += differences(*(state(base) for base in bases), f"env {i}")
            found += differences(*(base._elapsed_steps for base in bases), f"env {i}, elapsed")
            if self.env_id in OBJECTS:
                self.touched[i] += touched(bases[1], OBJECTS[self.env_id])
        assert not found, "; ".join(found)


def play(groups: Groups, rounds: int, chunks: int, seed: int) -> int:
    """
    :param groups: envs with a dense reward
    :param rounds: episodes of each env, to the time limit; every second one with the object between the fingers
    :param chunks: in an episode
    :param seed: of the first resets and of the actions
    :return: episodes with contact
    """
    rng, contact = np.random.default_rng(seed), 0
    groups.reset(seed)
    for episode in range(rounds):
        before = groups.touched.copy()
        for t in range(chunks):
            for i in range(groups.n):
                if (i + episode) % 2 and t < 6:  # again while the fingers close, since objects fall
                    groups.hold(i)
            assert groups.step(rng)[2].all() == (t == chunks - 1)
        contact += int((groups.touched > before).sum())
    assert groups.stack.works
    return contact


def play_sparse(groups: Groups, chunks: int, seed: int) -> int:
    """
    :param groups: envs with a sparse reward, of which now and then one is made to win, so that their episodes end in turn
    :param chunks: to play
    :param seed: of the first resets and of the actions
    :return: terminations that cut a chunk
    """
    rng, cut = np.random.default_rng(seed), 0
    groups.reset(seed)
    for t in range(chunks):
        i = t % (groups.n + 1)
        if i < groups.n:
            groups.win(i)
        dones, infos = groups.step(rng, scale=0.02)[2:]
        cut += sum(done and info["chunk_length"] < 4 for done, info in zip(dones, infos, strict=True))
        groups.hold(int(rng.integers(groups.n)))
    assert groups.stack.works
    return cut


@pytest.mark.parametrize(("env_id", "n_envs"), [*zip(TASKS, (2, 3, 4, 2, 2), strict=True)])
def test_dense_chunks_are_equal(env_id: str, n_envs: int) -> None:
    """Every macro-step, with and without contact: observations, rewards, flags, infos, simulators, controllers."""
    groups = Groups(env_id, n_envs, control_mode="pd_ee_delta_pose", max_episode_steps=12)
    assert play(groups, rounds=2, chunks=3, seed=0) >= n_envs
    groups.close()


def test_sparse_chunks_are_equal() -> None:
    """Envs end within a chunk, and one after the other."""
    groups = Groups("StackCube-v1", 3, control_mode="pd_joint_delta_pos", reward_mode="sparse")
    assert play_sparse(groups, chunks=6, seed=1) >= 2
    groups.close()


def test_more_envs_than_a_stack_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "MOST", 2)
    groups = Groups("PushCube-v1", 4, reward_mode="sparse")
    assert [len(own.envs) for own in groups.stack.stacks.values()] == [2, 2]
    assert play_sparse(groups, chunks=6, seed=2) >= 2
    groups.close()


def test_what_happens_between_chunks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody asks for an observation, one env alone is reset, with its scene built anew, and a goal is moved."""
    monkeypatch.setattr(stack, "FIRST_CHECKS", 1)  # of a step whose observation is not seen
    groups, rng = Groups("PickCube-v1", 2), np.random.default_rng(0)
    groups.reset(3)
    groups.step(rng)
    for i in range(2):
        assert not list(differences(*(base.get_obs() for base in groups.bases(i))))
    for venv in (groups.plain, groups.together):
        venv.env_method("reset", seed=5, options={"reconfigure": True}, indices=[1])
    groups.step(rng)
    groups.win(0)
    groups.step(rng)
    assert groups.stack.works
    groups.close()


def differently(self: Any, obs: Any, action: Any, info: Any) -> th.Tensor:
    """A reward that a batch of envs computes differently."""
    return self.obj.pose.p[:, 0] + 1e-7 * (self.num_envs > 1)


def remembering(self: Any, obs: Any, action: Any, info: Any) -> th.Tensor:
    """A reward that keeps something in its env."""
    self.last = self.obj.pose.p[:, 0]
    return self.last


@pytest.mark.parametrize(("reward", "reason"), [(differently, "another reward"), (remembering, "PushCubeEnv.last is set")])
def test_what_cannot_be_stacked_is_not(reward: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The envs go on by themselves, with equal results from the first step on, and one warning says so."""
    monkeypatch.setattr(PushCubeEnv, "compute_dense_reward", reward)
    if reward is differently:  # which only the check finds
        monkeypatch.setattr(stack, "FIRST_CHECKS", 1)
    groups, rng = Groups("PushCube-v1", 2, max_episode_steps=8, reward_mode="dense"), np.random.default_rng(0)
    groups.reset(0)
    with pytest.warns(
        UserWarning, match="PushCube-v1: the envs of this process are evaluated one by one .*" + reason
    ) as caught:
        for _ in range(4):
            groups.step(rng)
    assert len(caught) == 1 and not groups.stack.works
    groups.close()


def test_checks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "CHECK_EVERY", 12)
    groups, rng = Groups("PushCube-v1", 2, reward_mode="dense"), np.random.default_rng(0)
    groups.reset(0)
    groups.step(rng)
    monkeypatch.setattr(PushCubeEnv, "compute_normalized_dense_reward", differently)  # not the reward mode
    groups.step(rng)
    assert groups.stack.works
    for base in (base for i in range(2) for base in groups.bases(i)):
        base._reward_mode = "normalized_dense"
    with pytest.warns(UserWarning, match="has another reward"), pytest.raises(AssertionError):
        groups.step(rng)  # the check comes with the last step of this chunk
    assert not groups.stack.works
    groups.close()


def test_a_failed_step_leaves_nothing_behind() -> None:
    groups, rng = Groups("PushCube-v1", 2), np.random.default_rng(0)
    groups.reset(0)
    chunks = np.zeros((2, 4, 8), np.float32)
    chunks[1, 2] = np.nan
    for venv in (groups.plain, groups.together):
        with pytest.raises(ValueError, match="NaN"):
            venv.step(chunks)
    groups.reset(1)
    groups.step(rng)
    assert groups.stack.works
    groups.close()


@register_env("OwnPushCube-v1", max_episode_steps=50)
class OwnPushCube(PushCubeEnv):
    """Somebody's task."""


class Passing(gym.Wrapper):
    """Somebody's wrapper, which does something at each step."""

    def step(self, action: Any) -> tuple[Any, ...]:
        return self.env.step(action)


def test_only_what_is_known_is_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(env_id: str = "PushCube-v1", wrap: Any = lambda env: env, n_envs: int = 2, fast: bool | None = None) -> bool:
        def make() -> gym.Env:
            return ActionChunkWrapper(unbatched(wrap(gym.make(env_id, render_backend="none", obs_mode="state")), fast), 2)

        venv = LockstepVecEnv([make] * n_envs)
        venv.close()
        return venv._together is not None

    assert found()
    assert not found("OwnPushCube-v1") and not found(wrap=Passing) and not found(n_envs=1) and not found(fast=False)
    monkeypatch.setenv("SB3_DSRL_FAST", "0")
    assert not found()


def test_workers_stack_their_envs() -> None:
    kwargs: dict[str, Any] = dict(act_horizon=4, control_mode="pd_joint_delta_pos", workers=WorkerSettings(1))
    venvs = [make_chunk_env("PushCube-v1", 2, fast=fast, **kwargs) for fast in (False, True)]
    rng, results = np.random.default_rng(0), []
    chunks = rng.uniform(-1, 1, (3, 2, 4, 8)).astype(np.float32)
    for venv in venvs:
        venv.seed(0)
        results.append([venv.reset()] + [venv.step(chunk) for chunk in chunks])
    assert not list(differences(*results))
    for venv in venvs:
        venv.close()


def test_stacked_values() -> None:
    moment = [0]
    assert stacked([th.zeros(1, 2), th.ones(1, 2)], moment).tolist() == [[0, 0], [1, 1]]
    assert stacked([0.5, 0.5], moment) == 0.5 and stacked([{"a": th.zeros(1)}] * 3, moment)["a"].shape == (3,)
    for values in ([0.5, 0.25], [th.zeros(3), th.ones(3)], [[1], [1]], [1, 1.0], [{"a": 1}, {"b": 1}]):
        with pytest.raises(NotStackable):
            stacked(values, moment)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("n_envs", [2, 3, 4])
@pytest.mark.parametrize("control_mode", ["pd_joint_delta_pos", "pd_ee_delta_pose"])
@pytest.mark.parametrize("env_id", TASKS)
def test_whole_episodes_are_equal(env_id: str, control_mode: str, n_envs: int) -> None:
    """
    Ten episodes of each env, half of them with contact, to the time limit with a dense reward; and with a sparse one chunks
    in which envs end in turn.
    """
    limit = gym.spec(env_id).max_episode_steps
    assert limit is not None
    groups = Groups(env_id, n_envs, control_mode=control_mode)
    assert play(groups, rounds=10, chunks=-(-limit // 4), seed=n_envs) >= 5 * n_envs
    groups.close()
    groups = Groups(env_id, n_envs, control_mode=control_mode, reward_mode="sparse")
    assert play_sparse(groups, chunks=60, seed=n_envs) >= 20
    groups.close()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("env_id", sorted(REGISTERED_ENVS))
def test_every_task_can_be_stacked_or_says_so(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would come of the tasks that are not in ``STACKED``: the reason of a skip is why a task is none for it."""
    monkeypatch.setattr(stack, "STACKED", (REGISTERED_ENVS[env_id].cls,))
    try:
        groups = Groups(env_id, 3, act_horizon=8, max_episode_steps=40, reward_mode=None)
    except (Exception, SystemExit) as error:
        pytest.skip(f"cannot be built here: {type(error).__name__}: {error}")
    if groups.stack is None:
        pytest.skip("does something else at a step")
    rng = np.random.default_rng(0)
    groups.reset(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(10):
            groups.step(rng)
    groups.close()
    reasons = [own.reason for own in groups.stack.stacks.values() if not own.works]
    if reasons:
        pytest.skip(f"falls back: {reasons[0]}")

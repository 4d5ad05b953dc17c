"""What the replay of LatentSAC holds, against loops written by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit

from sb3_dsrl import FlowPolicy, collect_rollouts, demo_transitions
from sb3_dsrl.stage0.features import FeatureTransitions
from sb3_dsrl.stage2.chunk_replay import ChunkReplayBuffer, ChunkSamples
from tests.envs import FORMS, ScriptedEnv, gym_steered, tiny_flow, vec_steered
from tests.models import features, steered
from tests.stage0 import make_demos
from tests.test_latent_sac import small

GAMMA, H, LIMIT = 0.9, 3, 10
LENGTHS = (5, 9, 100)  # in env steps: two terminations inside a chunk, one time limit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [False, True])
def test_replay_against_a_loop(form: str, cut: bool, flow: FlowPolicy) -> None:
    """Rewards, discounts, chunks and observations of every macro-step, each env step played again by hand."""
    make = gym_steered if form == "gym form" else vec_steered
    envs = [TimeLimit(ScriptedEnv(episode_lengths=LENGTHS), LIMIT) for _ in range(2)]
    model = small(make(flow, envs, gamma=GAMMA, cut_at_time_limit=cut), learning_starts=10**6).learn(2 * 30)
    buffer: Any = model.replay_buffer
    assert buffer.pos == 30
    seen: list[tuple[bool, float]] = []
    for e in range(2):
        env, t = ScriptedEnv(episode_lengths=LENGTHS), 0
        frames = [env.reset()[0].copy()] * 2
        for row in range(30):
            np.testing.assert_allclose(buffer.observations[row, e], flow.encode(np.stack(frames)[None])[0], atol=1e-6)
            chunk = buffer.actions[row, e, 8:14].reshape(H, 2)
            reward, discount, ended, limit = 0.0, 1.0, False, False
            for action in chunk:
                obs, r, ended, _, _ = env.step(action)
                reward, discount, t = reward + discount * r, discount * GAMMA, t + 1
                frames = [frames[1], obs.copy()]
                limit |= t == LIMIT
                if ended or (cut and limit):
                    break
            discount = 0.0 if ended else discount
            samples = rows(buffer, row, e)
            assert samples.rewards.item() == pytest.approx(reward, abs=1e-5)
            assert samples.discounts(GAMMA**H).item() == pytest.approx(discount, abs=1e-6)
            np.testing.assert_allclose(samples.next_observations[0], flow.encode(np.stack(frames)[None])[0], atol=1e-6)
            np.testing.assert_array_equal(samples.chunks[0].reshape(H, 2), chunk)
            seen.append((limit, discount))
            if ended or limit:
                frames, t = [env.reset()[0].copy()] * 2, 0
    # bootstrapped macro-steps last H env steps, unless a time limit cuts them
    shortest = GAMMA if cut else GAMMA**H  # the limit of 10 falls on the first step of a chunk
    assert {round(d, 6) for limit, d in seen if d > 0} == {round(GAMMA**H, 6), round(shortest, 6)}
    assert any(d == 0 for _, d in seen) and any(limit and d > 0 for limit, d in seen)


def rows(buffer: ChunkReplayBuffer, row: int, env: int) -> ChunkSamples:
    """One transition, as ``sample`` gives it."""
    drawn, np.random.randint = np.random.randint, lambda low, high, size: np.full(size, env)  # type: ignore[assignment]
    try:
        return buffer._get_samples(np.array([row]))
    finally:
        np.random.randint = drawn


@pytest.mark.parametrize("backup_entropy", [True, False])
def test_td_targets(backup_entropy: bool, flow: FlowPolicy) -> None:
    """``r + gamma^k * (min Q - alpha log pi)`` with two critics that say 5 and 7 whatever they see."""
    model = small(steered(flow, gamma=GAMMA), "noise", backup_entropy=backup_entropy, ent_coef=0.5)
    for net, constant in zip(model.critic_target.q_networks, (7.0, 5.0), strict=True):
        last = net[-1]
        th.nn.init.zeros_(last.weight)
        th.nn.init.constant_(last.bias, constant)
    dones, lengths = th.tensor([[0.0], [1.0], [0.0]]), th.tensor([[1.0], [2 / 3], [1 / 3]])
    rewards = th.tensor([[1.0], [2.0], [3.0]])
    samples = ChunkSamples(features(3), th.zeros(3, 8), features(3, 1), dones, rewards, lengths, th.zeros(3, 6))
    th.manual_seed(0)
    found = model.td_targets(samples)
    th.manual_seed(0)
    log_prob = model.actor.action_log_prob(features(3, 1))[1][:, None].detach()
    value = 5.0 - 0.5 * log_prob if backup_entropy else th.full((3, 1), 5.0)
    expected = rewards + th.tensor([[GAMMA**3], [0.0], [GAMMA]]) * value
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5)


def demos_of(flow: FlowPolicy, **kwargs: Any) -> Any:
    rng = np.random.default_rng(0)
    demos = make_demos(rng.uniform(-1, 1, (4, 7, 2)), rng.standard_normal((4, 8, 3)), rng.standard_normal((4, 7)))
    return replace(demos, control_mode=None, reward_mode=None, **kwargs)


@pytest.mark.parametrize("ends", [False, True])
def test_demos_are_half_of_each_batch(ends: bool, flow: FlowPolicy) -> None:
    """Every step of every demo begins a transition, with the env's discount and not the flow's."""
    demos = demos_of(flow)
    for episode in demos.episodes:
        episode.terminated[-1] = ends
    env = steered(flow, gamma=GAMMA)
    model = small(env, demos=demos, batch_size=9, learning_starts=2).learn(4)
    buffer = model._demo_buffer
    assert buffer is not None and buffer.size() == 28
    expected = demo_transitions(flow, demos, False, GAMMA)
    for row in range(28):
        samples = rows(buffer, row, 0)
        assert samples.rewards.item() == pytest.approx(expected.reward[row].item(), abs=1e-6)
        assert samples.discounts(GAMMA**H).item() == pytest.approx(expected.discount[row].item(), abs=1e-6)
        k = min(H, 7 - row % 7)
        assert samples.discounts(GAMMA**H).item() == pytest.approx(0 if ends and row % 7 + k == 7 else GAMMA**k, abs=1e-6)
        np.testing.assert_array_equal(samples.chunks[0], expected.chunk[row].flatten())
        np.testing.assert_array_equal(samples.observations[0], expected.cond[row])
        np.testing.assert_array_equal(samples.next_observations[0], expected.next_cond[row])
    batch = model._sample(9)
    known = {tuple(chunk) for chunk in expected.chunk.flatten(1).tolist()}
    assert [tuple(chunk) in known for chunk in batch.chunks.tolist()] == [False] * 5 + [True] * 4


def test_rollouts_of_any_policy_count(flow: FlowPolicy) -> None:
    env = steered(flow, gamma=GAMMA)
    transitions = collect_rollouts(flow, env, 4).transitions()
    model = small(env, demos=transitions).learn(12)
    buffer: Any = model._demo_buffer
    assert buffer.size() == len(transitions)
    discounts = [rows(buffer, row, 0).discounts(GAMMA**H).item() for row in range(len(transitions))]
    np.testing.assert_allclose(discounts, transitions.discount.numpy(), atol=1e-6)


def test_demos_that_do_not_fit(flow: FlowPolicy) -> None:
    env = steered(flow, gamma=GAMMA)
    whole = demo_transitions(flow, demos_of(flow), False, GAMMA)
    short = FeatureTransitions(whole.cond, whole.chunk[:, :2], whole.reward, whole.discount, whole.next_cond)
    for demos, error, sentence in (
        ("demos.h5", TypeError, r"demos must be Demos \(load_demos\) or FeatureTransitions .* found str"),
        (short, ValueError, r"demos have chunks of shape \(28, 2, 2\), but the steered env needs \(28, 3, 2\)"),
        (demo_transitions(flow, demos_of(flow), False), ValueError, r"demos have discounts that are no powers gamma\^k"),
        (make_demos(np.zeros((2, 4, 2)), np.zeros((2, 5, 7))), ValueError, "(?i)obs"),
        (replace(demos_of(flow), episodes=[replace(e, rewards=None) for e in demos_of(flow).episodes]), ValueError, "rewards"),
    ):
        with pytest.raises(error, match=sentence):
            small(env, demos=demos)
    with pytest.raises(ValueError, match=r"demos hold actions, not the noise .* use critic='action' or critic='distilled'"):
        small(env, "noise", demos=whole)
    with pytest.raises(ValueError, match="demos are known by the flow's features alone"):
        small(steered(flow, gamma=GAMMA, obs="both"), demos=whole)


def test_reward_modes_must_agree() -> None:
    flow = tiny_flow()
    env: Any = steered(flow)
    steering = env.steering
    steering.contract = steering.action_space.contract = replace(steering.contract, reward_mode="sparse")
    with pytest.raises(ValueError, match="The demos have reward_mode='dense', but the env has 'sparse'"):
        small(env, demos=replace(demos_of(flow), reward_mode="dense"))

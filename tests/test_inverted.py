"""Stage 1 from inverted demos: their macro-steps by hand, the bandit's best noise, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_dsrl import InvertedSettings, Rollouts, fit_inverted, pretrain_latent
from sb3_dsrl.stage0.demos import Demos, Episode
from sb3_dsrl.stage1.inverted import demo_macro_steps, inverted_noise
from sb3_dsrl.steering.contract import Contract
from sb3_dsrl.steering.steering import Steering
from tests.bandit import BEST, FAST, QUICK, bandit_demos, bandit_flow, bandit_rollouts, made_rollouts, mean_noise
from tests.demo_files import scripted_episode, write_demos
from tests.envs import tiny_flow
from tests.toys import linear_flow


def demos(*lengths: int, terminated: tuple[int, ...] = (), bound: float = 1.0) -> Demos:
    """The reward of step i of episode e is 10 e + i; two features, two actions."""
    rng = np.random.default_rng(0)
    episodes = []
    for e, length in enumerate(lengths):
        ends = np.arange(length) == (length - 1 if e in terminated else -1)
        obs, action = rng.standard_normal((length + 1, 2)), rng.uniform(-bound, bound, (length, 2))
        reward = 10 * e + np.arange(length)
        episodes.append(Episode(*(x.astype(np.float32) for x in (obs, action, reward)), ends, None))
    return Demos(Path("made.h5"), episodes, None, "state", None, None)


def steering(flow: Any = None, **settings: Any) -> Steering:
    flow = flow or linear_flow(horizon=3)
    return Steering(flow, Contract.of(flow, **(dict(gamma=0.5, reward_scale=2.0) | settings)))


def test_macro_steps_by_hand() -> None:
    """H = 3: of 5 steps a whole chunk and one of 2; the shorter demo goes on as it ended, one that terminated does not."""
    made = demos(5, 3, 4, terminated=(2,))
    found = demo_macro_steps(made, None, steering(ignore_terminations=False))
    assert found.episode.tolist() == [0, 0, 1, 2, 2]
    first, second, third = (episode.obs for episode in made.episodes)
    np.testing.assert_array_equal(found.cond, np.stack([first[0], first[3], second[0], third[0], third[3]]))
    np.testing.assert_array_equal(found.next_cond, np.stack([first[3], first[5], second[3], third[3], third[4]]))
    chunks = [episode.actions for episode in made.episodes]
    padded = np.stack([chunks[0][3], chunks[0][4], chunks[0][4]])
    np.testing.assert_array_equal(found.chunk[:3], np.stack([chunks[0][:3], padded, chunks[1]]))
    rewards = [0 + 1 / 2 + 2 / 4, 3 + 4 / 2, 10 + 11 / 2 + 12 / 4 + 12 / 8 + 12 / 16, 20 + 21 / 2 + 22 / 4, 23]
    assert found.reward.tolist() == pytest.approx([2 * reward for reward in rewards])
    assert found.discount.tolist() == pytest.approx([1 / 8, 1 / 4, 1 / 8, 1 / 8, 0.0])


def test_demos_go_on_as_long_as_rollouts_do() -> None:
    rollouts = made_rollouts(lengths=(3, 1), terminated=())  # 9 env steps of H = 3
    found = demo_macro_steps(demos(5), rollouts, steering(ignore_terminations=True))
    assert found.reward[1].item() == pytest.approx(2 * (3 + 4 / 2 + 4 * (1 / 4 + 1 / 8 + 1 / 16 + 1 / 32)))


def test_noises_of_demos_are_those_of_their_chunks() -> None:
    """The flow decodes noise to itself; a chunk that it cannot make has no weight."""
    made = demos(3, 3, 3, bound=0.9)
    noise = inverted_noise(made, None, steering(), InvertedSettings())
    th.testing.assert_close(noise.w[:, :, :], th.from_numpy(np.stack([e.actions for e in made.episodes])), atol=2e-3, rtol=0)
    assert (noise.weights > 0).all() and noise.weights.mean().item() == pytest.approx(1)
    narrow = steering(noise_bound=0.5)
    clipped = inverted_noise(made, None, narrow, InvertedSettings(tolerance=0.4))
    assert clipped.w.abs().max() == 0.5
    actions = made.actions()
    beyond = (np.stack([e.actions for e in made.episodes]).clip(-0.5, 0.5) - actions.reshape(3, 3, 2)) / actions.std(axis=0)
    reached = np.sqrt(np.square(beyond).mean(axis=(1, 2))) <= 0.4
    assert (clipped.weights > 0).tolist() == reached.tolist() and 0 < reached.sum() < 3
    assert clipped.weights.mean().item() == pytest.approx(1)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return bandit_rollouts()


def test_it_finds_the_bandits_best_noise(rollouts: Rollouts) -> None:
    """The demos' actions say nothing, their rewards do."""
    alone = pretrain_latent(bandit_flow(), bandit_demos(400), weighting="inverted", beta=0.1, **FAST)
    before = np.linalg.norm(BEST)
    assert np.linalg.norm(mean_noise(alone) - BEST) < 0.4 * before


def test_rollouts_and_demos_are_weighed_against_one_value(rollouts: Rollouts) -> None:
    """Demos with one noise are rewarded, rollouts with others are not."""
    made = [replace(e, actions=np.float32([[0.1, -0.2]]), rewards=np.float32([1.0])) for e in bandit_demos(400).episodes]
    nothing = replace(rollouts, reward=th.zeros(len(rollouts)))
    settings = InvertedSettings(n_iterations=200, learning_rate=1e-2, kl_coef=0.0)
    kwargs: dict[str, Any] = dict(policy_kwargs=FAST["policy_kwargs"], seed=0)
    policy = fit_inverted(bandit_flow(), replace(bandit_demos(1), episodes=made), nothing, settings, **kwargs)
    np.testing.assert_allclose(mean_noise(policy), [0.4, -0.8], atol=0.15)


def test_demos_without_differences_are_imitated() -> None:
    """All chunks are one, and so are all rewards: pi's mean goes to its noise."""
    made = bandit_demos(50)
    episodes = [replace(e, actions=np.float32([[0.1, -0.2]]), rewards=np.float32([1.0])) for e in made.episodes]
    policy = pretrain_latent(bandit_flow(), replace(made, episodes=episodes), weighting="inverted", kl_coef=0.0, **FAST)
    np.testing.assert_allclose(mean_noise(policy), [0.4, -0.8], atol=0.05)


def test_same_seed_same_policy() -> None:
    states = []
    for global_seed, seed in ((0, 3), (1, 3), (2, 4)):
        th.manual_seed(global_seed)
        policy = pretrain_latent(
            bandit_flow(), bandit_demos(10), weighting="inverted", **(QUICK | dict(seed=seed, n_iterations=3))
        )
        states.append(policy.state_dict())
    assert all(th.equal(value, states[1][key]) for key, value in states[0].items())
    assert not th.equal(states[0]["action_net.bias"], states[2]["action_net.bias"])


def test_files_of_demos(tmp_path: Path) -> None:
    path = write_demos(tmp_path / "demos.h5", [scripted_episode(6), scripted_episode(8)])
    flow = tiny_flow(env_id="PushCube-v1", control_mode="pd_joint_delta_pos")
    policy = pretrain_latent(flow, path, weighting="inverted", n_iterations=1, tolerance=100.0)
    assert policy.contract.flow_hash == flow.fingerprint()


def refused(sentence: str, made: Demos | None = None, rollouts: Rollouts | None = None, **settings: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        pretrain_latent(bandit_flow(), made or bandit_demos(5), rollouts, weighting="inverted", n_iterations=1, **settings)


def test_refusals(rollouts: Rollouts) -> None:
    refused("tolerance must be positive, found 0", tolerance=0)
    shared = replace(rollouts, contract=replace(rollouts.contract, steer_mode="shared"))
    refused(r"where all of it is steered \(steer_mode='full'\), found .*steer_mode='shared'", rollouts=shared)
    made = bandit_demos(5)
    silent = replace(made, episodes=[replace(episode, rewards=None) for episode in made.episodes])
    refused("bandit.h5: episode 0 has no 'rewards'", silent)
    dense = replace(rollouts, contract=replace(rollouts.contract, reward_mode="normalized_dense"))
    refused(
        "The rollouts have reward_mode='normalized_dense', but the demo file has 'sparse'",
        replace(made, reward_mode="sparse"),
        dense,
    )
    with pytest.raises(ValueError, match="weighting='inverted' weighs the noises that demos need, but no demos were given"):
        pretrain_latent(bandit_flow(), rollouts=rollouts, weighting="inverted")
    with pytest.raises(ValueError, match=r"the flow makes none of its 5 chunks to tolerance=0.1 std"):
        fit_inverted(linear_flow(a=-1.0, b=2.0, num_steps=1), bandit_demos(5))

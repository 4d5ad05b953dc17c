"""SAC on noise: what it finds on a bandit with a known answer, and what its parts compute."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dsrl import (
    ActionChunkWrapper,
    ActionCritic,
    FlowPolicy,
    LatentSAC,
    VecLatentSteering,
    evaluate,
    sac_kwargs,
)
from sb3_dsrl.stage2.latent_critics import Decoder
from sb3_dsrl.steering.vec_env import find_steering
from tests.bandit import BEST, bandit_demos, bandit_env, bandit_flow
from tests.envs import FORMS, scripted, tiny_flow
from tests.models import Record, features, steered, weights

CRITICS = ("noise", "action", "distilled")
#: Learns in milliseconds
SMALL: dict[str, Any] = dict(learning_starts=4, batch_size=8, gradient_steps=1, seed=0, device="cpu", buffer_size=1000)


def small(env: Any, critic: Any = "action", **kwargs: Any) -> LatentSAC:
    policy_kwargs = dict(net_arch=[16]) | kwargs.pop("policy_kwargs", {})
    return LatentSAC("LatentPolicy", env, **sac_kwargs(env, critic, policy_kwargs=policy_kwargs, **(SMALL | kwargs)))


def std(model: LatentSAC, obs: np.ndarray) -> np.ndarray:
    """Of the noise near 0, mean over states."""
    with th.no_grad():
        log_std = model.actor.get_action_dist_params(th.from_numpy(obs))[1]
    return model.action_space.high.reshape(-1) * log_std.exp().mean(dim=0).numpy()


# Known answers

ALPHA = 0.003
#: The policy that maximises ``E[-||w - BEST||^2 / 16] + ALPHA * entropy`` is a Gaussian around BEST with this std.
BEST_STD = math.sqrt(8 * ALPHA)


def bandit_model(critic: Any, n_envs: int = 8, **kwargs: Any) -> LatentSAC:
    policy_kwargs = dict(net_arch=[32, 32]) | kwargs.pop("policy_kwargs", {})
    settings = dict(ent_coef=ALPHA, learning_rate=3e-3, batch_size=128, learning_starts=200, gradient_steps=4)
    return small(bandit_env(bandit_flow(), n_envs), critic, policy_kwargs=policy_kwargs, **(settings | kwargs))


def found(model: LatentSAC) -> tuple[np.ndarray, np.ndarray]:
    obs = np.random.default_rng(0).standard_normal((500, 2)).astype(np.float32)
    return model.predict(obs, deterministic=True)[0].mean(axis=(0, 1)), std(model, obs)


@pytest.mark.parametrize(("critic", "tolerance"), [("noise", 0.15), ("action", 0.15), ("distilled", 0.35)])
def test_bandit(critic: str, tolerance: float) -> None:
    """The best noise, and around it the Gaussian that maximises reward and entropy."""
    model = bandit_model(critic, seed=1).learn(2400)
    mean, spread = found(model)
    np.testing.assert_allclose(mean, BEST, atol=tolerance)
    if critic != "distilled":
        np.testing.assert_allclose(spread, BEST_STD, rtol=0.25)


@pytest.mark.parametrize("critic", ["action", "distilled"])
def test_bandit_from_demos_alone(critic: str) -> None:
    """Two macro-steps at the wrong end of the box, from which nothing can be learned, and demos from everywhere."""

    def learned(**kwargs: Any) -> np.ndarray:
        start = dict(centre=[[-1.5, 1.5]], log_std_init=-3.0)
        settings = dict(learning_starts=0, gradient_steps=500, batch_size=64, policy_kwargs=start)
        return found(bandit_model(critic, n_envs=1, **settings, **kwargs).learn(2))[0]

    assert np.abs(learned(demos=bandit_demos(500)) - BEST).max() < 0.5
    assert np.abs(learned() - BEST).max() > 1.0


# Parts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("kwargs", [{}, dict(steer_mode="act_horizon"), dict(steer_mode="shared"), dict(residual_scale=0.1)])
def test_learns_and_leaves_the_flow_alone(form: str, critic: str, kwargs: dict[str, Any], flow: FlowPolicy) -> None:
    before = weights(flow)
    env = steered(flow, form=form, **kwargs)
    model = small(env, critic, ent_coef="auto")
    start = {name: x.clone() for name, x in model.policy.named_parameters()}
    model.learn(24)
    nets = ["actor", "critic", "critic_target"] + (["noise_critic"] if critic == "distilled" else [])
    for net in nets:
        names = [name for name in start if name.startswith(f"{net}.")]
        changed = [not th.equal(start[name], dict(model.policy.named_parameters())[name]) for name in names]
        assert changed and all(changed), net
    assert weights(flow) == before and all(p.grad is None for p in flow.parameters())
    assert evaluate(model, env, 2).episodes == 2


def test_image_features_and_dict_observations(flow: FlowPolicy) -> None:
    env = steered(flow, obs="both")
    for critic in CRITICS:
        small(env, critic).learn(12)
    small(steered(flow, obs="env"), "noise").learn(12)
    small(VecNormalize(steered(flow), gamma=0.99**3), "noise").learn(12)
    small(VecNormalize(steered(flow), gamma=0.99**3, norm_obs=False), "action").learn(12)


@pytest.mark.parametrize("kwargs", [{}, dict(steer_mode="shared"), dict(residual_scale=0.1)])
def test_decoder_is_what_the_env_plays(kwargs: dict[str, Any], flow: FlowPolicy) -> None:
    env = steered(flow, **kwargs)
    model = small(env)
    decoder = Decoder(find_steering(env), env.observation_space)
    obs = model._last_obs = env.reset()
    actions, stored = model._sample_action(0, None, 2)
    *_, infos = env.step(actions)
    chunks = np.stack([info["action_chunk"] for info in infos]).reshape(2, -1)
    np.testing.assert_allclose(decoder(th.from_numpy(obs), th.from_numpy(stored)).numpy(), chunks, atol=1e-5)


def test_decoder_draws_the_unsteered_tail_anew(flow: FlowPolicy) -> None:
    """From torch's generator, so that the env's own goes on as if nothing had been learned."""
    env = steered(flow, steer_mode="act_horizon")
    steering = find_steering(env)
    decoder, obs, action = Decoder(steering, env.observation_space), features(2), th.zeros(2, 6)
    before = steering.tail_state()
    th.manual_seed(0)
    first, second = decoder(obs, action), decoder(obs, action)
    assert (steering.tail_state() == before).all() and not th.equal(first, second)
    th.manual_seed(0)
    noise = th.cat([th.zeros(2, 3, 2), th.randn(2, 1, 2)], dim=1)
    expected = flow.executed(flow.decode(obs, noise)).flatten(1)
    np.testing.assert_allclose(first.numpy(), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("num_steps", [None, 1, 2])
def test_the_actors_gradient_goes_through_the_decode(num_steps: int | None, flow: FlowPolicy) -> None:
    """Its slope is that of a difference quotient of the critic under the decode."""
    env = steered(flow, noise_bound=2.0)
    critic = ActionCritic(num_steps)
    model = small(env, critic)
    decoder = Decoder(find_steering(env), env.observation_space)
    obs, action = features(3), th.full((3, 8), 0.1)

    def value(action: th.Tensor) -> th.Tensor:
        return critic.actor_values(model.policy, decoder, obs, action)[0].sum()

    slope = th.func.grad(value)(action)
    direction = th.randn(3, 8, generator=th.Generator().manual_seed(0))
    quotient = (value(action + 1e-2 * direction) - value(action - 1e-2 * direction)) / 2e-2
    assert (slope * direction).sum().item() == pytest.approx(quotient.item(), rel=0.05)
    steps = flow.num_steps if num_steps is None else num_steps
    chunk = flow.executed(flow.decode(obs, 2 * action.reshape(3, 4, 2), steps)).flatten(1)
    assert value(action).item() == pytest.approx(model.critic(obs, chunk)[0].sum().item(), rel=1e-5)


def test_distillation_imitates_the_critic_under_the_decode(flow: FlowPolicy) -> None:
    model = small(steered(flow), "distilled", learning_rate=3e-3)
    decoder = model._get_decoder()
    actions = th.zeros(64, 8)
    losses = []
    for _ in range(300):
        loss = model.critic_kind.distil(model.policy, decoder, features(64), actions)
        assert loss is not None and model.policy.noise_critic is not None
        model._step(model.policy.noise_critic.optimizer, loss)
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])
    assert all(p.grad is None for p in model.critic.parameters())


def test_a_new_policy_is_the_prior_or_what_was_asked_for(flow: FlowPolicy) -> None:
    env = steered(flow, residual_scale=0.1)
    policy_kwargs = dict(log_std_init=0.0)
    noise = small(env, policy_kwargs=policy_kwargs).predict(features(4000).numpy())[0]
    w, residual = env.action_space.split(noise)
    assert abs(w.mean()) < 0.02 and w.std() == pytest.approx(1.0, rel=0.1)  # the tanh takes a little
    assert abs(residual.mean()) < 0.01 and residual.std() == pytest.approx(0.1, rel=0.05)
    centre = np.arange(8).reshape(4, 2) / 10
    mean = small(env, policy_kwargs=dict(centre=centre)).predict(features(3).numpy(), deterministic=True)[0]
    np.testing.assert_allclose(mean, np.broadcast_to(np.concatenate([centre, np.zeros((3, 2))]), (3, 7, 2)), atol=1e-6)


def test_warm_up_is_the_prior(flow: FlowPolicy) -> None:
    env, record = steered(flow, n_envs=1), Record()
    small(env, learning_starts=10, seed=3).learn(14, callback=record)
    space = copy.deepcopy(env.action_space)
    space.seed(3)
    prior, played = np.stack([space.sample() for _ in range(14)]), np.stack(record.actions)[:, 0]
    np.testing.assert_allclose(played[:10], prior[:10], atol=1e-5)
    assert not np.allclose(played[10:], prior[10:]) and np.abs(played).max() <= 4.0


def test_gamma_is_the_envs(flow: FlowPolicy) -> None:
    env = steered(flow, gamma=0.9)
    assert LatentSAC("LatentPolicy", env, buffer_size=10).gamma == env.macro_gamma == pytest.approx(0.729)
    with pytest.warns(UserWarning, match=r"LatentSAC discounts with gamma=0\.99 per macro-step"):
        small(env, gamma=0.99).learn(2)


def test_updates_in_proportion(flow: FlowPolicy) -> None:
    """UTD by gradient_steps, the actor by policy_delay."""
    assert sac_kwargs(steered(flow, n_envs=3))["gradient_steps"] == 12
    model = small(steered(flow), gradient_steps=6, policy_delay=3, learning_starts=0)
    updates: list[int] = []
    original = model._update_actor
    model._update_actor = lambda obs: updates.append(model._n_updates) or original(obs)  # type: ignore[func-returns-value, method-assign]
    model.learn(4)  # two steps of two envs
    assert model._n_updates == 12 and updates == [0, 3, 6, 9]


def test_automatic_alpha_stays_below_its_bound(flow: FlowPolicy) -> None:
    """A target that cannot be reached drives it up."""
    kwargs = dict(ent_coef="auto_0.1", target_entropy=1e3, learning_rate=0.1, gradient_steps=30)
    assert small(steered(flow), **kwargs).learn(8).alpha() > 0.5
    assert small(steered(flow), max_ent_coef=0.3, **kwargs).learn(8).alpha().item() == pytest.approx(0.3)
    assert small(steered(flow), ent_coef=0.2).learn(8).alpha().item() == pytest.approx(0.2)


def test_a_decode_without_gradient_is_refused_but_can_be_distilled() -> None:
    class NoGrad(FlowPolicy):
        @th.no_grad()
        def decode(self, *args: Any, **kwargs: Any) -> th.Tensor:
            return super().decode(*args, **kwargs)

    flow = tiny_flow(policy_class=NoGrad)
    envs = [lambda: ActionChunkWrapper(scripted(10), flow.act_horizon, flow.obs_horizon)]
    with pytest.raises(ValueError, match=r"NoGrad\.decode gives no gradient .* which critic='action' needs"):
        small(VecLatentSteering(DummyVecEnv(envs), flow)).learn(6)
    small(VecLatentSteering(DummyVecEnv(envs), flow), "distilled").learn(6)

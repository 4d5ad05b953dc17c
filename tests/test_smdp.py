"""A stock PPO rollout on a steered env against plain loops over env steps: rewards, values, advantages and returns."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl import FlowPolicy
from tests.envs import FORMS, ScriptedEnv, scripted, tiny_flow

GAMMA = 0.9
N_STEPS = 12
# With H = 3 and 8, episodes end inside a chunk, at its end (24), and one step after a time limit of 10 in the same chunk (11).
SCRIPTS = [dict(episode_lengths=(5, 24, 2)), dict(episode_lengths=(1000,)), dict(episode_lengths=(11, 7, 1000))]


@dataclass
class Macro:
    """What the loop over env steps saw of one macro-step."""

    features: np.ndarray
    rewards: list[float] = field(default_factory=list)
    end: str = "goes on"
    after: np.ndarray | None = None


def simulate(
    env: ScriptedEnv,
    flow: FlowPolicy,
    noises: np.ndarray,
    time_limit: int | None,
    ignore_terminations: bool,
    residual_scale: float = 0.0,
) -> list[Macro]:
    """
    Plays the noises, which residuals may follow, on the raw env, one env step after the other. The time limit is counted here.
    """

    def features() -> np.ndarray:
        return flow.encode(np.stack(frames[-flow.obs_horizon :])[None]).numpy()[0]

    frames: list[np.ndarray] = []
    macros: list[Macro] = []
    playing, t = False, 0
    for w in noises:
        if not playing:
            frames = [env.reset()[0].copy()] * flow.obs_horizon
            playing, t = True, 0
        macro = Macro(features())
        w, residual = np.split(w, [flow.pred_horizon])
        chunk = flow.decode(th.tensor(macro.features[None]), th.tensor(w[None]).clamp(-4, 4))[0, : flow.act_horizon].numpy()
        if residual_scale:
            chunk = np.clip(chunk + residual_scale * np.clip(residual, -1, 1), -1, 1)
        for action in chunk:
            obs, reward, terminated, _, _ = env.step(action)
            frames.append(obs.copy())
            macro.rewards.append(reward)
            t += 1
            if time_limit is not None and t >= time_limit:
                macro.end = "time limit"
            if terminated and not ignore_terminations:
                macro.end = "terminated"
                break
        macro.after = features()
        playing = macro.end == "goes on"
        macros.append(macro)
    return macros


def reference(model: PPO, macros: list[Macro], reward_scale: float) -> dict[str, np.ndarray]:
    """Rewards, values, advantages and returns of one env, in plain loops."""

    def value(features: np.ndarray) -> float:
        return model.policy.predict_values(th.tensor(features[None])).item()

    n, h, lam = len(macros), model.env.get_attr("act_horizon")[0], model.gae_lambda
    rewards, values, advantages = np.zeros(n), np.zeros(n), np.zeros(n)
    for i, macro in enumerate(macros):
        values[i] = value(macro.features)
        for j, reward in enumerate(macro.rewards):
            rewards[i] += reward_scale * GAMMA**j * reward
        if macro.end == "time limit":  # SB3 puts the bootstrap into the reward
            assert len(macro.rewards) == h
            rewards[i] += GAMMA**h * value(macro.after)
    for i in range(n):
        weight = 1.0
        for macro, reward, v in zip(macros[i:], rewards[i:], values[i:], strict=True):
            next_value = value(macro.after) if macro.end == "goes on" else 0.0
            advantages[i] += weight * (reward + GAMMA**h * next_value - v)
            if macro.end != "goes on":
                break
            weight *= lam * GAMMA**h
    return dict(rewards=rewards, values=values, advantages=advantages, returns=advantages + values)


def discounted_env_steps(model: PPO, macros: list[Macro]) -> np.ndarray:
    """Return from each macro-step on, without the notion of one: gamma for each env step until the end, and what follows."""
    returns = np.zeros(len(macros))
    for i in range(len(macros)):
        discount = 1.0
        for macro in macros[i:]:
            for reward in macro.rewards:
                returns[i] += discount * reward
                discount *= GAMMA
            if macro.end != "goes on":
                break
        if macro.end != "terminated":
            returns[i] += discount * model.policy.predict_values(th.tensor(macro.after[None])).item()
    return returns


def rollout(env: VecEnv, flow: FlowPolicy, gae_lambda: float, n_steps: int = N_STEPS, **policy_kwargs: Any) -> PPO:
    """One rollout of a stock PPO, without the update after it."""
    model = PPO(
        "LatentPolicy",
        env,
        gamma=GAMMA**flow.act_horizon,
        gae_lambda=gae_lambda,
        n_steps=n_steps,
        batch_size=n_steps,
        policy_kwargs=policy_kwargs,
        seed=0,
    )
    th.nn.init.normal_(model.policy.value_net.bias)  # values that matter
    _, callback = model._setup_learn(n_steps * env.num_envs)
    callback.on_training_start({}, {})
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("h", [1, 3, 8])
@pytest.mark.parametrize("time_limit", [None, 24, 10])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.8])
def test_rollout_buffer_equals_hand_loop(form: str, h: int, time_limit: int | None, gae_lambda: float):
    flow = tiny_flow(pred_horizon=h + 1, act_horizon=h)
    env = FORMS[form](flow, [scripted(time_limit, **script) for script in SCRIPTS], gamma=GAMMA)
    n_steps = 30 if h == 1 else N_STEPS
    model = rollout(env, flow, gae_lambda, n_steps)
    buffer = model.rollout_buffer
    ends = set()
    for i, script in enumerate(SCRIPTS):
        noises = buffer.actions[:, i].reshape(n_steps, *flow.noise_shape)
        macros = simulate(ScriptedEnv(**script), flow, noises, time_limit, ignore_terminations=False)
        ends |= {macro.end for macro in macros}
        np.testing.assert_allclose(buffer.observations[:, i], np.stack([m.features for m in macros]), atol=1e-5)
        for name, expected in reference(model, macros, 1.0).items():
            np.testing.assert_allclose(getattr(buffer, name)[:, i], expected, atol=1e-4, err_msg=f"{name} of env {i}")
        if gae_lambda == 1.0:
            np.testing.assert_allclose(buffer.returns[:, i], discounted_env_steps(model, macros), atol=1e-4)
        starts = [True] + [macro.end != "goes on" for macro in macros[:-1]]
        np.testing.assert_array_equal(buffer.episode_starts[:, i], starts)
    assert ends == {"goes on", "terminated"} | (set() if time_limit is None else {"time limit"})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("ignore_terminations", "reward_scale"), [(True, 1.0), (False, 0.25), (True, 10.0)])
def test_ignore_terminations_and_reward_scale(form: str, ignore_terminations: bool, reward_scale: float):
    flow = tiny_flow()
    env = FORMS[form](
        flow,
        [scripted(10, **script) for script in SCRIPTS],
        gamma=GAMMA,
        ignore_terminations=ignore_terminations,
        reward_scale=reward_scale,
    )
    model = rollout(env, flow, gae_lambda=0.8)
    for i, script in enumerate(SCRIPTS):
        noises = model.rollout_buffer.actions[:, i].reshape(-1, *flow.noise_shape)
        macros = simulate(ScriptedEnv(**script), flow, noises, 10, ignore_terminations)
        if ignore_terminations:
            assert [macro.end for macro in macros] == 3 * (3 * ["goes on"] + ["time limit"])
        for name, expected in reference(model, macros, reward_scale).items():
            np.testing.assert_allclose(getattr(model.rollout_buffer, name)[:, i], expected, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("h", [1, 3])
def test_residuals_equal_hand_loop(form: str, h: int):
    """What the residual adds is executed and rewarded, chunks end as without it, and the buffer keeps it unclipped."""
    flow = tiny_flow(pred_horizon=h + 1, act_horizon=h)
    env = FORMS[form](flow, [scripted(10, **script) for script in SCRIPTS], gamma=GAMMA, residual_scale=0.5)
    model = rollout(env, flow, 0.8, residual_log_std_init=0.0)
    actions = model.rollout_buffer.actions.reshape(N_STEPS, 3, h + 1 + h, 2)
    assert np.abs(actions[..., h + 1 :, :]).max() > 1  # some residuals are clipped
    rewards = []
    for i, script in enumerate(SCRIPTS):
        for scale in (0.5, 0.0):
            macros = simulate(ScriptedEnv(**script), flow, actions[:, i], 10, ignore_terminations=False, residual_scale=scale)
            expected = reference(model, macros, 1.0)
            rewards.append(expected["rewards"])
            if scale:
                for name, values in expected.items():
                    np.testing.assert_allclose(getattr(model.rollout_buffer, name)[:, i], values, atol=1e-4, err_msg=name)
        assert not np.allclose(*rewards[-2:], atol=1e-2)  # it matters


def test_constant_reward_has_the_textbook_value():
    """As in SB3's test_gae: with reward 1 and no end, values that are right leave no advantage."""
    flow = tiny_flow()
    env = scripted(episode_lengths=(1000,))
    env.step = lambda action, step=env.step: (step(action)[0], 1.0, False, False, {})
    model = PPO(
        "LatentPolicy", FORMS["gym form"](flow, [env], gamma=GAMMA), gamma=GAMMA**3, n_steps=N_STEPS, batch_size=N_STEPS
    )
    for weights in (model.policy.value_net.weight, model.policy.value_net.bias):
        th.nn.init.constant_(weights, 0.0)
    th.nn.init.constant_(model.policy.value_net.bias, 1 / (1 - GAMMA))
    _, callback = model._setup_learn(N_STEPS)
    callback.on_training_start({}, {})
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    np.testing.assert_allclose(model.rollout_buffer.advantages, 0.0, atol=1e-4)
    np.testing.assert_allclose(model.rollout_buffer.returns, 1 / (1 - GAMMA), rtol=1e-5)

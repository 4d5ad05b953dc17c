"""What a macro-step does, what the two forms of the wrapper have in common, and what they refuse."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from sb3_dsrl import ActionChunkWrapper, LatentSteeringWrapper, VecLatentSteering
from sb3_dsrl.steering.vec_env import find_steering
from tests.envs import FORMS, ScriptedEnv, gym_steered, scripted, tiny_flow, vec_steered

GAMMA = 0.9


def chunk_of(value: float, h: int = 3, a: int = 2) -> np.ndarray:
    return np.linspace(value, value + 0.1, h * a, dtype=np.float32).reshape(h, a)


def noises(n: int, n_envs: int, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, n_envs, *shape)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- chunks


def test_chunk_executes_its_actions_in_order():
    raw = ScriptedEnv(episode_lengths=(100,))
    env = ActionChunkWrapper(raw, act_horizon=3, gamma=GAMMA)
    env.reset()
    _, reward, terminated, truncated, info = env.step(chunk_of(0.5))
    np.testing.assert_allclose(raw.actions, chunk_of(0.5), atol=1e-6)
    assert reward == pytest.approx(raw.rewards[0] + GAMMA * raw.rewards[1] + GAMMA**2 * raw.rewards[2])
    assert (terminated, truncated, info["chunk_length"], info["is_success"]) == (False, False, 3, False)
    assert "episode" not in info and "episode_return" not in info


@pytest.mark.parametrize(("length", "k"), [(4, 1), (5, 2), (6, 3)])
def test_termination_stops_the_chunk(length: int, k: int):
    raw = ScriptedEnv(episode_lengths=(length,))
    env = ActionChunkWrapper(raw, act_horizon=3, gamma=GAMMA)
    env.reset()
    env.step(chunk_of(0.0))
    obs, reward, terminated, truncated, info = env.step(chunk_of(0.5))
    assert len(raw.actions) == 3 + k and raw.steps_after_termination == 0
    assert reward == pytest.approx(sum(GAMMA**i * r for i, r in enumerate(raw.rewards[3:])))
    assert (terminated, truncated, info["chunk_length"], info["is_success"]) == (True, False, k, True)
    assert info["episode_length"] == length and info["episode_return"] == pytest.approx(sum(raw.rewards))
    macro_rewards = sum(GAMMA**i * r for i, r in enumerate(raw.rewards[:3])) + reward
    assert info["episode"]["l"] == 2 and info["episode"]["r"] == pytest.approx(macro_rewards, abs=1e-6)
    np.testing.assert_array_equal(obs[-1], raw._obs)  # of the terminating step


def test_observations_are_copies():
    """The env below overwrites its array: what was handed out must not change."""
    env = ActionChunkWrapper(ScriptedEnv(episode_lengths=(4,)), act_horizon=3, obs_horizon=2)
    first, _ = env.reset()
    kept = [first]
    for _ in range(2):
        obs, _, terminated, _, _ = env.step(chunk_of(0.3))
        kept.append(obs)
    assert terminated
    before = [obs.copy() for obs in kept]
    env.reset()
    env.step(chunk_of(-0.9))
    np.testing.assert_array_equal(kept, before)


@pytest.mark.parametrize("obs_horizon", [1, 2, 5])
def test_frames_are_stacked_over_env_steps(obs_horizon: int):
    """Oldest first; the first observation fills all frames; at H = 3 and 5 frames, a stack reaches across chunks."""
    raw = ScriptedEnv(episode_lengths=(100,))
    env = ActionChunkWrapper(raw, act_horizon=3, obs_horizon=obs_horizon)
    twin = ScriptedEnv(episode_lengths=(100,))
    for _ in range(2):  # a second episode does not remember the first
        frames = [twin.reset()[0].copy()] * obs_horizon
        np.testing.assert_array_equal(env.reset()[0], frames)
        for value in (0.1, -0.4):
            for action in chunk_of(value):
                frames.append(twin.step(action)[0].copy())
            np.testing.assert_allclose(env.step(chunk_of(value))[0], frames[-obs_horizon:], atol=1e-6)
    assert env.observation_space.shape == (obs_horizon, 3)


def test_actions_are_rescaled_to_the_env_and_clipped():
    raw = ScriptedEnv(action_low=(-2.0, 0.0), action_high=(4.0, 10.0), episode_lengths=(100,))
    env = ActionChunkWrapper(raw, act_horizon=4)
    env.reset()
    env.step(np.float32([[-1, -1], [0, 0], [1, 0.5], [-3, 7]]))
    np.testing.assert_allclose(raw.actions, [[-2, 0], [1, 5], [4, 7.5], [-2, 10]], rtol=1e-6)
    assert env.action_space == spaces.Box(-1, 1, (4, 2), np.float32)


@pytest.mark.parametrize("time_limit", [6, 7, 8, 9])
def test_time_limit_lets_the_chunk_run_to_its_end(time_limit: int):
    """The simulator runs on to a multiple of H; metrics stop at the limit. The env succeeds at steps 6 and 9 only."""
    raw = ScriptedEnv(episode_lengths=(100,), success_steps=(6, 9))
    env = ActionChunkWrapper(TimeLimit(raw, time_limit), act_horizon=3, gamma=GAMMA)
    env.reset()
    ended = False
    while not ended:
        obs, reward, terminated, ended, info = env.step(chunk_of(0.2))
        assert not terminated
    executed = 6 if time_limit == 6 else 9
    assert len(raw.actions) == executed and info["chunk_length"] == 3
    assert reward == pytest.approx(sum(GAMMA**i * r for i, r in enumerate(raw.rewards[-3:])))
    np.testing.assert_array_equal(obs[-1], raw._obs)
    assert info["episode_length"] == time_limit and info["episode"]["l"] == math.ceil(time_limit / 3)
    assert info["episode_return"] == pytest.approx(sum(raw.rewards[:time_limit]))
    assert info["success_once"] is True
    assert info["success_at_end"] == info["is_success"] == (time_limit in (6, 9))


def test_ignore_terminations_plays_on_until_the_time_limit():
    raw = ScriptedEnv(episode_lengths=(2,), success_steps=(2,))
    env = ActionChunkWrapper(TimeLimit(raw, 6), act_horizon=3, ignore_terminations=True, reward_scale=0.5, gamma=GAMMA)
    env.reset()
    _, reward, *ends, _ = env.step(chunk_of(0.0))
    assert ends == [False, False]
    assert reward == pytest.approx(0.5 * sum(GAMMA**i * r for i, r in enumerate(raw.rewards)))
    _, _, *ends, info = env.step(chunk_of(0.0))
    assert ends == [False, True] and raw.steps_after_termination == 4
    assert (info["success_once"], info["success_at_end"]) == (True, False)
    assert info["episode_return"] == pytest.approx(sum(raw.rewards))  # unscaled


def test_env_without_success_reports_none():
    env = ScriptedEnv(episode_lengths=(2,))
    env.step = lambda action, step=env.step: (*step(action)[:4], {"other": 1})
    chunked = ActionChunkWrapper(env, act_horizon=3)
    chunked.reset()
    *_, info = chunked.step(chunk_of(0.0))
    assert info["other"] == 1 and info["episode_length"] == 2
    assert not {"is_success", "success_once", "success_at_end"} & info.keys()


# ------------------------------------------------------------------------------------------------------------- two forms


def test_both_forms_give_the_same_transitions(flow):
    scripts = [dict(episode_lengths=(5, 30, 2)), dict(episode_lengths=(100,))]
    forms = [make(flow, [scripted(10, **script) for script in scripts], gamma=GAMMA) for make in FORMS.values()]
    np.testing.assert_allclose(forms[0].reset(), forms[1].reset(), atol=1e-6)
    n_terminal = 0
    for w in noises(12, 2, flow.noise_shape):
        (obs, rewards, dones, infos), (other_obs, other_rewards, other_dones, other_infos) = (env.step(w) for env in forms)
        np.testing.assert_allclose(obs, other_obs, atol=1e-5)
        np.testing.assert_allclose(rewards, other_rewards, atol=1e-5)
        np.testing.assert_array_equal(dones, other_dones)
        for info, other in zip(infos, other_infos, strict=True):
            assert info.keys() == other.keys()
            n_terminal += "terminal_observation" in info
            assert (info["scene"], info["gripper"].keys()) == (other["scene"], other["gripper"].keys())
            for key in info.keys() - {"episode", "scene", "gripper"}:
                np.testing.assert_allclose(info[key], other[key], atol=1e-5, err_msg=key)
    assert n_terminal >= 5


@pytest.mark.parametrize("form", FORMS)
def test_noise_becomes_the_flows_chunk_and_observation_its_features(form: str, flow):
    raw = ScriptedEnv(episode_lengths=(3, 100))
    env = FORMS[form](flow, [raw])
    obs = env.reset()
    first = raw._obs.copy()
    np.testing.assert_allclose(obs, flow.encode(np.stack([first, first])[None]), atol=1e-6)
    (w,) = noises(1, 1, flow.noise_shape)
    expected = flow.decode(th.tensor(obs), th.tensor(w))[0, : flow.act_horizon]
    _, _, dones, infos = env.step(w)
    np.testing.assert_allclose(infos[0]["action_chunk"], expected, atol=1e-6)
    np.testing.assert_allclose(raw.actions, expected, atol=1e-6)
    # the terminal observation is features too, of the terminating step and not of the reset after it
    assert dones[0]
    twin = ScriptedEnv(episode_lengths=(3, 100))
    frames = [twin.reset()[0].copy()] + [twin.step(action)[0].copy() for action in raw.actions]
    np.testing.assert_allclose(infos[0]["terminal_observation"], flow.encode(np.stack(frames[-2:])[None])[0], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_num_steps_of_the_wrapper_decodes(form: str, flow):
    env = FORMS[form](flow, [scripted()], num_steps=7)
    obs = env.reset()
    (w,) = noises(1, 1, flow.noise_shape)
    infos = env.step(w)[3]
    decoded = [flow.executed(flow.decode(th.tensor(obs), th.tensor(w), n))[0].numpy() for n in (7, flow.num_steps)]
    np.testing.assert_allclose(infos[0]["action_chunk"], decoded[0], atol=1e-6)
    assert not np.allclose(decoded[0], decoded[1], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("action_offset", [0, 1])
def test_act_horizon_mode_draws_the_rest_from_the_prior(form: str, action_offset: int):
    """The steered noise sits where the executed actions are; the rest is N(0, I), and a seed reproduces it."""
    flow = tiny_flow(pred_horizon=6, act_horizon=3, action_offset=action_offset)
    flow.net.forward = lambda x, t, d, cond: x.flip(1)  # so that the executed part depends on the rest
    w = 0.1 * noises(4, 2, (3, 2))

    def play(seed: int) -> np.ndarray:
        env = FORMS[form](flow, [scripted(episode_lengths=(1000,)) for _ in range(2)], steer_mode="act_horizon", num_steps=1)
        assert env.action_space.shape == (3, 2)
        env.seed(seed)
        env.reset()
        return np.stack([[info["action_chunk"] for info in env.step(x)[3]] for x in w])

    chunks = play(0)
    np.testing.assert_array_equal(chunks, play(0))
    assert not np.allclose(chunks, play(1)) and not np.allclose(chunks[:, 0], chunks[:, 1])
    env = FORMS[form](flow, [scripted()], steer_mode="act_horizon")
    steering = find_steering(env)
    steered = th.full((2000, 3, 2), 7.0)
    full = steering.full_noise(steered)
    executed = slice(action_offset, action_offset + 3)
    assert full.shape == (2000, 6, 2) and th.equal(full[:, executed], steered)
    rest = full[:, [i for i in range(6) if not executed.start <= i < executed.stop]]
    assert rest.mean().abs() < 0.05 and abs(rest.std() - 1) < 0.05
    assert not th.equal(full, steering.full_noise(steered))


@pytest.mark.parametrize("form", FORMS)
def test_shared_mode_repeats_one_entry(form: str):
    flow, w = tiny_flow(), noises(3, 2, (1, 2))

    def chunks(mode: str, noise: np.ndarray) -> np.ndarray:
        env = FORMS[form](flow, [scripted(episode_lengths=(1000,)) for _ in range(2)], steer_mode=mode)
        assert env.action_space.shape == noise.shape[2:]
        env.reset()
        return np.stack([[info["action_chunk"] for info in env.step(x)[3]] for x in noise])

    np.testing.assert_array_equal(chunks("shared", w), chunks("full", w.repeat(4, axis=2)))


@pytest.mark.parametrize("form", FORMS)
def test_macro_gamma(form: str, flow):
    env = FORMS[form](flow, [scripted()], gamma=GAMMA)
    assert env.get_attr("macro_gamma")[0] == pytest.approx(GAMMA**3) if form == "gym form" else env.macro_gamma == GAMMA**3
    assert env.action_space.contract.macro_gamma == pytest.approx(GAMMA**3)
    assert find_steering(env).contract.gamma == GAMMA


def test_returned_features_may_be_written_to(flow):
    """The array that the gym form hands out is not the one that it decodes from."""
    chunks = []
    for spoil in (False, True):
        env = LatentSteeringWrapper(ScriptedEnv(), flow)
        obs, _ = env.reset()
        obs[:] = 9.0 if spoil else obs
        chunks.append(env.step(np.ones((4, 2), np.float32))[4]["action_chunk"])
    np.testing.assert_array_equal(*chunks)


def test_gym_form_accepts_a_chunk_env(flow):
    raw = ScriptedEnv(episode_lengths=(2,))
    env = LatentSteeringWrapper(ActionChunkWrapper(raw, 3, 2, gamma=GAMMA, ignore_terminations=True), flow)
    assert env.macro_gamma == GAMMA**3
    env.reset()
    assert not env.step(np.zeros((4, 2), np.float32))[2] and len(raw.actions) == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda flow: LatentSteeringWrapper(scripted(), flow),
        lambda flow: Monitor(LatentSteeringWrapper(scripted(), flow)),
        lambda flow: gym_steered(flow, [scripted()]),
        lambda flow: VecNormalize(VecMonitor(gym_steered(flow, [scripted()]))),
        lambda flow: vec_steered(flow, [scripted()]),
        lambda flow: VecNormalize(VecMonitor(vec_steered(flow, [scripted()]))),
    ],
)
def test_find_steering_below_other_wrappers(wrap, flow):
    assert find_steering(wrap(flow)).flow is flow


# ----------------------------------------------------------------------------------------------------------- noise space


# --------------------------------------------------------------------------------------------------------------- errors


class _UnboundedEnv(ScriptedEnv):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)


def _with_control_mode(mode: str) -> gym.Env:
    env = ScriptedEnv()
    env.control_mode = mode
    return env


@pytest.mark.parametrize(
    ("env", "kwargs", "sentence"),
    [
        (lambda: DummyVecEnv([scripted]), {}, "for one env, found DummyVecEnv with 1; .*make_latent_env, .*VecLatentSteering"),
        (lambda: gym.vector.SyncVectorEnv([scripted] * 2), {}, "for one env, found SyncVectorEnv with 2"),
        (scripted, dict(act_horizon=0), "must be at least 1, found 0 and 1"),
        (scripted, dict(obs_horizon=0), "must be at least 1, found 3 and 0"),
        (scripted, dict(gamma=0.0), r"gamma is the discount per env step and must lie in \(0, 1\], found 0.0"),
        (scripted, dict(gamma=1.01), "found 1.01"),
        (_UnboundedEnv, {}, r"needs a bounded Box of shape \(A,\) as action space"),
        (lambda: gym.make("CartPole-v1"), {}, r"as action space, found Discrete\(2\)"),
        (lambda: ActionChunkWrapper(scripted(), 3), {}, r"needs a bounded Box of shape \(A,\) as action space"),
    ],
)
def test_chunk_wrapper_refuses(env, kwargs: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        ActionChunkWrapper(env(), **(dict(act_horizon=3) | kwargs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("env", "kwargs", "sentence"),
    [
        (scripted, dict(noise_bound=0.0), "noise_bound must be positive and finite, found 0.0"),
        (scripted, dict(noise_bound=-1.0), "noise_bound must be positive and finite, found -1.0"),
        (scripted, dict(gamma=0.0), "gamma is the discount per env step"),
        (scripted, dict(steer_mode="half"), "steer_mode must be 'full', 'act_horizon' or 'shared', found 'half'"),
        (scripted, dict(num_steps=0), "num_steps must be at least 1, found 0"),
        (lambda: scripted(action_dim=5), {}, r"chunks have shape \(H, A\) = \(3, 5\), but the flow's are \(3, 2\)"),
        (
            lambda: scripted(obs_dim=7),
            {},
            r"observations have shape \(obs_horizon, ...\) = \(2, 7\), but the flow's are \(2, 3\)",
        ),
        (lambda: _with_control_mode("pd_joint_pos"), {}, "control_mode='pd_joint_pos', but .* are for 'pd_ee_delta_pose'"),
    ],
)
def test_steering_refuses(form: str, env, kwargs: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        FORMS[form](tiny_flow(control_mode="pd_ee_delta_pose"), [env()], **kwargs)


@pytest.mark.parametrize("horizons", [dict(act_horizon=4), dict(obs_horizon=1)])
def test_chunk_env_for_other_horizons_is_refused(horizons: dict, flow):
    def chunk_env() -> ActionChunkWrapper:
        return ActionChunkWrapper(scripted(), **(dict(act_horizon=3, obs_horizon=2) | horizons))

    with pytest.raises(ValueError, match="The env does not fit the flow"):
        LatentSteeringWrapper(chunk_env(), flow)
    with pytest.raises(ValueError, match="The env does not fit the flow"):
        VecLatentSteering(DummyVecEnv([chunk_env]), flow)


def test_misuse_is_told_what_to_call(flow):
    with pytest.raises(ValueError, match=r"found DummyVecEnv with 2; .*make_latent_env"):
        LatentSteeringWrapper(DummyVecEnv([scripted, scripted]), flow)
    for asked in ({"gamma": 0.9}, {"ignore_terminations": True}, {"reward_scale": 5.0}):
        with pytest.raises(ValueError, match=r"was asked for, but the ActionChunkWrapper below has (0.99|False|1.0)"):
            LatentSteeringWrapper(ActionChunkWrapper(scripted(), 3, 2), flow, **asked)
    with pytest.raises(ValueError, match=r"A chunk must have shape \(H, A\) = \(3, 2\), found \(2, 2\)"):
        ActionChunkWrapper(scripted(), 3, 2).step(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="expects vectorised ActionChunkWrapper envs; for one env use LatentSteeringWrapper"):
        VecLatentSteering(DummyVecEnv([scripted]), flow)
    with pytest.raises(TypeError, match=r"flow must be a FlowPolicy or .*, or the folder of one, found dict"):
        LatentSteeringWrapper(scripted(), {"flow": "flows/lift_peg"})
    for env in (scripted(), DummyVecEnv([scripted]), VecMonitor(DummyVecEnv([scripted]))):
        with pytest.raises(ValueError, match=f"{type(env).__name__} is not steered: wrap it in LatentSteeringWrapper"):
            find_steering(env)


@pytest.mark.parametrize("form", FORMS)
def test_env_id_must_be_that_of_the_flow(form: str):
    for fits in ("Pendulum-v1", None):
        FORMS[form](tiny_flow(obs_dim=3, action_dim=1, env_id=fits), [gym.make("Pendulum-v1")])
    other = tiny_flow(obs_dim=3, action_dim=1, env_id="Other-v1")
    with pytest.raises(ValueError, match=r"trained on Other-v1, but the env is Pendulum-v1; .* pass allow_other_task=True"):
        FORMS[form](other, [gym.make("Pendulum-v1")])
    FORMS[form](other, [gym.make("Pendulum-v1")], allow_other_task=True)
    assert other.env_id == "Other-v1"

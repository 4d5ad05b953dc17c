"""
The adapter of LeRobot's policies, against a stand-in with the call signatures of LeRobot 0.4.4
(``lerobot/policies/diffusion/modeling_diffusion.py``): LeRobot itself demands another numpy than these tests run on. What
needs it is in tests/lerobot.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dsrl import LatentSteeringWrapper, LeRobotPolicy
from tests.envs import scripted

OBS_STEPS, HORIZON, ACTION_STEPS, A, D = 2, 8, 4, 2, 3
STATE, ENV_STATE, TOP, WRIST = (f"observation.{name}" for name in ("state", "environment_state", "images.top", "images.wrist"))
SHAPES = {STATE: (D,), ENV_STATE: (4,), TOP: (3, 4, 5), WRIST: (3, 4, 5)}


class StandInDiffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(A, A)
        self.num_inference_steps = 10

    def _prepare_global_conditioning(self, batch: dict[str, th.Tensor]) -> th.Tensor:
        features = [batch[STATE]]
        if "observation.images" in batch:
            features.append(batch["observation.images"].mean(dim=(-1, -2)).flatten(2))
        if ENV_STATE in batch:
            features.append(batch[ENV_STATE])
        return th.cat(features, dim=-1).flatten(start_dim=1)

    def conditional_sample(
        self, batch_size: int, global_cond: Any = None, generator: Any = None, noise: Any = None
    ) -> th.Tensor:
        assert noise.shape == (batch_size, HORIZON, A) and len(global_cond) == batch_size
        return self.mix(noise) + global_cond.mean(dim=1)[:, None, None] + self.num_inference_steps / 100


class StandIn(nn.Module):
    name = "diffusion"

    def __init__(self, *features: str, scheduler: str = "DDIM") -> None:
        super().__init__()
        self.diffusion = StandInDiffusion()
        read = {name: SimpleNamespace(shape=SHAPES[name]) for name in features or (STATE,)}
        self.config = SimpleNamespace(
            n_obs_steps=OBS_STEPS,
            horizon=HORIZON,
            n_action_steps=ACTION_STEPS,
            input_features=read,
            image_features={name: feature for name, feature in read.items() if "images" in name},
            action_feature=SimpleNamespace(shape=(A,)),
            noise_scheduler_type=scheduler,
        )


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: 2 * value for key, value in batch.items()}


def test_decode_is_the_policy_with_the_given_noise() -> None:
    policy = StandIn()
    flow = LeRobotPolicy(policy, (doubled, lambda actions: actions / 3), action_bounds=(-2.0, [2.0, 6.0])).freeze()
    assert (flow.noise_shape, flow.act_horizon, flow.action_offset, flow.cond_dim) == ((HORIZON, A), 4, 1, 6)
    obs, w = np.random.default_rng(0).standard_normal((5, OBS_STEPS, D)), th.randn(5, 3, HORIZON, A)
    cond = flow.encode(obs)
    th.testing.assert_close(cond, 2 * th.from_numpy(obs).float().flatten(1))
    for steps in (None, 4):
        raw = policy.diffusion.mix(w) + cond.mean(dim=1)[:, None, None, None] + (steps or 10) / 100
        expected = th.stack([raw[..., 0] / 3 / 2, (raw[..., 1] / 3 - 2) / 4], dim=-1)
        th.testing.assert_close(flow.decode(cond, w, num_steps=steps), expected.clamp(-1, 1))
    assert policy.diffusion.num_inference_steps == flow.num_steps == 10


def test_a_flat_observation_is_state_and_environment_state() -> None:
    flow = LeRobotPolicy(StandIn(ENV_STATE, STATE)).freeze()
    assert flow.obs_shapes == (D + 4,)
    obs = th.randn(2, OBS_STEPS, D + 4)
    th.testing.assert_close(flow.encode(obs), obs.flatten(1))


@pytest.mark.parametrize("shared", [True, False])
def test_images_are_laid_out_as_lerobot_has_them(shared: bool) -> None:
    keys = {STATE: "agent", TOP: "rgb" if shared else "top", WRIST: "rgb" if shared else "wrist"}
    flow = LeRobotPolicy(StandIn(STATE, TOP, WRIST), obs_keys=keys).freeze()
    cameras = dict(rgb=(4, 5, 6)) if shared else dict(top=(4, 5, 3), wrist=(4, 5, 3))
    assert flow.obs_shapes == {"agent": (D,), **cameras}
    rgb, state = th.randint(0, 256, (2, OBS_STEPS, 4, 5, 6), dtype=th.uint8), th.randn(2, OBS_STEPS, D)
    images = dict(rgb=rgb) if shared else dict(top=rgb[..., :3], wrist=rgb[..., 3:])
    means = (rgb.float() / 255).mean(dim=(2, 3))  # camera 1 is the first three channels
    expected = th.cat([state, means], dim=-1).flatten(1)
    th.testing.assert_close(flow.encode({"agent": state, **images}), expected)
    floats = {name: image.float() / 255 for name, image in images.items()}
    th.testing.assert_close(flow.encode({"agent": state, **floats}), expected)


def test_steering() -> None:
    flow = LeRobotPolicy(StandIn())
    base: Any = scripted(episode_lengths=(100,))
    env = LatentSteeringWrapper(base, flow, gamma=0.9)
    features, _ = env.reset(seed=0)
    w = env.action_space.sample()
    env.step(w)
    chunk = flow.decode(th.as_tensor(features)[None], th.as_tensor(w)[None])[0]
    th.testing.assert_close(th.tensor(np.array(base.unwrapped.actions)), chunk[1:5])


def test_statistics_are_part_of_the_fingerprint() -> None:
    policy = StandIn()
    processors = [None, (doubled, lambda actions: actions), (lambda batch: batch, lambda actions: actions / 3)]
    prints = {LeRobotPolicy(policy, pair).fingerprint() for pair in processors}
    prints.add(LeRobotPolicy(policy, action_bounds=(-2, 2)).fingerprint())
    assert len(prints) == 4 and LeRobotPolicy(policy).fingerprint() in prints


@pytest.mark.parametrize(
    ("policy", "kwargs", "message"),
    [
        (
            StandIn(scheduler="DDPM"),
            {},
            r"The policy's scheduler is DDPM, which adds noise of its own; LeRobotPolicy.from_pre",
        ),
        (StandIn(), dict(task="push"), r"The policy, diffusion, reads no sentence: leave task out"),
        (
            StandIn(),
            dict(obs_keys={TOP: "rgb"}),
            r"obs_keys names 'observation.images.top', but the policy reads \['observation",
        ),
        (
            StandIn(STATE, TOP),
            {},
            r"The policy reads 'observation.images.top': pass obs_keys, which says what the env calls it",
        ),
        (StandIn(STATE, TOP), dict(obs_keys={TOP: "rgb"}), r"The policy reads 'observation.state': pass obs_keys"),
        (StandIn(STATE, TOP), dict(obs_keys={STATE: "x", TOP: "x"}), r"obs_keys names 'x' for features of different sizes"),
        (StandIn(), dict(action_bounds=(1, 1)), r"action_bounds must be finite, the lower below the higher, found \[1. 1.\]"),
        (nn.Linear(2, 2), {}, r"A LeRobot policy of type 'Linear' cannot be steered; those of \['diffusion', 'pi0', 'pi05',"),
    ],
)
def test_bad_input_is_one_sentence(policy: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeRobotPolicy(policy, **kwargs)


def test_without_lerobot() -> None:
    with pytest.raises(ImportError, match=r"LeRobotPolicy.from_pretrained needs LeRobot: pip install lerobot"):
        LeRobotPolicy.from_pretrained("me/my_policy")

"""
The adapter for LeRobot's diffusion policy, against a stand-in with the call signatures of LeRobot 0.4.4
(``lerobot/policies/diffusion/modeling_diffusion.py``): LeRobot itself demands an older torch than this package's tests run on.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dsrl import LatentSteeringWrapper
from sb3_dsrl.policies.lerobot import LeRobotDiffusionPolicy
from tests.envs import scripted

OBS_STEPS, HORIZON, ACTION_STEPS, A, D = 2, 8, 4, 2, 3


class StandInDiffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(A, A)
        self.num_inference_steps = 10

    def _prepare_global_conditioning(self, batch: dict[str, th.Tensor]) -> th.Tensor:
        features = [batch["observation.state"]]
        if "observation.images" in batch:
            features.append(batch["observation.images"].mean(dim=(-1, -2)).flatten(2))
        return th.cat(features, dim=-1).flatten(start_dim=1)

    def conditional_sample(
        self, batch_size: int, global_cond: Any = None, generator: Any = None, noise: Any = None
    ) -> th.Tensor:
        assert noise.shape == (batch_size, HORIZON, A) and len(global_cond) == batch_size
        return self.mix(noise) + global_cond.mean(dim=1)[:, None, None] + self.num_inference_steps / 100


class StandIn(nn.Module):
    def __init__(self, scheduler: str = "DDIM") -> None:
        super().__init__()
        self.diffusion = StandInDiffusion()
        self.config = SimpleNamespace(
            n_obs_steps=OBS_STEPS,
            horizon=HORIZON,
            n_action_steps=ACTION_STEPS,
            action_feature=SimpleNamespace(shape=(A,)),
            noise_scheduler_type=scheduler,
        )


def test_decode_is_the_policy_with_the_given_noise() -> None:
    policy = StandIn()
    flow = LeRobotDiffusionPolicy(
        policy,
        (D,),
        preprocess=lambda batch: {key: 2 * value for key, value in batch.items()},
        postprocess=lambda actions: actions / 3,
    ).freeze()
    assert (flow.noise_shape, flow.act_horizon, flow.action_offset, flow.cond_dim) == ((HORIZON, A), 4, 1, 6)
    obs, w = np.random.default_rng(0).standard_normal((5, OBS_STEPS, D)), th.randn(5, 3, HORIZON, A)
    cond = flow.encode(obs)
    th.testing.assert_close(cond, 2 * th.from_numpy(obs).float().flatten(1))
    for steps in (None, 4):
        expected = policy.diffusion.mix(w) + cond.mean(dim=1)[:, None, None, None] + (steps or 10) / 100
        th.testing.assert_close(flow.decode(cond, w, num_steps=steps), (expected / 3).clamp(-1, 1))
    assert policy.diffusion.num_inference_steps == 10


def test_plays_the_steps_that_the_policy_was_made_for() -> None:
    assert LeRobotDiffusionPolicy(StandIn(), (D,)).num_steps == 10


@pytest.mark.parametrize("shapes", [D, {}, {"state": D}])
def test_obs_shapes_that_are_no_shapes(shapes: Any) -> None:
    with pytest.raises(TypeError, match=r"obs_shapes must be the shape of one frame"):
        LeRobotDiffusionPolicy(StandIn(), shapes)


def test_images_are_laid_out_as_lerobot_has_them() -> None:
    flow = LeRobotDiffusionPolicy(StandIn(), {"state": (D,), "rgb": (4, 5, 6)}).freeze()
    rgb = th.randint(0, 256, (2, OBS_STEPS, 4, 5, 6), dtype=th.uint8)
    state = th.randn(2, OBS_STEPS, D)
    means = (rgb.float() / 255).mean(dim=(2, 3))  # camera 1 is the first three channels
    th.testing.assert_close(flow.encode({"state": state, "rgb": rgb}), th.cat([state, means], dim=-1).flatten(1))


def test_steering() -> None:
    flow = LeRobotDiffusionPolicy(StandIn(), (D,))
    base: Any = scripted(episode_lengths=(100,))
    env = LatentSteeringWrapper(base, flow, gamma=0.9)
    features, _ = env.reset(seed=0)
    w = env.action_space.sample()
    env.step(w)
    chunk = flow.decode(th.as_tensor(features)[None], th.as_tensor(w)[None])[0]
    th.testing.assert_close(th.tensor(np.array(base.unwrapped.actions)), chunk[1:5])


def test_ddpm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The policy's scheduler is DDPM, which adds noise of its own"):
        LeRobotDiffusionPolicy(StandIn("DDPM"), (D,))

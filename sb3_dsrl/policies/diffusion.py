"""A diffusion policy that can be steered: DDIM without noise of its own maps each noise to one chunk."""

from functools import lru_cache
from typing import Any

import torch as th
from torch import nn

from sb3_dsrl.policies.action_normalizer import ActionNormalizer
from sb3_dsrl.policies.flow import CODERS, FlowPolicy
from sb3_dsrl.policies.losses import noise_prediction_loss

try:
    from diffusers import DDIMScheduler
except ImportError as error:
    raise ImportError("DiffusionPolicy needs the scheduler of diffusers: pip install 'sb3-dsrl[diffusion]'") from error

#: K, noise levels of the training. It has many divisors: steps of equal length exist only for those.
N_LEVELS = 120


class DiffusionPolicy(FlowPolicy, library_name="sb3_dsrl", tags=["robotics", "diffusion"], coders=CODERS):
    """
    Diffusion policy over action chunks (https://arxiv.org/abs/2303.04137), decoded by DDIM with eta = 0
    (https://arxiv.org/abs/2010.02502). That is deterministic, so its initial noise can be steered like that of a flow.

    Its ``net`` is an eps network, not a velocity field: it predicts the noise ``eps(x, t | cond)``. It has the signature of a
    velocity field and is asked with d = 0 and t = 1 - k / K at noise level k, so that t runs from noise to chunk as in a flow.
    Train one with ``train_flow(demos, policy_class=DiffusionPolicy)``. All other arguments are those of
    :class:`~sb3_dsrl.FlowPolicy`.

    ``invert`` finds less than it does for a flow: DDIM clips at every step, so that there is no way back.

    :param net: eps network over (T, A)
    """

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        """
        Denoises from noise to chunk.

        :param cond: (B, C)
        :param w: noise, (B, T, A), or M noises for each observation, (B, M, T, A)
        :param num_steps: DDIM steps, a divisor of 120 such as 5, 8, 10 or 20; None is the policy's own ``num_steps``
        :return: chunks of the shape of w, clipped to [-1, 1]
        :raises ValueError: if ``num_steps`` is no divisor
        """
        return super().decode(cond, w, num_steps)

    def _steps(self, num_steps: int | None) -> int:
        n = self.num_steps if num_steps is None else num_steps
        if n < 1 or N_LEVELS % n:
            raise ValueError(f"num_steps must divide {N_LEVELS}, found {n}")
        return n

    def _generate(self, cond: th.Tensor, w: th.Tensor, n: int) -> th.Tensor:
        scheduler = _scheduler()
        scheduler.set_timesteps(n)
        x = w.reshape(-1, *self.noise_shape)
        cond = cond.repeat_interleave(len(x) // len(cond), dim=0)
        for k in scheduler.timesteps:
            eps = self.net(x, *_times(k.expand(len(x)).to(x.device)), cond)
            x = scheduler.step(eps, k, x, eta=0.0).prev_sample
        return x.reshape(w.shape)

    def _undo(self, cond: th.Tensor, x: th.Tensor, n: int) -> th.Tensor:
        return th.zeros_like(x)

    @staticmethod
    def _fit(normalizer: ActionNormalizer, actions: th.Tensor) -> None:
        # DDIM clips what it takes for the clean chunk to [-1, 1] at every step, without which its first steps go astray
        normalizer.fit_range(actions)

    def imitation_loss(  # type: ignore[override]  # a flow's has an argument of its own
        self, teacher: nn.Module, cond: th.Tensor, chunk: th.Tensor, weights: th.Tensor | None = None
    ) -> dict[str, th.Tensor]:
        """
        What stage 0 minimises.

        :param teacher: the average of the network, which a diffusion model does not learn from
        :param cond: (B, C)
        :param chunk: actions of the env, (B, T, A)
        :param weights: weight of each sample, (B,); None is 1
        :return: name -> loss
        """
        noise = th.randn_like(chunk)
        k = th.randint(N_LEVELS, (len(chunk),), device=chunk.device)
        noisy = _scheduler().add_noise(self._from_actions(chunk), noise, k)
        return {"flow/noise_prediction_loss": noise_prediction_loss(self.net(noisy, *_times(k), cond), noise, weights)}


@lru_cache(maxsize=1)  # building the schedule takes a Python loop; every user sets its time steps itself
def _scheduler() -> Any:  # diffusers' lazy imports hide its types
    return DDIMScheduler(N_LEVELS, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")


def _times(k: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    t = 1.0 - k.float() / N_LEVELS
    return t, th.zeros_like(t)

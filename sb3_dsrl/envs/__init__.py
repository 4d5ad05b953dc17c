"""Where it runs: ManiSkill, any gymnasium env, worker processes, Ray."""

import gymnasium as gym

from sb3_dsrl.steering.adapters import ADAPTERS


def _maniskill(env: gym.Env) -> gym.Env | None:
    if not hasattr(env.unwrapped, "single_action_space"):  # tensors with a batch dimension
        return None
    from sb3_dsrl.envs.maniskill_wrappers import unbatched  # importing sb3_dsrl must not import ManiSkill

    return unbatched(env)


ADAPTERS.append(_maniskill)
# gym.make("sb3_dsrl/Latent-v0", env_id=..., flow=...)
gym.register("sb3_dsrl/Latent-v0", "sb3_dsrl.envs.factory:make_steered_env")

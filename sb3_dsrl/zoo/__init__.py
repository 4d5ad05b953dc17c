"""
rl-zoo3 (extra: zoo): ``ppo.yml`` and ``sac.yml`` hold the settings for ``sb3_dsrl/Latent-v0``. Importing this package, as
``--gym-packages sb3_dsrl.zoo`` does, lets rl-zoo3 tune what the latent policy has of its own, in place of its own choices.
"""

from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

from sb3_dsrl.zoo import samplers

HYPERPARAMS_SAMPLER.update(ppo=samplers.sample_ppo, sac=samplers.sample_sac)
HYPERPARAMS_CONVERTER.update(ppo=samplers.convert_ppo, sac=samplers.convert_sac)

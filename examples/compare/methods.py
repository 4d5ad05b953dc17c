"""What is compared: one function for each method, and the tables that name them.

A method gets a :class:`~compare.trial.Trial`, may spend its budget of env steps, and returns what is then evaluated.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC

from compare.half_demos import HalfDemos
from compare.trial import GAMMA, Trial
from sb3_dsrl import collect_rollouts, find_ticket, ppo_kwargs, pretrain_latent
from sb3_dsrl.evaluation.best_of import BestOfM
from sb3_dsrl.evaluation.play import Actor

CANDIDATE_POOL = 64  # candidates of a state, decoded once: fresh ones for every batch took over half an hour


Method = Callable[[Trial], Actor]


def control(trial: Trial, actor: Actor) -> Actor:
    """No learning: the frozen flow under the prior, or under w = 0."""
    trial.steered()
    return actor


def narrow(trial: Trial) -> Actor:
    """No learning: w ~ N(0, 0.5^2)."""
    env = trial.steered()
    model = PPO("LatentPolicy", env, **ppo_kwargs(env, policy_kwargs=dict(log_std_init=math.log(0.5)), seed=trial.seed))
    return model.policy  # sampled; its mean is w = 0


def ticket(trial: Trial) -> Actor:
    """No learning: the best fixed noise, found by successive halving on episodes of its own."""
    found = find_ticket(trial.steered(), rounds=trial.ticket_rounds, seed=trial.seed)
    trial.env_steps = found.env_steps
    return found.w


def best_of_m(trial: Trial) -> Actor:
    """No learning: of 16 noises the one that the critic likes best, at every macro-step."""
    env = trial.steered()
    return BestOfM(env)


def latent_model(trial: Trial, ticket: bool, shared: bool = False) -> PPO:
    """
    PPO with a latent policy around the prior's mean or around a golden ticket.

    :param shared: one entry of noise is repeated; it moves all of a chunk alike, hence the smaller std
    """
    env = trial.steered(steer_mode="shared" if shared else "full")
    std, prior_mix = (0.3, 0.0) if shared else (0.45, 0.03)
    policy_kwargs: dict[str, Any] = dict(prior_mix=prior_mix, log_std_init=math.log(std))
    if ticket:
        found = find_ticket(env, rounds=trial.ticket_rounds, seed=trial.seed)
        trial.env_steps += found.env_steps
        policy_kwargs["centre"] = found.w
    n_steps = trial.rollout_steps(512, trial.flow.act_horizon)
    overrides: dict[str, Any] = dict(n_steps=n_steps, batch_size=n_steps * trial.n_envs // 4, seed=trial.seed)
    kwargs = ppo_kwargs(env, policy_kwargs=policy_kwargs, **overrides)
    return PPO("LatentPolicy", env, **kwargs)


def fit_stage1(trial: Trial, model: PPO, base: bool, rounds: int = 1, demos: bool = False, **recipe: Any) -> None:
    """
    Stage 1 on rollouts of the flow or of the policy.

    :param base: the first rollouts are those of the flow
    :param rounds: of rollout and refit, which share the episodes
    :param demos: the demos are used, too
    :param recipe: arguments of ``pretrain_latent``
    """
    for i in range(rounds):
        actor = trial.flow if base and not i else model
        rollouts = collect_rollouts(actor, trial.env, trial.rollout_episodes // rounds, seed=trial.seed + 1_000 * i)
        trial.env_steps += rollouts.env_steps
        path = trial.demo_path if demos else None
        pretrain_latent(model, path, rollouts, **(dict(n_iterations=trial.stage1_iters) | recipe))


def latent_ppo(
    trial: Trial, ticket: bool = True, stage1: bool = True, stage2: bool = True, shared: bool = False, **recipe: Any
) -> Actor:
    """The method: golden ticket, stage 1, stage 2; or parts of it, or another recipe of stage 1."""
    model = latent_model(trial, ticket, shared)
    if stage1:
        fit_stage1(trial, model, base=not (ticket or shared), **recipe)
    return trial.learn(model, trial.flow.act_horizon) if stage2 else model


def demos_only(trial: Trial) -> Actor:
    """Stage 1 without a rollout: candidates scored by the critic that learned from the demos."""
    model = latent_model(trial, ticket=False)
    pretrain_latent(model, trial.demo_path, n_iterations=trial.stage1_iters, pool_size=CANDIDATE_POOL)
    return model


def latent_off_policy(trial: Trial, algorithm: type[SAC | TQC]) -> Actor:
    """
    Stock SAC or TQC on the steered env. The box of noises is small: SB3's warm-up draws uniformly from it, and from
    [-1, 1] (std 0.58) the flow still decodes what it knows; https://arxiv.org/abs/2506.15799 bounds the noise likewise.
    """
    env = trial.steered(noise_bound=1.0, steer_mode="shared")
    model = algorithm(
        "MlpPolicy",
        env,
        gamma=GAMMA**trial.flow.act_horizon,
        learning_starts=min(1_000, trial.budget // (10 * trial.flow.act_horizon)),
        gradient_steps=trial.n_envs // 2 or 1,
        ent_coef="auto_0.1",
        seed=trial.seed,
    )
    return trial.learn(model, trial.flow.act_horizon)


def scratch_ppo(trial: Trial, chunks: bool, sparse: bool) -> Actor:
    """PPO without a flow, on raw actions or on chunks of them. gamma 0.8 is ManiSkill's own for dense rewards."""
    horizon = trial.task.horizon if chunks else 1
    gamma = GAMMA if sparse else 0.8
    env = trial.raw(horizon, sparse, gamma)
    n_steps = trial.rollout_steps(2_048 // horizon, horizon)
    model = PPO(
        "MlpPolicy",
        env,
        gamma=gamma**horizon,
        n_steps=n_steps,
        batch_size=n_steps * trial.n_envs // 4,
        policy_kwargs=dict(net_arch=[256, 256], log_std_init=-0.5),
        seed=trial.seed,
    )
    return trial.learn(model, horizon)


def scratch_sac(trial: Trial, sparse: bool, demos: bool = False) -> Actor:
    """
    SAC without a flow; or half of each batch comes from demos, as in RLPD (https://arxiv.org/abs/2302.02948), of which the
    large ensemble, the layer norm and the many updates a step are not in stock SB3.
    """
    gamma = GAMMA if sparse else 0.8
    env = trial.raw(1, sparse, gamma)
    buffer: dict[str, Any] = {}
    if demos:
        buffer = dict(replay_buffer_class=HalfDemos, replay_buffer_kwargs=dict(demos=trial.demo_path, sparse=sparse))
    model = SAC(
        "MlpPolicy",
        env,
        gamma=gamma,
        tau=0.01,
        learning_starts=min(4_000, trial.budget // 10),
        gradient_steps=trial.n_envs // 2 or 1,
        seed=trial.seed,
        **buffer,
    )
    return trial.learn(model, 1)


#: name in tables and file names -> (what it is, the method)
METHODS: dict[str, tuple[str, Method]] = {
    "prior": ("frozen flow, w ~ N(0, I)", partial(control, actor="prior")),
    "zero": ("frozen flow, w = 0", partial(control, actor="zero")),
    "narrow": ("frozen flow, w ~ N(0, 0.5^2)", narrow),
    "ticket": ("golden ticket: best fixed noise", ticket),
    "best_of_m": ("best of 16 noises by the critic", best_of_m),
    "stage1": ("stage 1", partial(latent_ppo, ticket=False, stage2=False)),
    "ticket_stage1": ("ticket + stage 1", partial(latent_ppo, stage2=False)),
    "stage2": ("stage 2", partial(latent_ppo, ticket=False, stage1=False)),
    "ticket_stage2": ("ticket + stage 2", partial(latent_ppo, stage1=False)),
    "stage1_stage2": ("stage 1 + stage 2", partial(latent_ppo, ticket=False)),
    "full": ("ticket + stage 1 + stage 2", latent_ppo),
    "shared_stage1": ("stage 1, shared noise", partial(latent_ppo, ticket=False, shared=True, stage2=False)),
    "shared_stage2": ("stage 2, shared noise", partial(latent_ppo, ticket=False, shared=True, stage1=False)),
    "shared_full": ("stage 1 + stage 2, shared noise", partial(latent_ppo, ticket=False, shared=True)),
    "latent_sac": ("latent SAC, shared noise", partial(latent_off_policy, algorithm=SAC)),
    "latent_tqc": ("latent TQC, shared noise", partial(latent_off_policy, algorithm=TQC)),
    "ppo_dense": ("PPO from scratch, dense", partial(scratch_ppo, chunks=False, sparse=False)),
    "ppo_sparse": ("PPO from scratch, sparse", partial(scratch_ppo, chunks=False, sparse=True)),
    "ppo_chunks_dense": ("PPO from scratch on chunks, dense", partial(scratch_ppo, chunks=True, sparse=False)),
    "ppo_chunks_sparse": ("PPO from scratch on chunks, sparse", partial(scratch_ppo, chunks=True, sparse=True)),
    "sac_dense": ("SAC from scratch, dense", partial(scratch_sac, sparse=False)),
    "sac_sparse": ("SAC from scratch, sparse", partial(scratch_sac, sparse=True)),
    "rlpd_dense": ("SAC, half of each batch demos, dense", partial(scratch_sac, sparse=False, demos=True)),
    "rlpd_sparse": ("SAC, half of each batch demos, sparse", partial(scratch_sac, sparse=True, demos=True)),
}

#: deterministic, so that another seed would count the same episodes again
NO_SEED = ("zero",)

_recipe = partial(latent_ppo, ticket=False, stage2=False)
#: other recipes of stage 1, the same way; all but the first use as many rollouts as "stage1"
RECIPES: dict[str, tuple[str, Method]] = {
    "candidates_demos": ("stage 1: candidates, critic of the demos", demos_only),
    "candidates_rollouts": (
        "stage 1: candidates, critic of demos and rollouts",
        partial(_recipe, demos=True, weighting="candidates", pool_size=CANDIDATE_POOL),
    ),
    "two_rounds": ("stage 1: two rounds of half the episodes", partial(_recipe, rounds=2)),
    "four_rounds": ("stage 1: four rounds of a quarter of the episodes", partial(_recipe, rounds=4)),
    "monte_carlo": ("stage 1: advantages of whole episodes (lambda = 1)", partial(_recipe, gae_lambda=1.0)),
    "one_step": ("stage 1: advantages of one macro-step (lambda = 0)", partial(_recipe, gae_lambda=0.0)),
    "cooler": ("stage 1: weights at beta = 0.1", partial(_recipe, beta=0.1)),
    "warmer": ("stage 1: weights at beta = 1", partial(_recipe, beta=1.0)),
    "longer": ("stage 1: 2,000 iterations", partial(_recipe, n_iterations=2_000)),
    "learned_std": ("stage 1: the std is learned, too", partial(_recipe, learn_std=True)),
}
ALL = METHODS | RECIPES

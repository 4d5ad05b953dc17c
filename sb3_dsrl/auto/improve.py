"""Everything in one call: a frozen flow goes in, and the best policy that steering finds comes out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sb3_dsrl.auto.report import ImproveReport
from sb3_dsrl.auto.step_budget import StepBudget
from sb3_dsrl.envs.factory import make_latent_env
from sb3_dsrl.envs.gym_envs import EnvMaker
from sb3_dsrl.evaluation.choice import CHOICE_SEED, choose_policy
from sb3_dsrl.evaluation.outcomes import play_outcomes
from sb3_dsrl.evaluation.play import Actor
from sb3_dsrl.evaluation.rollouts import collect_rollouts
from sb3_dsrl.evaluation.steerability import steerability
from sb3_dsrl.evaluation.steerability_report import SteerabilityReport
from sb3_dsrl.evaluation.vec_normalize import require_raw_features
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.loading import FlowLike
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage1.fit import fit_executed
from sb3_dsrl.stage1.gate import Gate
from sb3_dsrl.stage2.callbacks import SuccessEvalCallback
from sb3_dsrl.stage2.keep_best import KeepBest
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.stage2.settings import MIN_STEPS, ppo_kwargs
from sb3_dsrl.stage2.start import start_around
from sb3_dsrl.stage2.steered_policy import SteeredPolicy
from sb3_dsrl.stage2.value_warmup import ValueWarmup
from sb3_dsrl.steering.vec_env import find_steering

#: Parts of the budget; stage 2 has the rest.
STEERABILITY, ROLLOUTS, GATE, CHOICE = 0.2, 0.2, 0.08, 0.2
#: Part of stage 2's that measures it.
MEASURING = 0.2
#: More episodes than these tell little more.
MAX_STEERABILITY, MAX_ROLLOUTS = 400, 256
#: Rollouts of stage 2, as far as they are long enough, and how many of them teach the value function alone.
N_UPDATES, WARMUP = 8, 1 / 8
#: Std of what stages 1 and 2 start from.
STD = 0.3


def improve(
    flow: FlowLike,
    env_id: str | EnvMaker,
    demos: Demos | str | Path | None = None,
    budget: int = 100_000,
    *,
    n_envs: int = 8,
    seed: int = 0,
    alpha: float = 0.05,
    ppo: Mapping[str, Any] | None = None,
    progress_bar: bool = False,
    **env_kwargs: Any,
) -> SteeredPolicy:
    """
    Makes the most of a frozen flow within a budget of env steps::

        policy = improve("flows/lift_peg", "LiftPegUpright-v1", budget=100_000, progress_bar=True)
        print(policy.report)
        policy.save_pretrained("policies/lift_peg")

    First :func:`~sb3_dsrl.steerability` tries the flow and the free controls, w = 0 and fixed noises. Stage 1 starts close
    around the better of them and learns from rollouts; stage 2 goes on with stock PPO, value function first, with a bound on
    how far it may fall. In the end :func:`~sb3_dsrl.choose_policy` plays all of them from fresh starts, the same for all, and
    keeps the best that is shown to beat the flow. What stage 1 starts from and what stage 2 learned are tried sampled, too:
    where a policy gets stuck, noise can free it. If none beats the flow, it is the flow that comes back, to be sampled
    (``policy.deterministic`` is False). So what comes out is worse than the flow with a chance of alpha at most.

    Every env step is counted, evaluations included. Only if episodes are longer than those of the first few, more may be spent
    than the budget.

    :param flow: the frozen policy, or its folder
    :param env_id: an id of ManiSkill or of gymnasium, or a callable that returns an env, as :func:`~sb3_dsrl.make_latent_env`
        takes it; the env must report success
    :param demos: the flow's demos, or the path of an ``.h5`` file, to compare the spread of its actions with; or None
    :param budget: env steps
    :param n_envs: N
    :param seed: of everything
    :param alpha: chance to deploy a policy that is no better than the flow, without being it
    :param ppo: arguments of PPO that replace those of :func:`~sb3_dsrl.ppo_kwargs`
    :param progress_bar: show one bar over the whole budget
    :param env_kwargs: further arguments of :func:`~sb3_dsrl.make_latent_env`, such as ``max_episode_steps``
    :return: the policy; its ``report`` is an :class:`~sb3_dsrl.ImproveReport`
    :raises ValueError: if the budget is too small, or the env does not fit the flow or reports no success
    """
    if budget < 1:
        raise ValueError(f"budget must be a positive number of env steps, found {budget}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is a probability and must lie in (0, 1), found {alpha}")
    steps = StepBudget(budget, progress_bar)
    envs: list[VecEnv] = []
    try:
        for _ in range(2):  # to learn in, and to measure in
            envs.append(make_latent_env(env_id, flow, n_envs, seed=seed, **env_kwargs))
        require_raw_features(envs[0], "improve")
        run = _Improvement(steps.watch(envs[0]), steps.watch(envs[1]), steps, seed, dict(ppo or {}))
        return run.policy(env_id if isinstance(env_id, str) else getattr(env_id, "__name__", "env"), demos, alpha)
    finally:
        steps.close()
        for env in envs:
            env.close()


@dataclass
class _Improvement:
    """
    One run.

    :param env: to learn in
    :param eval_env: to measure in
    :param steps: pays for both
    :param seed: of everything
    :param ppo: overrides
    """

    env: VecEnv
    eval_env: VecEnv
    steps: StepBudget
    seed: int
    ppo: dict[str, Any]

    def policy(self, env_id: str, demos: Demos | str | Path | None, alpha: float) -> SteeredPolicy:
        began = time.time()
        flow = find_steering(self.env).flow
        self.length = self._episode_length(flow)
        episodes = min(MAX_STEERABILITY, self._episodes(STEERABILITY))
        with self.steps.part("steerability"):
            n_tickets = next(n for n in (16, 8, 4, 2) if episodes * 3 // 8 * 3 // 4 // n >= 2)
            found = steerability(flow, self.eval_env, demos=demos, episodes=episodes, n_tickets=n_tickets, seed=self.seed)
        actors: dict[str, Actor] = {"base": "prior", "zero": "zero", "ticket": found.search.w}

        model = self._model(found)
        actors["narrow"] = SteeredPolicy(flow, _latent_policy(model).copy(), deterministic=False)
        gate = self._stage1(model, flow)
        if gate.passed:
            actors["stage1"] = _latent_policy(model).copy()
        curve = self._stage2(model)
        if curve:
            actors["stage2"] = learned = _latent_policy(model).copy()
            actors["stage2_stochastic"] = SteeredPolicy(flow, learned, deterministic=False)
        with self.steps.part("choice"):
            choice = choose_policy(
                actors,
                self.eval_env,
                alpha=alpha,
                max_env_steps=self.steps.left,
                seed=CHOICE_SEED + 500_000 + self.seed,
            )
        assert gate.choice is not None
        policy = choice.actor
        if not isinstance(policy, SteeredPolicy):
            latent = policy if isinstance(policy, LatentPolicy) else self._latent(policy)
            policy = SteeredPolicy(flow, latent, deterministic=choice.name != "base")
        seconds = time.time() - began
        kept = bool(gate.passed)
        policy.report = ImproveReport(
            env_id, self.steps.total, dict(self.steps.spent), found, gate.choice, kept, curve, choice, seconds
        )
        return policy

    def _episode_length(self, flow: SteerablePolicy) -> float:
        """Env steps that an episode costs, those of envs that idle along included."""
        n = self.eval_env.num_envs
        with self.steps.part("first episodes"):
            length = play_outcomes(flow, self.eval_env, n, 5_000_000 + self.seed, who="improve").env_steps / n
        least = int(max(25 * n, 100) * length)
        if self.steps.total < least:
            raise ValueError(
                f"budget must be at least {least:,} env steps for {n} envs and episodes of {length:.0f} steps, found "
                f"{self.steps.total:,}: all that is tried must be played"
            )
        return length

    def _episodes(self, part: float) -> int:
        """That a part of the budget pays."""
        return int(part * self.steps.total / self.length)

    def _model(self, found: SteerabilityReport) -> PPO:
        """A new policy, close around the better free control."""
        fixed = STEERABILITY + ROLLOUTS + GATE + CHOICE
        macro_steps = (1 - fixed) * (1 - MEASURING) * self.steps.total / find_steering(self.env).contract.act_horizon
        n_steps = ppo_kwargs(self.env)["n_steps"]
        n_steps = max(MIN_STEPS, min(n_steps, int(macro_steps / self.env.num_envs / N_UPDATES) // 4 * 4))
        own = dict(n_steps=n_steps, seed=self.seed) | self.ppo
        own["policy_kwargs"] = start_around(found, STD) | own.get("policy_kwargs", {})
        return PPO("LatentPolicy", self.env, **ppo_kwargs(self.env, **own))

    def _stage1(self, model: PPO, flow: SteerablePolicy) -> Gate:
        """Trains the model's policy in place: around a ticket from its own rollouts, around w = 0 from the prior's."""
        actor: Actor = model if _latent_policy(model).centre.any() else flow
        with self.steps.part("rollouts"):
            rollouts = collect_rollouts(actor, self.env, min(MAX_ROLLOUTS, self._episodes(ROLLOUTS)), seed=self.seed)
        gate = Gate(self.eval_env, max(self.eval_env.num_envs, self._episodes(GATE) // 2), seed=CHOICE_SEED + self.seed)
        start = deepcopy(model.policy.state_dict())
        fit_executed(model, rollouts, seed=self.seed)
        with self.steps.part("gate"):
            gate.decide(_latent_policy(model), start)
        return gate

    def _stage2(self, model: PPO) -> list[tuple[int, Any]]:
        """Trains the model; it ends with its best weights. What was measured, or nothing if the budget is spent."""
        for_it = self.steps.left - CHOICE * self.steps.total
        n = self.eval_env.num_envs
        measured = max(n, int(MEASURING * for_it / 3 / self.length) // n * n)  # before, in the middle, at the end
        rollout = model.n_steps * n
        cost = rollout * find_steering(self.env).contract.act_horizon
        n_rollouts = int((for_it - 3 * measured * self.length) / cost)
        if n_rollouts < 2:
            return []
        curve = SuccessEvalCallback(self.eval_env, eval_freq=int(0.6 * n_rollouts * cost), n_eval_episodes=measured)
        callbacks = [ValueWarmup(max(1, int(WARMUP * n_rollouts))), curve, KeepBest(curve)]
        with self.steps.part("stage 2"):
            model.learn(n_rollouts * rollout, callbacks)
        return [(env_steps, result) for env_steps, result, _ in curve.history]

    def _latent(self, actor: Actor) -> LatentPolicy:
        """A free control as a latent policy."""
        steering = find_steering(self.env)
        spaces = steering.observation_space, steering.action_space
        return LatentPolicy(*spaces, lr_schedule=lambda _: 3e-4, **start_around(actor, STD))


def _latent_policy(model: PPO) -> LatentPolicy:
    assert isinstance(model.policy, LatentPolicy)
    return model.policy

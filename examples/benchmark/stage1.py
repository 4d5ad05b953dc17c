"""Stage 1 against plain code: its speed, and what its policies are worth."""

import time
from typing import Any

import torch as th

from benchmark.measuring import N_STEPS, A, Args, M, T, side_by_side, unet_flow
from benchmark.peers import head_weights, plain_decode, plain_ucb
from sb3_dsrl import FlowPolicy, LatentPolicy, aw_mle_loss, evaluate, make_latent_env, pretrain_latent
from sb3_dsrl.stage1.candidates import candidate_weights
from sb3_dsrl.steering.steering import Steering


def bench_stage1(args: Args) -> dict[str, float]:
    """Part b: one iteration of stage 1, and a whole stage 1 of 30,000 iterations on 3,000 observations."""
    flow = unet_flow(64, args.device)
    critic = flow.critic
    assert critic is not None
    steering = Steering(flow)
    policy = LatentPolicy(steering.observation_space, steering.action_space, lambda _: 3e-4).to(args.device)
    optimizer = th.optim.Adam(policy.parameters(), lr=3e-4)
    heads = head_weights(critic)
    n_states, n_iterations, pool_size, batch = 3_000, 30_000, 64, args.stage1_batch
    states = th.randn(n_states, 64, device=args.device)
    pool = th.randn(n_states, pool_size, T, A, device=args.device)
    q_pool = th.randn(n_states, pool_size, device=args.device)

    def update(cond: th.Tensor, w: th.Tensor, q: th.Tensor) -> None:
        weights, _ = candidate_weights(q)
        loss = aw_mle_loss(policy, cond, w, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def plain() -> None:
        cond = states[th.randint(n_states, (batch,))]
        w = th.randn(batch * M, T, A, device=args.device)
        with th.no_grad():
            repeated = cond.repeat_interleave(M, dim=0)
            chunk = plain_decode(flow.net, repeated, w, N_STEPS)
            q = plain_ucb(heads, repeated, flow.executed(chunk), 1.0).reshape(batch, M)
        weights, _ = candidate_weights(q)
        log_prob = policy.log_prob(repeated, w).reshape(batch, M)
        loss = -(weights * log_prob).sum(dim=1).mean() + 1e-3 * policy.kl_to_prior(cond).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def fresh(n: int) -> None:
        cond = states[th.randint(n_states, (batch,))]
        w = th.randn(batch, M, T, A, device=args.device)
        with th.no_grad():
            q = critic.get_ucb_q(cond, flow.executed(flow.decode(cond, w, n)), 1.0)
        update(cond, w, q)

    def cached() -> None:
        index = th.randint(n_states, (batch, 1))
        chosen = th.rand(batch, pool_size).topk(M, dim=1).indices
        update(states[index[:, 0]], pool[index, chosen], q_pool[index, chosen])

    w, cond = pool[:64], states[:64]
    with th.no_grad():
        repeated = cond.repeat_interleave(pool_size, dim=0)
        ours = critic.get_ucb_q(cond, flow.executed(flow.decode(cond, w, 2)), 1.0).flatten()
        theirs = plain_ucb(heads, repeated, flow.executed(plain_decode(flow.net, repeated, w.flatten(0, 1), 2)), 1.0)
    error = (ours - theirs).abs().max().item()
    slow = side_by_side(
        {"plain": plain, "fresh, 8 steps": lambda: fresh(8), "fresh, 2 steps": lambda: fresh(2)},
        max(1, args.repeats // 2),
        args.device,
    )

    def ten_cached() -> None:
        for _ in range(10):
            cached()

    quick = side_by_side({"cached": ten_cached}, args.repeats, args.device)["cached"] / 10
    # building the pools is decoding and scoring, at the rate of the fresh iterations
    building = n_states * pool_size / (batch * M) * (slow["fresh, 8 steps"] - quick)
    whole = building + n_iterations * quick
    return {
        "plain_iteration_s": slow["plain"],
        "iteration_s": slow["fresh, 8 steps"],
        "iteration_2step_s": slow["fresh, 2 steps"],
        "cached_iteration_s": quick,
        "building_pools_s": building,
        "stage1_iteration_speedup": slow["plain"] / slow["fresh, 8 steps"],
        "stage1_iteration_2step_speedup": slow["plain"] / slow["fresh, 2 steps"],
        "stage1_30k_speedup": n_iterations * slow["plain"] / whole,
        "max_score_error": error,
    }


def bench_success(args: Args, flow: FlowPolicy, demos: Any) -> dict[str, float]:
    """Part b: stage 1 from the same demos with fresh and with cached candidates; what the policies are worth."""
    env = make_latent_env(args.env_id, flow, n_envs=8)
    result = {"prior": evaluate("prior", env, 96).success_at_end}
    for name, pool_size in (("fresh candidates", None), ("cached candidates", 64)):
        start = time.perf_counter()
        policy = pretrain_latent(
            flow,
            demos,
            weighting="candidates",
            pool_size=pool_size,
            beta=0.3,
            n_iterations=500,
            batch_size=64,
            seed=0,
            progress_bar=True,
        )
        result[f"{name}, seconds"] = time.perf_counter() - start
        outcome = evaluate(policy, env, 96)
        result[name], result[f"{name}, ci_low"], result[f"{name}, ci_high"] = (
            outcome.success_at_end,
            outcome.ci_low,
            outcome.ci_high,
        )
    env.close()
    return result

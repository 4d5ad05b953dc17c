"""What steering costs beside the physics, and what the fast code gains over a plain version of the same thing.

    python examples/benchmark.py

Everything is measured side by side in one run, medians of several repeats; only the ratios mean anything, since the speed of
a machine drifts. The table goes to the terminal, the figures to runs/bench/report.json.
"""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import psutil
import torch as th
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from torch.nn import functional as F

from sb3_dsrl import (
    ActionChunkWrapper,
    FlowPolicy,
    LatentPolicy,
    VecLatentSteering,
    VelocityMLP,
    WorkerSettings,
    aw_mle_loss,
    demo_transitions,
    evaluate,
    load_demos,
    make_latent_env,
    ppo_kwargs,
    pretrain_latent,
    train_critic,
    train_flow,
)
from sb3_dsrl.policies.networks import EnsembleChunkCritic, VelocityNet
from sb3_dsrl.stage1.candidates import candidate_weights
from sb3_dsrl.steering.batched import BatchedChunkEnv
from sb3_dsrl.steering.steering import Steering

A, T, H, N_STEPS, M = 8, 16, 8, 8, 16
Timed = dict[str, float]


@dataclass
class Args:
    """Benchmark of decode, stage 1 and simulation."""

    env_id: str = "PushCube-v1"
    """ManiSkill task."""
    demo_path: Path = Path(__file__).parent / "demos" / "PushCube-v1.h5"
    """Demos for the flow of the simulation part."""
    output: Path = Path("runs/bench")
    """Folder for report.json."""
    repeats: int = 5
    """Repeats of each measurement; their median counts."""
    device: str = "cpu"
    """Device of decode and stage 1; with "cuda", compiled and bf16 decodes are measured too."""
    batches: tuple[int, ...] = (1, 8, 64, 256, 4096)
    """B of the decodes."""
    stage1_batch: int = 256
    """Observations in a batch of stage 1, with 16 candidates each."""
    simulate: bool = True
    """Measure the simulator too."""
    cuda_envs: tuple[int, ...] = ()
    """Measure physx_cuda with these numbers of envs; needs a GPU and SAPIEN's GPU PhysX library."""


# ------------------------------------------------------------------------------------------------ the plain versions


def plain_decode(net: VelocityNet, cond: th.Tensor, w: th.Tensor, n: int) -> th.Tensor:
    """A loop of full forward passes, the conditioning repeated for each."""
    d = th.full((len(w),), 1.0 / n, device=w.device)
    x = w
    for i in range(n):
        x = x + net(x, d * i, d, cond) / n
    return x.clamp(-1.0, 1.0)


def head_weights(critic: EnsembleChunkCritic) -> list[list[th.Tensor]]:
    """The parameters of each head."""
    return [[p[i] for p in critic.net.parameters()] for i in range(critic.n_heads)]


def plain_ucb(heads: list[list[th.Tensor]], cond: th.Tensor, chunk: th.Tensor, kappa: float) -> th.Tensor:
    """One critic head after the other."""
    q = []
    for head in heads:
        h = th.cat([cond, chunk.flatten(1)], dim=1)
        for weight, bias, scale, shift in zip(head[0:12:4], head[1:12:4], head[2:12:4], head[3:12:4], strict=True):
            h = F.mish(F.layer_norm(h @ weight + bias, bias.shape[-1:]) * scale + shift)
        q.append((h @ head[12] + head[13])[:, 0])
    scores = th.stack(q)
    return scores.mean(dim=0) - kappa * scores.std(dim=0, unbiased=False)


# ---------------------------------------------------------------------------------------------------------- measuring


def side_by_side(parts: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> Timed:
    """Median seconds of each part; the parts take turns, so that a slow minute of the machine hits them all."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if device != "cpu":
                th.cuda.synchronize()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def unet_flow(cond_dim: int, device: str) -> FlowPolicy:
    """The default U-Net, untrained."""
    th.manual_seed(0)
    return FlowPolicy.create(cond_dim, A, obs_horizon=1, pred_horizon=T, act_horizon=H, num_steps=N_STEPS).freeze().to(device)


def matmul_limit(repeats: int, device: str) -> float:
    """FLOP/s of a matrix product of the size that dominates the U-Net."""
    x, y = th.randn(1024, 1280, device=device), th.randn(1280, 256, device=device)
    timed = side_by_side({"matmul": lambda: [x @ y for _ in range(20)]}, repeats, device)
    return 20 * 2 * 1024 * 1280 * 256 / timed["matmul"]


def unet_flop(net: VelocityNet) -> float:
    """FLOP of one forward pass of one sample."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    p = next(net.parameters())
    x, t = th.randn(1, T, A, device=p.device), th.zeros(1, device=p.device)
    with counter:
        net(x, t, t, th.zeros(1, net.cond_dim, device=p.device))
    return float(counter.get_total_flops())


@th.no_grad()
def bench_decode(args: Args, limit: float) -> list[dict[str, Any]]:
    """Part a: decode against the plain loop."""
    rows = []
    for cond_dim in (64, 562):
        flow = unet_flow(cond_dim, args.device)
        flop = unet_flop(flow.net)
        for batch in args.batches:
            cond, w = th.randn(batch, cond_dim, device=args.device), th.randn(batch, T, A, device=args.device)
            # at large batches the time per sample is flat: half the steps tell the ratio
            steps = N_STEPS if batch <= 256 else 2
            parts: dict[str, Callable[[], Any]] = {
                "plain": lambda c=cond, w=w, n=steps, f=flow: plain_decode(f.net, c, w, n),  # type: ignore[misc]
                "ours": lambda c=cond, w=w, n=steps, f=flow: f.decode(c, w, n),  # type: ignore[misc]
                "ours, 2 steps": lambda c=cond, w=w, f=flow: f.decode(c, w, 2),  # type: ignore[misc]
            }
            if args.device != "cpu":
                quick = unet_flow(cond_dim, args.device).accelerate(th.bfloat16, dict(mode="reduce-overhead"))
                parts["compiled, bf16"] = lambda c=cond, w=w, n=steps, f=quick: f.decode(c, w, n)  # type: ignore[misc]
            timed = side_by_side(parts, args.repeats, args.device)
            error = (plain_decode(flow.net, cond, w, steps) - flow.decode(cond, w, steps)).abs().max().item()
            per_step = timed["ours"] / steps
            rows.append(
                {
                    "C": cond_dim,
                    "B": batch,
                    "plain_ms_per_step": 1e3 * timed["plain"] / steps,
                    "ours_ms_per_step": 1e3 * per_step,
                    "decode_speedup": timed["plain"] / timed["ours"],
                    "decode_2step_speedup": timed["plain"] * N_STEPS / steps / timed["ours, 2 steps"],
                    "plain_of_matmul_limit": flop * batch / (timed["plain"] / steps) / limit,
                    "ours_of_matmul_limit": flop * batch / per_step / limit,
                    "max_error": error,
                }
            )
            if "compiled, bf16" in timed:
                rows[-1]["compiled_bf16_speedup"] = timed["plain"] / timed["compiled, bf16"]
            print({key: round(value, 7 if key == "max_error" else 2) for key, value in rows[-1].items()}, flush=True)
    return rows


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


# --------------------------------------------------------------------------------------------------------- simulation


def raw_env(env_id: str, control_mode: str, obs_mode: str = "state") -> gym.Env:
    """A ManiSkill env as a user would make it for SB3."""
    import mani_skill.envs  # noqa: F401  registers the envs
    from mani_skill.utils.wrappers import CPUGymWrapper, FlattenRGBDObservationWrapper

    th.set_num_threads(1)
    env = gym.make(
        env_id,
        obs_mode=obs_mode,
        control_mode=control_mode,
        reward_mode="normalized_dense",
        sim_backend="physx_cpu",
        render_backend="none" if obs_mode == "state" else "cpu",
    )
    return CPUGymWrapper(env if obs_mode == "state" else FlattenRGBDObservationWrapper(env))


def raw_rate(env_id: str, control_mode: str, start: float, seconds: float = 5.0) -> float:
    """Env steps per second of a process that never waits for another one."""
    env = raw_env(env_id, control_mode)
    env.reset(seed=0)
    action = env.action_space.sample()
    while time.time() < start:
        env.step(action)
    steps = 0
    while time.time() < start + seconds:
        env.step(action)
        steps += 1
    return steps / seconds


def raw_ceiling(args: Args, flow: FlowPolicy) -> float:
    """What all cores together simulate when nothing connects them."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("forkserver").Pool(cores) as pool:
        return sum(pool.starmap(raw_rate, [(args.env_id, flow.control_mode, time.time() + 15.0)] * cores))


def bench_images(args: Args, flow: FlowPolicy, act_horizon: int = 8) -> dict[str, Any]:
    """A chunk env with images, which renders what is seen, against the same env with every frame rendered."""
    assert flow.control_mode is not None
    every = raw_env(args.env_id, flow.control_mode, "rgb")
    bare = gym.make(args.env_id, obs_mode="rgb", control_mode=flow.control_mode, sim_backend="physx_cpu", render_backend="cpu")
    seen = ActionChunkWrapper(bare, act_horizon, ignore_terminations=True)
    chunk = np.zeros((act_horizon, flow.action_dim), np.float32)
    every.reset(seed=0)
    seen.reset(seed=0)
    parts: dict[str, Callable[[], Any]] = {
        "every": lambda: [every.step(action) for _ in range(5) for action in chunk],
        "seen": lambda: [seen.step(chunk) for _ in range(5)],
    }
    timed = side_by_side(parts, args.repeats)
    every.close()
    seen.close()
    return {"image_speedup": timed["every"] / timed["seen"]}


def stock_workers(args: Args, flow: FlowPolicy, n_envs: int) -> VecEnv:
    """One stock worker process an env, one message an env step."""
    multiprocessing.set_forkserver_preload(["sb3_dsrl.envs.maniskill"])
    assert flow.control_mode is not None
    control_mode = flow.control_mode
    return SubprocVecEnv([lambda: raw_env(args.env_id, control_mode)] * n_envs, start_method="forkserver")


def bench_simulation(args: Args, flow: FlowPolicy, env_steps: int = 800) -> dict[str, Any]:
    """Part c: env steps per second of the latent env (prior noise) and of raw envs (random actions); memory of a worker."""
    ratios, rates = {}, {}
    for n_envs in (1, 2, 4, 8):
        stock, latent = stock_workers(args, flow, n_envs), make_latent_env(args.env_id, flow, n_envs)
        stock.reset()
        latent.reset()
        n = max(flow.act_horizon, env_steps // n_envs // flow.act_horizon * flow.act_horizon)

        def step_stock(env: VecEnv = stock, n: int = n) -> None:
            for _ in range(n):
                env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))

        def step_latent(env: VecEnv = latent, n: int = n) -> None:
            for _ in range(n // flow.act_horizon):
                env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))

        timed = side_by_side({"stock": step_stock, "latent": step_latent}, args.repeats)
        rates[n_envs] = {name: n * n_envs / seconds for name, seconds in timed.items()}
        ratios[n_envs] = timed["stock"] / timed["latent"]
        print(f"{n_envs} envs:", {name: round(rate) for name, rate in rates[n_envs].items()}, "env steps/s", flush=True)
        stock.close()
        latent.close()
    one_process = make_latent_env(args.env_id, flow, 8, workers=WorkerSettings(1))
    all_cores = make_latent_env(args.env_id, flow, 8)
    parts: dict[str, Callable[[], Any]] = {}
    for name, env in (("one", one_process), ("all", all_cores)):
        env.reset()
        w = np.zeros((8, *flow.noise_shape), np.float32)
        parts[name] = lambda env=env, w=w: [env.step(w) for _ in range(env_steps // 8 // flow.act_horizon)]  # type: ignore[misc]
    timed = side_by_side(parts, args.repeats)
    one_process.close()
    rss = [child.memory_info().rss / 2**20 for child in psutil.Process().children(recursive=True)]
    all_cores.close()
    return {
        "env_ratio": ratios,
        "env_steps_per_second": rates,
        "cores_gain": timed["one"] / timed["all"],
        "rss_mb_of_child_processes": sorted(rss, reverse=True),  # the workers first
    }


class Split(BaseCallback):
    """Where the wall time of ``learn`` goes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {"simulation": 0.0, "decode": 0.0, "update": 0.0}

    def watch(self, env: VecLatentSteering, model: PPO) -> None:
        """Times the parts of an env and a model."""
        self._time(env.venv, "step_wait", "simulation")
        self._time(env.steering, "chunk", "decode")
        self._time(model, "train", "update")

    def _time(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    def _on_step(self) -> bool:
        return True


def bench_learning(args: Args, flow: FlowPolicy) -> dict[str, Any]:
    """Part c: the split of wall time while stock PPO learns with the quickstart's flow; part d: rollout buffers."""
    shares: list[dict[str, float]] = []
    env = make_latent_env(args.env_id, flow, n_envs=8, seed=0)
    for _ in range(args.repeats):
        model = PPO("LatentPolicy", env, **ppo_kwargs(env))
        split = Split()
        split.watch(env, model)
        start = time.perf_counter()
        model.learn(model.n_steps * 8, callback=split)
        total = time.perf_counter() - start
        share = {part: seconds / total for part, seconds in split.seconds.items()}
        shares.append(share | {"rest": 1 - sum(share.values())})
        del env.venv.step_wait, env.steering.chunk  # type: ignore[attr-defined]
    env.close()
    buffer = model.rollout_buffer
    arrays = ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns", "episode_starts")
    n_bytes = sum(getattr(buffer, name).nbytes for name in arrays)
    macro_steps = buffer.buffer_size * buffer.n_envs
    image_features = 2 * (256 + 35)  # two frames of 256 image features and the state
    images = 2 * 128 * 128 * 3
    return {
        "split": {part: statistics.median(share[part] for share in shares) for part in shares[0]},
        "decode_share": statistics.median(share["decode"] for share in shares),
        "rollout_buffer_bytes": {
            "macro_steps": macro_steps,
            "state": n_bytes,
            "rgb features": n_bytes + 4 * macro_steps * (image_features - flow.cond_dim),
            "rgb images (not stored)": n_bytes + macro_steps * images,
        },
    }


class BatchedToy(gym.Env):
    """A batched simulator in a few tensor operations, whose cost per env step is nearly nothing: what remains is ours."""

    def __init__(self, n_envs: int, device: str) -> None:
        self.num_envs, self.device = n_envs, th.device(device)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (35,), np.float32)
        self.single_action_space = gym.spaces.Box(-1, 1, (A,), np.float32)
        self._state = th.zeros(n_envs, 35, device=device)
        self._t = th.zeros(n_envs, device=device)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[th.Tensor, dict[str, Any]]:
        """All envs, or a part."""
        index = (options or {}).get("env_idx", slice(None))
        self._state[index], self._t[index] = 0.0, 0.0
        return self._state, {}

    def step(self, action: th.Tensor) -> tuple[Any, ...]:
        """Moves the state by the action."""
        self._state[:, :A] += 0.1 * action
        self._t += 1
        success = self._state[:, 0] > 1
        return self._state, -self._state[:, 0].abs(), success, self._t >= 50, {"success": success}


def bench_growth(args: Args, flow: FlowPolicy) -> dict[str, Any]:
    """Part e: cost per env step as the number of batched envs grows."""
    parts: dict[str, Callable[[], Any]] = {}
    cost = {}
    sizes = (1, 2, 4, 8, 16, 32, 64)
    for n in sizes:
        chunks = BatchedChunkEnv(BatchedToy(n, args.device), flow.act_horizon, flow.obs_horizon)
        env = VecLatentSteering(chunks, flow)
        env.reset()
        w = np.zeros((n, *flow.noise_shape), np.float32)
        parts[str(n)] = lambda env=env, w=w: [env.step(w) for _ in range(20)]  # type: ignore[misc]
    for name, seconds in side_by_side(parts, args.repeats, args.device).items():
        cost[name] = 1e6 * seconds / (20 * int(name) * flow.act_horizon)
    return {"us_per_env_step": cost, "growth_64_over_8": cost["64"] / cost["8"]}


def bench_cuda(args: Args, flow: FlowPolicy) -> dict[str, Any]:
    """Part e on a GPU simulator: latent env steps per second over raw ManiSkill env steps per second."""
    import mani_skill.envs  # noqa: F401  registers the envs

    result = {}
    for n in args.cuda_envs:
        raw = gym.make(
            args.env_id,
            num_envs=n,
            obs_mode="state",
            control_mode=flow.control_mode,
            reward_mode="normalized_dense",
            sim_backend="physx_cuda",
        )
        raw.reset(seed=0)
        action = th.zeros(n, flow.action_dim, device="cuda")
        latent = make_latent_env(args.env_id, flow, n, sim_backend="physx_cuda")
        latent.reset()
        w = np.zeros((n, *flow.noise_shape), np.float32)
        timed = side_by_side(
            {
                "raw": lambda env=raw, a=action: [env.step(a) for _ in range(10 * flow.act_horizon)],  # type: ignore[misc]
                "latent": lambda env=latent, w=w: [env.step(w) for _ in range(10)],  # type: ignore[misc]
            },
            args.repeats,
            "cuda",
        )
        result[str(n)] = timed["raw"] / timed["latent"]
        raw.close()
        latent.close()
    return {"cuda_env_ratio": result}


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


def table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows."""
    print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False, float_format='{:.3g}'.format)}", flush=True)


def main(args: Args) -> None:
    """Runs all parts and writes the report."""
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.time()
    limit = matmul_limit(args.repeats, args.device)
    report: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch": th.__version__},
        "device": args.device if args.device == "cpu" else th.cuda.get_device_name(),
        "threads": th.get_num_threads(),
        "matmul_gflops": limit / 1e9,
    }
    decode = bench_decode(args, limit)
    for key in ("decode_speedup", "decode_2step_speedup"):
        report[key] = {str(c): {str(row["B"]): row[key] for row in decode if row["C"] == c} for c in (64, 562)}
    report["decode"] = decode
    report |= bench_stage1(args)
    if args.simulate:
        demos = load_demos(args.demo_path)
        kwargs = dict(net_class=VelocityMLP, obs_horizon=2, pred_horizon=4, act_horizon=4, num_steps=4)
        flow = train_flow(demos, n_iterations=1_000, seed=0, progress_bar=True, **kwargs)  # type: ignore[arg-type]
        train_critic(flow, demo_transitions(flow, demos, ignore_terminations=True), n_iterations=300, progress_bar=True)
        th.set_num_threads(1)  # as in the quickstart: the other cores are for the simulators
        report |= bench_simulation(args, flow) | bench_learning(args, flow) | bench_growth(args, flow)
        report["raw_ceiling"] = raw_ceiling(args, flow)
        report |= bench_images(args, flow)
        th.set_num_threads(report["threads"])
        report["stage1_success"] = bench_success(args, flow, demos)
        if args.cuda_envs:
            report |= bench_cuda(args, flow.to(args.device))
    report["seconds"] = time.time() - start
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    table(f"decode, U-Net, T = {T}, against {limit / 1e9:.0f} GFLOP/s of a matrix product", decode)
    keys = [key for key in report if key.startswith("stage1_") and key.endswith("speedup")]
    table(f"stage 1, B = {args.stage1_batch}, M = {M}: times faster than plain", [{key: report[key] for key in keys}])
    if args.simulate:
        rows = [
            {"envs": n, **report["env_steps_per_second"][n], "env_ratio": ratio} for n, ratio in report["env_ratio"].items()
        ]
        table("env steps per second: latent env, and stock SubprocVecEnv with raw envs", rows)
        print(f"cores that step raw envs and never wait for each other: {report['raw_ceiling']:.0f} env steps/s")
        print(f"128 x 128 images, H = 8, one env: {report['image_speedup']:.1f} times the rate of rendering every step")
        print(f"8 envs in one worker a core over 8 envs in one worker: {report['cores_gain']:.2f}")
        table("wall time of learning, quickstart's flow", [report["split"]])
        table("us per env step beside the physics, batched envs", [report["us_per_env_step"]])
        print(f"64 envs over 8: {report['growth_64_over_8']:.2f}")
        table(
            "success at the end after stage 1 from demos, 500 iterations, fresh and cached candidates",
            [report["stage1_success"]],
        )
    print(f"\n{report['seconds']:.0f} s; all figures are in {args.output}/report.json")


if __name__ == "__main__":
    main(tyro.cli(Args))

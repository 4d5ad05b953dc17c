"""Where the wall time of learning goes, and what rollout buffers take."""

import statistics
import time
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from benchmark.measuring import Args
from sb3_dsrl import FlowPolicy, VecLatentSteering, make_latent_env, ppo_kwargs


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
    """Part c: the split of wall time while stock PPO learns with make demo's flow; part d: rollout buffers."""
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
        "stage2_share": {part: statistics.median(share[part] for share in shares) for part in shares[0]},
        "decode_share": statistics.median(share["decode"] for share in shares),
        "rollout_buffer_bytes": {
            "macro_steps": macro_steps,
            "state": n_bytes,
            "rgb features": n_bytes + 4 * macro_steps * (image_features - flow.cond_dim),
            "rgb images (not stored)": n_bytes + macro_steps * images,
        },
    }

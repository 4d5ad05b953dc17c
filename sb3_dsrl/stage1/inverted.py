"""The noises that make the flow do what demos did, weighted by the advantages of that.

Letters in shapes: ``n`` macro-steps, ``T`` = pred_horizon, ``H`` = act_horizon, ``A`` action dim, ``C`` features.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch as th

from sb3_dsrl.evaluation.rollouts import Rollouts
from sb3_dsrl.stage0.demos import Demos, chunk_transitions, played_steps
from sb3_dsrl.stage0.features import encode_demos
from sb3_dsrl.stage1.executed import ExecutedNoise
from sb3_dsrl.stage1.settings import InvertedSettings
from sb3_dsrl.steering.contract import ignores_terminations
from sb3_dsrl.steering.inverting import invert_executed
from sb3_dsrl.steering.steering import Steering


def inverted_noise(
    demos: Demos, rollouts: Rollouts | None, steering: Steering, settings: InvertedSettings, progress_bar: bool = False
) -> ExecutedNoise:
    """
    :param demos: whole episodes, each cut into chunks one after the other
    :param rollouts: of the flow; their noises are learned beside those of the demos, all against one value. None is the demos
        alone.
    :param steering: the flow, and how its noise is steered
    :param settings: of the weights
    :param progress_bar: show a progress bar
    :raises ValueError: if the demos hold no rewards or do not fit, the noise cannot be inverted, or no chunk is within the
        tolerance
    """
    macro_steps = demo_macro_steps(demos, rollouts, steering)
    found = invert_executed(steering, macro_steps.cond, macro_steps.chunk, demos.actions(), progress_bar)
    reached = found.error <= settings.tolerance
    if not reached.any():
        raise ValueError(
            f"{demos.path}: the flow makes none of its {len(reached)} chunks to tolerance={settings.tolerance:g} std of the "
            f"actions of any noise (smallest error {found.error.min():.2g}): nothing to learn from"
        )
    everything = replace(macro_steps, w=found.w)
    if rollouts is not None:
        everything = _joined(everything, rollouts)
        reached = th.cat([reached, th.ones(len(rollouts), dtype=th.bool)])
    noise = ExecutedNoise.of(everything, steering, settings)
    noise.weights = noise.weights * reached
    noise.weights /= noise.weights.mean()
    return noise


def demo_macro_steps(demos: Demos, rollouts: Rollouts | None, steering: Steering) -> Rollouts:
    """
    Demos as rollouts, but for their noise, which is 0. A demo that ends before the longest episode does, and not by a
    termination, is taken to stay as it ended: its last reward goes on for the rest. Otherwise it would look worse for being
    short.

    :param demos: with rewards
    :param rollouts: their contract and lengths count as well
    :param steering: the flow, and how it is steered
    :raises ValueError: if the demos hold no rewards or do not fit
    """
    contract, flow = steering.contract, steering.flow
    gamma, horizon = contract.gamma, flow.act_horizon
    ignore = ignores_terminations(demos.reward_mode, contract.ignore_terminations)
    encoded = encode_demos(flow, demos)
    raw = chunk_transitions(encoded, 1, horizon, gamma, ignore, contract.reward_scale)
    lengths = np.array([played_steps(episode, ignore) for episode in demos.episodes])
    first = np.cumsum(lengths) - lengths
    starts = [np.arange(0, length, horizon) for length in lengths.tolist()]
    index = np.concatenate([begin + steps for begin, steps in zip(first, starts, strict=True)])
    episode = np.repeat(np.arange(len(lengths)), [len(steps) for steps in starts])
    longest = max(lengths.max(), 0 if rollouts is None else horizon * np.bincount(rollouts.episode).max())
    reward = raw.reward[index]
    last = np.flatnonzero(np.append(np.diff(episode), 1))
    for i, demo, length in zip(last, demos.episodes, lengths.tolist(), strict=True):
        assert demo.rewards is not None  # chunk_transitions has looked
        goes_on = contract.reward_scale * demo.rewards[length - 1] * (gamma ** np.arange(longest - length)).sum()
        reward[i] += raw.discount[index[i]] * goes_on
    cond, next_cond = th.from_numpy(raw.obs[index, 0]), th.from_numpy(raw.next_obs[index, 0])
    return Rollouts(
        cond,
        th.zeros(len(index), *flow.noise_shape),
        th.from_numpy(raw.chunk[index]),
        th.from_numpy(reward),
        th.from_numpy(raw.discount[index]),
        next_cond,
        episode,
        np.array([demo.success is not None and bool(demo.success[-1]) for demo in demos.episodes]),
        env_steps=0,
        contract=contract,
    )


def _joined(first: Rollouts, second: Rollouts) -> Rollouts:
    cond, w, chunk, reward, discount, next_cond = (
        th.cat([getattr(first, name), getattr(second, name)])
        for name in ("cond", "w", "chunk", "reward", "discount", "next_cond")
    )
    episode = np.concatenate([first.episode, second.episode + first.episode[-1] + 1])
    success = np.concatenate([first.success_at_end, second.success_at_end])
    return Rollouts(cond, w, chunk, reward, discount, next_cond, episode, success, second.env_steps, second.contract)

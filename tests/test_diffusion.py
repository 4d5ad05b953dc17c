"""A diffusion policy decoded by DDIM, steered like a flow."""

from pathlib import Path

import numpy as np
import pytest
import torch as th

from sb3_dsrl import FlowPolicy, VelocityMLP, load_demos, train_flow
from sb3_dsrl.policies.diffusion import DiffusionPolicy
from tests.demo_files import scripted_episode, write_demos
from tests.envs import tiny_flow

N_LEVELS = 120


def untrained(num_steps: int = 5) -> DiffusionPolicy:
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        kwargs = dict(width=16, n_blocks=1, embed_dim=8)
        policy = DiffusionPolicy.create(3, 2, 2, 4, 3, net_class=VelocityMLP, net_kwargs=kwargs, num_steps=num_steps)
    assert isinstance(policy, DiffusionPolicy)
    return policy.freeze()


def alpha_bars() -> np.ndarray:
    """Cosine schedule of https://arxiv.org/abs/2102.09672, by hand."""
    f = np.cos((np.arange(N_LEVELS + 1) / N_LEVELS + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


@pytest.mark.parametrize("n", [1, 4, 8, 10])
def test_decode_is_ddim_by_hand(n: int) -> None:
    policy = untrained()
    cond, w = th.randn(3, 6), th.randn(3, 4, 2)
    bars, x = alpha_bars(), w.double()
    levels = [round(N_LEVELS - i * N_LEVELS / n) - 1 for i in range(n)]
    for i, k in enumerate(levels):
        t = th.full((3,), 1 - k / N_LEVELS)
        eps = policy.net(x.float(), t, th.zeros(3), cond).double()
        before = bars[levels[i + 1]] if i + 1 < n else 1.0
        clean = ((x - (1 - bars[k]) ** 0.5 * eps) / bars[k] ** 0.5).clamp(-1, 1)
        x = before**0.5 * clean + (1 - before) ** 0.5 * eps
    th.testing.assert_close(policy.decode(cond, w, num_steps=n), x.float().clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_candidates_decode_like_single_noises() -> None:
    policy = untrained()
    cond, w = th.randn(3, 6), th.randn(3, 5, 4, 2)
    together = policy.decode(cond, w)
    for m in range(5):
        th.testing.assert_close(together[:, m], policy.decode(cond, w[:, m]), atol=1e-5, rtol=1e-5)
    assert th.equal(policy.decode(cond, w), together)  # no noise of its own


@pytest.mark.parametrize("num_steps", [0, 7, 240])
def test_num_steps_out_of_range(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps must divide 120, found {num_steps}"):
        untrained().decode(th.zeros(1, 6), th.zeros(1, 4, 2), num_steps=num_steps)


def test_round_trip_and_the_wrong_class(tmp_path: Path) -> None:
    policy = untrained()
    policy.save_pretrained(tmp_path / "ddim")
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "ddim")
    assert isinstance(loaded, DiffusionPolicy) and loaded.fingerprint() == policy.fingerprint()
    cond, w = th.randn(3, 6), th.randn(3, 4, 2)
    assert th.equal(loaded.decode(cond, w), policy.decode(cond, w))
    assert type(FlowPolicy.from_pretrained(tmp_path / "ddim")) is DiffusionPolicy  # what the scripts call
    tiny_flow().save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match=r"it was saved by FlowPolicy: load it with FlowPolicy.from_pretrained"):
        DiffusionPolicy.from_pretrained(tmp_path / "flow")


def test_loss_has_no_consistency(tmp_path: Path) -> None:
    demos = write_demos(tmp_path / "demos.h5", [scripted_episode(6)])
    with pytest.raises(ValueError, match=r"holds \['consistency_fraction'\], but DiffusionPolicy.imitation_loss takes none"):
        train_flow(demos, untrained(), loss_kwargs=dict(consistency_fraction=0.2))


def test_stage_0_learns_both_modes(tmp_path: Path) -> None:
    """Actions are +0.5 or -0.5 for a whole episode, the observation does not say which: each noise decodes to one of them."""
    episodes = []
    for i in range(16):
        actions = np.full((20, 2), 0.5 if i % 2 else -0.5, np.float32)
        episodes.append(dict(obs=np.zeros((21, 3), np.float32), actions=actions, rewards=np.zeros(20, np.float32)))
    demos = load_demos(write_demos(tmp_path / "demos.h5", episodes, "pd_joint_pos", "pd_joint_pos"))
    policy = train_flow(
        demos,
        policy_class=DiffusionPolicy,
        net_class=VelocityMLP,
        net_kwargs=dict(width=64, n_blocks=2),
        pred_horizon=4,
        act_horizon=4,
        num_steps=10,
        n_iterations=600,
        seed=0,
    )
    assert isinstance(policy, DiffusionPolicy)
    chunks = policy.sample(np.zeros((200, 2, 3), np.float32))
    sign = chunks.mean(dim=(1, 2)).sign()
    assert 0.25 < (sign > 0).float().mean() < 0.75
    assert (chunks - 0.5 * sign[:, None, None]).abs().mean() < 0.1

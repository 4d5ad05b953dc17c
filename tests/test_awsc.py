"""Checkpoints of AWShortCutFlowAgent, written by a plain re-implementation of its networks in their own layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_dsrl import FlowPolicy, LatentSteeringWrapper
from sb3_dsrl.policies.awsc import load_awsc_checkpoint
from sb3_dsrl.steering.scores import score_noises
from sb3_dsrl.steering.steering import Steering
from tests.envs import scripted

A, T, H, OBS_HORIZON, STATE, VISUAL = 2, 8, 4, 2, 5, 256
ASKED: dict[str, Any] = dict(
    obs_horizon=OBS_HORIZON, pred_horizon=T, num_steps=8, control_mode="pd_ee_delta_pose", gamma=0.9, reward_scale=2.0
)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, cond: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for c in (c_in, c_out):
            half = nn.Module()
            half.block = nn.Sequential(
                nn.Conv1d(c, c_out, kernel, padding=kernel // 2), nn.GroupNorm(groups, c_out), nn.Mish()
            )
            self.blocks.append(half)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond, 2 * c_out))
        self.residual_conv = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.c_out = c_out

    def forward(self, x: th.Tensor, cond: th.Tensor) -> th.Tensor:
        embed = self.cond_encoder(cond).reshape(-1, 2, self.c_out, 1)
        h = embed[:, 0] * self.blocks[0].block(x) + embed[:, 1]
        return self.blocks[1].block(h) + self.residual_conv(x)


def resample(conv: nn.Module) -> nn.Module:
    holder = nn.Module()
    holder.conv = conv
    return holder


class UNet(nn.Module):
    def __init__(self, cond: int, widths: list[int], kernel: int, groups: int, embed: int) -> None:
        super().__init__()
        self.embed = embed
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(embed, 4 * embed), nn.Mish(), nn.Linear(4 * embed, embed)
        )
        cond += embed
        pairs = list(zip([A, *widths[:-1]], widths, strict=True))
        self.down_modules = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(pairs):
            last = i == len(pairs) - 1
            down = nn.Identity() if last else resample(nn.Conv1d(c_out, c_out, 3, 2, 1))
            blocks = [Block(c_in, c_out, cond, kernel, groups), Block(c_out, c_out, cond, kernel, groups)]
            self.down_modules.append(nn.ModuleList([*blocks, down]))
        self.mid_modules = nn.ModuleList([Block(widths[-1], widths[-1], cond, kernel, groups) for _ in range(2)])
        self.up_modules = nn.ModuleList()
        for c_in, c_out in reversed(pairs[1:]):
            blocks = [Block(2 * c_out, c_in, cond, kernel, groups), Block(c_in, c_in, cond, kernel, groups)]
            self.up_modules.append(nn.ModuleList([*blocks, resample(nn.ConvTranspose1d(c_in, c_in, 4, 2, 1))]))
        first = nn.Module()
        first.block = nn.Sequential(
            nn.Conv1d(widths[0], widths[0], kernel, padding=kernel // 2), nn.GroupNorm(groups, widths[0]), nn.Mish()
        )
        self.final_conv = nn.Sequential(first, nn.Conv1d(widths[0], A, 1))

    def forward(self, x: th.Tensor, timestep: int, cond: th.Tensor) -> th.Tensor:
        half = self.embed // 2
        angles = timestep * th.exp(-math.log(10000) / (half - 1) * th.arange(half))
        step = self.diffusion_step_encoder(th.cat([angles.sin(), angles.cos()]))
        cond = th.cat([step.expand(len(x), -1), cond], dim=1)
        h, skips = x.transpose(1, 2), []
        for block1, block2, down in self.down_modules:
            h = block2(block1(h, cond), cond)
            skips.append(h)
            h = down.conv(h) if hasattr(down, "conv") else h
        for block in self.mid_modules:
            h = block(h, cond)
        for block1, block2, up in self.up_modules:
            h = up.conv(block2(block1(th.cat([h, skips.pop()], dim=1), cond), cond))
        first, last = self.final_conv
        return last(first.block(h)).transpose(1, 2)


def velocity_net(cond: int) -> nn.Module:
    net = nn.Module()
    net.unet = UNet(cond, [16, 32], 5, 8, 16)
    net.step_size_embed = nn.Sequential(nn.Linear(1, 16), nn.Mish(), nn.Linear(16, 16))
    net.combine_embed = nn.Linear(32, 16)
    return net


def q_net(cond: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in in (H * A + cond, 32, 32):
        layers += [nn.Linear(n_in, 32), nn.LayerNorm(32), nn.Mish()]
    return nn.Sequential(*layers, nn.Linear(32, 1))


def visual_encoder(channels: int) -> nn.Module:
    net, layers = nn.Module(), []
    for c_in, c_out in ((channels, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2)]
    net.cnn = nn.Sequential(*layers, nn.Conv2d(128, 128, 1), nn.ReLU())
    net.fc = nn.Sequential(nn.Linear(128, VISUAL), nn.ReLU())
    return net


class Agent(nn.Module):
    def __init__(self, cond: int, heads: int | None) -> None:
        super().__init__()
        self.velocity_net, self.velocity_net_ema = velocity_net(cond), velocity_net(cond)
        for name in ("critic", "critic_target"):
            critic = nn.Module()
            if heads is None:
                critic.q1_net, critic.q2_net = q_net(cond), q_net(cond)
            else:
                critic.q_nets = nn.ModuleList(q_net(cond) for _ in range(heads))
            setattr(self, name, critic)
        for parameter in self.parameters():  # nothing may be left at 0 or 1
            nn.init.normal_(parameter, std=0.2)


class Checkpoint:
    """A file and the networks in it."""

    def __init__(self, path: Path, images: bool = False, heads: int | None = 3, online: bool = False) -> None:
        th.manual_seed(1)
        cond = OBS_HORIZON * (STATE + VISUAL * images)
        self.visual = visual_encoder(6) if images else None
        self.used, other = Agent(cond, heads), Agent(cond, heads)
        self.path = path
        self.file: dict[str, Any] = (
            {"agent": self.used.state_dict()}
            if online
            else {
                "agent": other.state_dict(),
                "ema_agent": self.used.state_dict(),
            }
        )
        if online or self.visual is not None:
            self.file["visual_encoder"] = None if self.visual is None else self.visual.state_dict()
        self.save()

    def save(self) -> None:
        th.save(self.file, self.path)

    @th.no_grad()
    def features(self, obs: Any) -> th.Tensor:
        if self.visual is None:
            return obs.flatten(1)
        rows = []
        for i in range(OBS_HORIZON):
            images = obs["rgb"][:, i].permute(0, 3, 1, 2).float() / 255
            pooled = self.visual.cnn(images).amax(dim=(2, 3))
            rows += [self.visual.fc(pooled), obs["state"][:, i]]
        return th.cat(rows, dim=1)

    @th.no_grad()
    def act(self, cond: th.Tensor, w: th.Tensor, n: int) -> th.Tensor:
        x = w
        for i in range(n):
            x = x + self.used.velocity_net_ema.unet(x, math.floor(100 * i / n + 1e-6), cond) / n
        return x.clamp(-1, 1)

    @th.no_grad()
    def q(self, cond: th.Tensor, chunk: th.Tensor) -> th.Tensor:
        critic = self.used.critic
        nets = critic.q_nets if hasattr(critic, "q_nets") else [critic.q1_net, critic.q2_net]
        return th.stack([net(th.cat([chunk.flatten(1), cond], dim=1))[:, 0] for net in nets])


@pytest.mark.parametrize("heads", [3, None], ids=["ensemble", "double q"])
@pytest.mark.parametrize("images", [False, True], ids=["state", "rgb, two cameras"])
@pytest.mark.parametrize("online", [False, True], ids=["offline stage", "online stage"])
def test_same_as_the_agent(tmp_path: Path, images: bool, heads: int | None, online: bool) -> None:
    checkpoint = Checkpoint(tmp_path / "agent.pt", images, heads, online)
    flow = load_awsc_checkpoint(checkpoint.path, **ASKED, image_size=(32, 48))
    assert (flow.act_horizon, flow.obs_horizon, flow.pred_horizon, flow.action_dim) == (H, OBS_HORIZON, T, A)
    assert (flow.gamma, flow.reward_scale, flow.control_mode, flow.num_steps) == (0.9, 2.0, "pd_ee_delta_pose", 8)
    assert flow.obs_mode == ("rgb" if images else "state") and flow.action_offset == OBS_HORIZON - 1
    obs: Any = th.randn(6, OBS_HORIZON, STATE)
    if images:
        obs = {"state": obs, "rgb": th.randint(0, 256, (6, OBS_HORIZON, 32, 48, 6), dtype=th.uint8)}
    cond, w = checkpoint.features(obs), th.randn(6, T, A)
    th.testing.assert_close(flow.encode(obs), cond, atol=1e-6, rtol=1e-6)
    for n in (1, 2, 3, 8, 10):
        th.testing.assert_close(flow.decode(cond, w, num_steps=n), checkpoint.act(cond, w, n), atol=1e-5, rtol=1e-5)
    chunk = checkpoint.act(cond, w, 8)
    executed = chunk[:, OBS_HORIZON - 1 : OBS_HORIZON - 1 + H]
    assert th.equal(flow.executed(chunk), executed)
    assert flow.critic is not None
    scored = chunk[:, :H]  # the agent's own slice: its critic scores from the oldest frame on
    assert th.equal(flow.scored(chunk, flow.critic), scored)
    th.testing.assert_close(flow.critic(cond, scored), checkpoint.q(cond, scored), atol=1e-5, rtol=1e-5)

    flow.save_pretrained(tmp_path / "flow")
    again = FlowPolicy.from_pretrained(tmp_path / "flow")
    assert th.equal(again.decode(again.encode(obs), w), flow.decode(flow.encode(obs), w))
    assert again.fingerprint() == flow.fingerprint()
    assert again.critic is not None and again.critic.first_action == 0 and not again.encoder.normalizes


def test_scores_of_noises_are_the_agents(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "agent.pt")
    flow = load_awsc_checkpoint(checkpoint.path, **ASKED)
    assert flow.critic is not None
    cond, w = th.randn(6, flow.cond_dim), th.randn(6, 3, T, A)
    found = score_noises(Steering(flow), flow.critic, cond, w, kappa=0.5)
    for m in range(3):
        q = checkpoint.q(cond, checkpoint.act(cond, w[:, m], 8)[:, :H])
        th.testing.assert_close(found[:, m], q.mean(dim=0) - 0.5 * q.std(dim=0, unbiased=False), atol=1e-4, rtol=1e-4)


def test_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Checkpoint(tmp_path / "agent.pt").path
    assert load_awsc_checkpoint(path, **ASKED, device="meta").device.type == "meta"
    monkeypatch.setattr("sb3_dsrl.policies.awsc.get_device", lambda device: th.device({"auto": "meta"}[device]))
    assert load_awsc_checkpoint(path, **ASKED).device.type == "meta"


def test_state_dim_instead_of_obs_horizon(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "agent.pt")
    flow = load_awsc_checkpoint(checkpoint.path, **(ASKED | dict(obs_horizon=None, state_dim=STATE)))
    assert flow.obs_horizon == OBS_HORIZON


def test_steered_run(tmp_path: Path) -> None:
    """From the file to a steered env: the executed rows start at action_offset."""
    checkpoint = Checkpoint(tmp_path / "agent.pt")
    flow = load_awsc_checkpoint(checkpoint.path, **(ASKED | dict(num_steps=2)))
    base: Any = scripted(obs_dim=STATE, action_dim=A, episode_lengths=(100,))
    env = LatentSteeringWrapper(base, flow, gamma=0.9)
    features, _ = env.reset(seed=0)
    w = th.randn(T, A, generator=th.Generator().manual_seed(0))
    env.step(w.numpy())
    chunk = checkpoint.act(th.as_tensor(features)[None], w[None], 2)[0]
    th.testing.assert_close(
        th.tensor(base.unwrapped.actions), chunk[OBS_HORIZON - 1 : OBS_HORIZON - 1 + H], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["pred_horizon", "num_steps", "control_mode", "gamma", "reward_scale"])
def test_what_cannot_be_inferred_is_asked_for_by_name(tmp_path: Path, name: str) -> None:
    path = Checkpoint(tmp_path / "agent.pt").path
    with pytest.raises(ValueError, match=rf"agent.pt does not tell {name}: pass it"):
        load_awsc_checkpoint(path, **(ASKED | {name: None}))
    with pytest.raises(ValueError, match=rf"does not tell obs_horizon \(or state_dim\), {name}: pass them"):
        load_awsc_checkpoint(path, **(ASKED | {name: None, "obs_horizon": None}))

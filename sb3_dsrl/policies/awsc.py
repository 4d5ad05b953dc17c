"""Reads checkpoints of AWShortCutFlowAgent, the agent that the method was first written for, into a :class:`FlowPolicy`.

Such a ``.pt`` file is ``torch.save`` of ``{"agent", "ema_agent"[, "visual_encoder"]}`` state dicts, without configuration.
What the shapes tell is inferred, the rest is asked for. No code in the file is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch as th

from sb3_dsrl.policies.encoders import ImageEncoder, ObsEncoder, PlainConv, StateEncoder
from sb3_dsrl.policies.flow import FlowPolicy
from sb3_dsrl.policies.networks import EnsembleChunkCritic, TimestepEmbedding, VelocityUNet
from sb3_dsrl.utils.devices import get_device
from sb3_dsrl.utils.integrity import load_data

Tensors = Mapping[str, th.Tensor]

#: Prefixes in an agent's state dict that are known and not needed; also layers of the velocity net that it never used.
_UNUSED = re.compile(r"velocity_net\.|critic_target\.|velocity_net_ema\.(step_size_embed|combine_embed)\.")

#: From the names of VelocityUNet to those of the file.
_UNET_NAMES = (
    (r"^step_embedding\.mlp\.0", "diffusion_step_encoder.1"),
    (r"^step_embedding\.mlp\.2", "diffusion_step_encoder.3"),
    (r"^mid\.block1", "mid_modules.0"),
    (r"^mid\.block2", "mid_modules.1"),
    (r"^(down|up)\.(\d+)\.block1", r"\1_modules.\2.0"),
    (r"^(down|up)\.(\d+)\.block2", r"\1_modules.\2.1"),
    (r"^(down|up)\.(\d+)\.resample", r"\1_modules.\2.2.conv"),
    (r"\.conv1\.(\d)", r".blocks.0.block.\1"),
    (r"\.conv2\.(\d)", r".blocks.1.block.\1"),
    (r"\.film\.1", ".cond_encoder.1"),
    (r"\.skip", ".residual_conv"),
    (r"^outlet\.([01])", r"final_conv.0.block.\1"),
    (r"^outlet\.3", "final_conv.1"),
)


def load_awsc_checkpoint(
    path: str | Path,
    *,
    obs_horizon: int | None = None,
    state_dim: int | None = None,
    pred_horizon: int | None = None,
    num_steps: int | None = None,
    control_mode: str | None = None,
    gamma: float | None = None,
    reward_scale: float | None = None,
    env_id: str | None = None,
    image_size: tuple[int, int] = (128, 128),
    n_groups: int = 8,
    device: th.device | str = "auto",
) -> FlowPolicy:
    """
    Loads an AWShortCutFlowAgent checkpoint. The result is an ordinary, frozen :class:`FlowPolicy`.

    The weights are those that such checkpoints were selected by, ``ema_agent.velocity_net_ema`` with ``ema_agent.critic``;
    files of the agent's online stage have no ``ema_agent``, there it is the same in ``agent``. Observations are processed as
    that agent did: frames oldest first, [visual, state] in each, cameras on the channels, colours / 255, no normalisation.
    Execution starts at index ``obs_horizon - 1`` of the chunk; what the critic scores starts at index 0.

    :param path: the ``.pt`` file
    :param obs_horizon: frames that the policy saw; it or ``state_dim`` is needed
    :param state_dim: dimensions of the state part of one frame; it or ``obs_horizon`` is needed
    :param pred_horizon: T
    :param num_steps: inference steps
    :param control_mode: ManiSkill controller that the actions are for
    :param gamma: discount per env step that the critic was trained with
    :param reward_scale: factor on the rewards that the critic was trained with
    :param env_id: environment that the demos came from, if you want it checked
    :param image_size: (height, width) of the camera images
    :param n_groups: of the group norms in the U-Net
    :param device: where the policy goes; "auto" is a GPU where there is one
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is no such checkpoint, tensors are missing, superfluous or of other shapes, or something that
        cannot be inferred was not given
    """
    path = Path(path)
    needed: dict[str, object] = dict(
        pred_horizon=pred_horizon, num_steps=num_steps, control_mode=control_mode, gamma=gamma, reward_scale=reward_scale
    )
    missing = [name for name, value in needed.items() if value is None]
    if obs_horizon is None and state_dim is None:
        missing.insert(0, "obs_horizon (or state_dim)")
    if missing:
        raise ValueError(f"{path} does not tell {', '.join(missing)}: pass {'it' if len(missing) == 1 else 'them'}")
    assert pred_horizon is not None and num_steps is not None and gamma is not None and reward_scale is not None
    agent, visual = _read(path)

    unet = _part(agent, "velocity_net_ema.unet.")
    cond_encoder = _get(path, unet, "down_modules.0.0.cond_encoder.1.weight")
    widths = [
        len(_get(path, unet, f"down_modules.{i}.0.blocks.0.block.0.weight")) for i in range(_count(unet, "down_modules"))
    ]
    _, action_dim, kernel_size = _get(path, unet, "down_modules.0.0.blocks.0.block.0.weight").shape
    embed_dim = _get(path, unet, "diffusion_step_encoder.3.weight").shape[0]
    cond_dim = cond_encoder.shape[1] - embed_dim

    encoder = _encoder(path, visual, cond_dim, obs_horizon, state_dim, image_size)
    velocity = VelocityUNet(
        action_dim,
        pred_horizon,
        cond_dim,
        widths,
        kernel_size,
        n_groups,
        step_embedding=TimestepEmbedding(embed_dim),
    )
    names = {legacy_name(name): name for name in velocity.state_dict()}
    _load(path, velocity, {names.get(name, name): value for name, value in unet.items()}, "velocity_net_ema.unet", names)
    critic = _critic(path, agent, cond_dim, action_dim)
    flow = FlowPolicy(
        encoder,
        velocity,
        critic,
        act_horizon=critic.config["act_horizon"],
        num_steps=num_steps,
        action_offset=encoder.obs_horizon - 1,
        env_id=env_id,
        obs_mode="state" if visual is None else "rgb",
        control_mode=control_mode,
        gamma=gamma,
        reward_scale=reward_scale,
    )
    return flow.to(get_device(device)).freeze()


def _read(path: Path) -> tuple[Tensors, Tensors | None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected an AWShortCutFlowAgent checkpoint (.pt)")
    file = load_data(path)
    name = "ema_agent" if isinstance(file, dict) and "ema_agent" in file else "agent"
    if not (isinstance(file, dict) and isinstance(file.get(name), dict)):
        found = sorted(map(str, file)) if isinstance(file, dict) else type(file).__name__
        raise ValueError(f"{path} holds {found}, expected the state dicts 'agent', 'ema_agent' and perhaps 'visual_encoder'")
    agent, visual = file[name], file.get("visual_encoder")
    for where, state in ((name, agent), ("visual_encoder", visual or {})):
        bad = [key for key, value in state.items() if not isinstance(value, th.Tensor)]
        if bad:
            raise ValueError(f"{path}: {where}.{bad[0]} is a {type(state[bad[0]]).__name__}, expected a tensor")
    unknown = [key for key in agent if not re.match(r"velocity_net_ema\.unet\.|critic\.", key) and not _UNUSED.match(key)]
    if unknown:
        raise ValueError(f"{path}: {name} holds {unknown[0]!r}, which an AWShortCutFlowAgent does not have")
    return agent, visual


def _part(state: Tensors, prefix: str) -> dict[str, th.Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _count(state: Tensors, name: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


def _get(path: Path, state: Tensors, name: str) -> th.Tensor:
    if name not in state:
        raise ValueError(f"{path} has no tensor {name!r}; expected an AWShortCutFlowAgent checkpoint")
    return state[name]


def legacy_name(name: str) -> str:
    """
    :param name: of a tensor of :class:`~sb3_dsrl.policies.networks.VelocityUNet`
    :return: its name in the checkpoint's U-Net
    """
    for pattern, replacement in _UNET_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _load(path: Path, net: th.nn.Module, state: Tensors, where: str, names: Mapping[str, str]) -> None:
    """Copies tensors into a network, every one of them or none."""
    theirs = {ours: name for name, ours in names.items()}
    own = net.state_dict()
    for problem, keys in (("has no", own.keys() - state.keys()), ("has an unknown", state.keys() - own.keys())):
        if keys:
            key = min(keys)
            raise ValueError(f"{path} {problem} tensor '{where}.{theirs.get(key, key)}'")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{path}: '{where}.{theirs.get(key, key)}' has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}"
            )
    net.load_state_dict(dict(state))


def _encoder(
    path: Path,
    visual: Tensors | None,
    cond_dim: int,
    obs_horizon: int | None,
    state_dim: int | None,
    image_size: tuple[int, int],
) -> ObsEncoder:
    visual_dim = 0 if visual is None else len(_get(path, visual, "fc.0.weight"))
    if obs_horizon is None:
        assert state_dim is not None
        obs_horizon = cond_dim // (visual_dim + state_dim)
    if state_dim is None:
        state_dim = cond_dim // max(obs_horizon, 1) - visual_dim
    if obs_horizon < 1 or state_dim < 0 or obs_horizon * (visual_dim + state_dim) != cond_dim:
        raise ValueError(
            f"{path} is conditioned on {cond_dim} features, which is not obs_horizon * ({visual_dim} visual + state_dim) with "
            f"obs_horizon={obs_horizon} and state_dim={state_dim}"
        )
    if visual is None:
        return StateEncoder(state_dim, obs_horizon, normalize=False)
    channels = _get(path, visual, "cnn.0.weight").shape[1]
    if channels % 3:
        raise ValueError(f"{path}: the visual encoder reads {channels} channels, expected 3 a camera (rgb)")
    backbone = PlainConv(channels, visual_dim)
    _load(path, backbone, visual, "visual_encoder", {})
    return ImageEncoder(state_dim, {"rgb": (*image_size, channels)}, backbone, obs_horizon, normalize=False)


def _critic(path: Path, agent: Tensors, cond_dim: int, action_dim: int) -> EnsembleChunkCritic:
    n_heads = _count(_part(agent, "critic."), "q_nets")
    prefixes = [f"critic.q_nets.{i}." for i in range(n_heads)] or ["critic.q1_net.", "critic.q2_net."]
    heads = [_part(agent, prefix) for prefix in prefixes]
    first = _get(path, agent, f"{prefixes[0]}0.weight")
    width, n_inputs = first.shape
    act_horizon, rest = divmod(n_inputs - cond_dim, action_dim)
    if rest or act_horizon < 1:
        raise ValueError(
            f"{path}: the critic has {n_inputs} inputs, expected {cond_dim} features and a multiple of {action_dim} actions"
        )
    critic = EnsembleChunkCritic(cond_dim, act_horizon, action_dim, len(heads), width, first_action=0)
    shapes = {name: tuple(value.shape[1:]) for name, value in critic.net.state_dict().items()}  # of one head
    state: dict[str, list[th.Tensor]] = {name: [] for name in shapes}
    for prefix, head in zip(prefixes, heads, strict=True):
        for name, found in state.items():
            value = _get(path, agent, prefix + name)
            expected = shapes[name]
            value = value.T if value.dim() == 2 else value[None]
            if value.shape != expected:
                raise ValueError(f"{path}: '{prefix}{name}' has shape {tuple(value.T.shape)}, expected {expected[::-1]}")
            found.append(value)
        if head.keys() - state.keys():
            raise ValueError(f"{path} has an unknown tensor '{prefix}{min(head.keys() - state.keys())}'")
    n_actions = act_horizon * action_dim
    stacked = {f"net.{name}": th.stack(values) for name, values in state.items()}
    inlet = stacked["net.0.weight"]  # there actions come first, here features do
    stacked["net.0.weight"] = th.cat([inlet[:, n_actions:], inlet[:, :n_actions]], dim=1)
    critic.load_state_dict({**stacked, "updates": th.tensor(1)})
    return critic

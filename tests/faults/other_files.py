"""Checkpoints that are no checkpoints: of AWShortCutFlowAgent, of latent policies, of PPO."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from safetensors.torch import save_file
from stable_baselines3 import PPO

from sb3_dsrl import LatentPolicy, Ticket, ppo_kwargs
from sb3_dsrl.policies.awsc import load_awsc_checkpoint
from sb3_dsrl.stage2.policy_file import read_policy_file, write_policy_file
from sb3_dsrl.steering.contract import Contract
from sb3_dsrl.utils.integrity import check_zip
from tests.envs import scripted, tiny_flow, vec_steered
from tests.faults.case import Case
from tests.faults.demo_files import flip, flip_contents
from tests.faults.flow_files import cut
from tests.test_awsc import ASKED, Checkpoint

NO_POLICY = " is no file of LatentPolicy.save, or it is damaged"
NO_CHECKPOINT = r" is not a checkpoint of tensors: it is damaged or holds code, which is never run"


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def agent(change: Callable[[dict[str, Any]], Any], **asked: Any) -> Callable[[Path], Any]:
    """Changes what is in an agent's checkpoint and loads it."""

    def play(folder: Path) -> None:
        checkpoint = Checkpoint(folder / "agent.pt")
        change(checkpoint.file)
        checkpoint.save()
        load_awsc_checkpoint(checkpoint.path, **(ASKED | asked))

    return play


def agent_file(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Changes the file of an agent and loads it."""

    def play(folder: Path) -> None:
        path = Checkpoint(folder / "agent.pt").path
        change(path)
        load_awsc_checkpoint(path, **ASKED)

    return play


def drop(key: str) -> Callable[[Path], Any]:
    return agent(lambda file: file["ema_agent"].pop(key))


def put(key: str, value: Any) -> Callable[[Path], Any]:
    return agent(lambda file: file["ema_agent"].update({key: value}))


def model(folder: Path) -> PPO:
    env = vec_steered(tiny_flow(), [scripted()])
    return PPO("LatentPolicy", env, **ppo_kwargs(env, n_steps=4, batch_size=4, policy_kwargs=dict(net_arch=[8])))


def policy_file(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Saves a latent policy, changes the file and loads it."""

    def play(folder: Path) -> None:
        path = folder / "stage1.pt"
        model(folder).policy.save(path)
        change(path)
        LatentPolicy.load(path)

    return play


def policy_content(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Changes what is in the file of a latent policy, constructor arguments and tensors, and loads it."""

    def edit(path: Path) -> None:
        config, tensors = read_policy_file(path)
        change(config, tensors)
        write_policy_file(path, config, tensors)

    return policy_file(edit)


def model_file(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Saves PPO, changes the file and looks whether it is whole."""

    def play(folder: Path) -> None:
        path = folder / "model.zip"
        model(folder).save(path)
        change(path)
        check_zip(path)

    return play


def code_in_agent(folder: Path) -> None:
    try:
        agent(lambda file: file["agent"].update({"velocity_net.evil": Malicious(folder / "hacked")}))(folder)
    finally:
        assert not (folder / "hacked").exists()


def pickle_in_place_of_policy(folder: Path) -> None:
    try:
        policy_file(lambda path: th.save(Malicious(folder / "hacked"), path))(folder)
    finally:
        assert not (folder / "hacked").exists()


def policy_with(**policy_kwargs: Any) -> Callable[[Path], Any]:
    """Saves a latent policy that was built with these."""

    def play(folder: Path) -> None:
        env = vec_steered(tiny_flow(), [scripted()])
        kwargs = ppo_kwargs(env, n_steps=4, batch_size=4, policy_kwargs=policy_kwargs)
        PPO("LatentPolicy", env, **kwargs).policy.save(folder / "stage1.pt")

    return play


class Unknown(th.nn.ReLU):
    """An activation that only this file knows."""


class UnknownOptimizer(th.optim.Adam):
    """An optimiser that only this file knows."""


def ticket(folder: Path) -> None:
    """A golden ticket whose noise was changed."""
    w = np.zeros((4, 2), np.float32)
    Ticket(w, 1.0, 1.0, 1, 1, np.ones((1, 1)), Contract("0123", 3, 0.99)).save_pretrained(folder)
    flip(folder / "ticket.safetensors", -1)
    Ticket.from_pretrained(folder)


CASES = [
    Case("ticket: bit flipped", ticket, "does not hold a valid Ticket: config.json or ticket.safetensors is damaged"),
    Case("agent: no file", agent_file(Path.unlink), "agent.pt does not exist; expected an AWSh", FileNotFoundError),
    Case("agent: empty file", agent_file(lambda path: path.write_bytes(b"")), "agent.pt" + NO_CHECKPOINT),
    Case("agent: text", agent_file(lambda path: path.write_text("not a checkpoint")), "agent.pt" + NO_CHECKPOINT),
    Case("agent: cut short", agent_file(cut), "agent.pt" + NO_CHECKPOINT),
    Case("agent: bit flipped", agent_file(flip_contents), "damaged: its part .* checksum"),
    Case("agent: code in the pickle", code_in_agent, r"agent.pt" + NO_CHECKPOINT + r" \(it holds posix.system\)"),
    Case(
        "agent: a list", agent_file(lambda path: th.save([1], path)), r"agent.pt holds list, expected the state dicts 'agent'"
    ),
    Case(
        "agent: no state dicts",
        agent(lambda file: (file.pop("agent"), file.pop("ema_agent"))),
        r"expected the state dicts 'agent', 'ema_agent'",
    ),
    Case(
        "agent: tensor missing",
        drop("velocity_net_ema.unet.mid_modules.0.blocks.1.block.1.bias"),
        r"has no tensor 'velocity_net_ema.unet.mid_modules.0",
    ),
    Case("agent: tensor of the critic missing", drop("critic.q_nets.1.4.weight"), "has no tensor 'critic.q_nets.1.4.weight'"),
    Case(
        "agent: tensor missing that tells sizes",
        drop("velocity_net_ema.unet.down_modules.0.0.cond_encoder.1.weight"),
        "has no tensor 'down_modules.0.0.cond_enc",
    ),
    Case("agent: tensor too many", put("velocity_net_ema.unet.extra", th.zeros(1)), "has an unknown tensor 'velocity_net_ema"),
    Case("agent: network too many", put("actor.weight", th.zeros(1)), "'actor.weight', which an AWShortCutFlowAgent does not"),
    Case(
        "agent: tensor of another shape",
        put("critic.q_nets.2.3.weight", th.zeros(3, 3)),
        r"'critic.q_nets.2.3.weight' has shape \(3, 3\), expected \(32, 32\)",
    ),
    Case(
        "agent: bias of another shape",
        put("velocity_net_ema.unet.final_conv.1.bias", th.zeros(7)),
        r"final_conv.1.bias' has shape \(7,\), expected \(2,\)",
    ),
    Case(
        "agent: critic that does not fit the flow",
        put("critic.q_nets.0.0.weight", th.zeros(32, 15)),
        "the critic has 15 inputs, expected 10 features and a multiple of 2",
    ),
    Case("agent: number in place of a tensor", put("critic.q_nets.0.0.weight", 3), "is a int, expected a tensor"),
    Case(
        "agent: another obs_horizon",
        agent(lambda file: None, obs_horizon=3),
        r"conditioned on 10 features, which is not obs_horizon \* \(0 visual \+ state_dim\)",
    ),
    Case("agent: another state_dim", agent(lambda file: None, state_dim=4), "with obs_horizon=2 and state_dim=4"),
    Case(
        "agent: pred_horizon too short",
        agent(lambda file: None, pred_horizon=4),
        r"act_horizon must lie in 1..3 \(pred_horizon - action_offset\), found 4",
    ),
    Case("agent: odd pred_horizon", agent(lambda file: None, pred_horizon=7), "pred_horizon must be a multiple of 2, found 7"),
    Case("agent: gamma not told", agent(lambda file: None, gamma=None), "agent.pt does not tell gamma: pass it"),
    Case("latent policy: no file", policy_file(Path.unlink), "stage1.pt does not exist; expected a fi", FileNotFoundError),
    Case("latent policy: text", policy_file(lambda path: path.write_text("not a policy")), "stage1.pt" + NO_POLICY),
    Case("latent policy: empty file", policy_file(lambda path: path.write_bytes(b"")), "stage1.pt" + NO_POLICY),
    Case("latent policy: cut short", policy_file(cut), "stage1.pt" + NO_POLICY),
    Case(
        "latent policy: bit flipped",
        policy_file(lambda path: flip(path, path.stat().st_size - 3)),
        "stage1.pt is damaged: its contents do not fit",
    ),
    Case("latent policy: a pickle", pickle_in_place_of_policy, "stage1.pt" + NO_POLICY),
    Case(
        "latent policy: other safetensors",
        policy_file(lambda path: save_file({"w": th.zeros(2)}, path)),
        "stage1.pt does not hold a LatentPolicy: it is a safetensors file without the header 'latent_policy'",
    ),
    Case(
        "latent policy: class that is not known",
        policy_content(lambda config, tensors: config.update(activation_fn="Unknown")),
        r"stage1.pt does not hold a LatentPolicy \(activation_fn='Unknown' is unknown\)",
    ),
    Case(
        "latent policy: an argument is missing",
        policy_content(lambda config, tensors: config.pop("action_space")),
        r"stage1.pt does not hold a LatentPolicy \('action_space'\)",
    ),
    Case(
        "latent policy: activation of one's own saved",
        policy_with(activation_fn=Unknown),
        "activation_fn=<class '.*Unknown'> cannot be saved: only names of torch, SB3 and this package",
    ),
    Case(
        "latent policy: optimiser of one's own saved",
        policy_with(optimizer_class=UnknownOptimizer, value_lr=None),
        "optimizer_class=<class '.*UnknownOptimizer'> cannot be saved: only names of torch, SB3 and this package",
    ),
    Case(
        "latent policy: tensor missing",
        policy_content(lambda config, tensors: tensors.pop("value_net.bias")),
        'stage1.pt does not hold a LatentPolicy .*Missing key.*"value_net.bias"',
    ),
    Case(
        "latent policy: tensor too many",
        policy_content(lambda config, tensors: tensors.update(surplus=th.zeros(1))),
        'stage1.pt does not hold a LatentPolicy .*Unexpected key.*"surplus"',
    ),
    Case(
        "latent policy: tensor of another shape",
        policy_content(lambda config, tensors: tensors.update({"value_net.bias": th.zeros(2)})),
        "stage1.pt does not hold a LatentPolicy .*size mismatch for value_net.bias",
    ),
    Case("PPO: no file", model_file(Path.unlink), "model.zip does not exist; expected a model", FileNotFoundError),
    Case("PPO: text", model_file(lambda path: path.write_text("no zip")), "model.zip is no zip file, or it is damaged or cut"),
    Case("PPO: cut short", model_file(cut), "model.zip is no zip file, or it is damaged or cut short"),
    Case("PPO: bit flipped", model_file(flip_contents), "model.zip .*damaged.*Bad CRC-32|model.zip is damaged: its part"),
]

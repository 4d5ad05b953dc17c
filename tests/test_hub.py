"""Model cards of flows, steered policies and tickets; a ticket's folder. Nothing here reaches for the network."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from huggingface_hub import ModelCard

from sb3_dsrl import EvalResult, FlowPolicy, SteeredPolicy, Ticket, evaluate, find_ticket, make_latent_env
from sb3_dsrl.policies.diffusion import DiffusionPolicy
from sb3_dsrl.utils.hub import HubModel
from tests.envs import ScriptedEnv, scripted, tiny_flow, vec_steered
from tests.models import shaken, small

ENV_ID = "Scripted-v0"
RESULTS = [
    EvalResult("prior", 200, 0.75, 0.5, 0.4314, 0.5686, 9.0, 50.0),
    EvalResult("stage2", 200, 1.0, 0.97, 0.9361, 0.9862, 30.0, 50.0),
]
KINDS = ("flow", "steered", "ticket")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register(ENV_ID, entry_point=ScriptedEnv, disable_env_checker=True)
    yield
    del gym.registry[ENV_ID]


def found_ticket(flow: FlowPolicy, **kwargs: Any) -> Ticket:
    return find_ticket(make_latent_env(ENV_ID, flow, **kwargs), rounds=((3, 2), (1, 2)))


@pytest.fixture
def models() -> dict[str, HubModel]:
    flow = tiny_flow(env_id=ENV_ID)
    steered = SteeredPolicy.of(shaken(small(make_latent_env(ENV_ID, flow))))
    return dict(flow=flow, steered=steered, ticket=found_ticket(flow))


@pytest.mark.parametrize("kind", KINDS)
def test_card(models: dict[str, Any], kind: str, tmp_path: Path) -> None:
    models[kind].save_pretrained(tmp_path, model_card_kwargs=dict(results=RESULTS, env_steps=123_456))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "sb3_dsrl" and "robotics" in card.data.tags
    assert card.data.model_name.endswith(f"for {ENV_ID}") and f"# {card.data.model_name}\n" in card.text
    found = [(r.dataset_name, r.metric_type, r.metric_name, r.metric_value) for r in card.data.eval_results]
    assert found == [
        (ENV_ID, "success_at_end", "success_at_end, prior", 0.5),
        (ENV_ID, "success_at_end", "success_at_end, stage2", 0.97),
    ]
    assert "| prior | 200 | 0.50 | 0.43 to 0.57 | 0.75 |\n| stage2 | 200 | 0.97 | 0.94 to 0.99 | 1.00 |" in card.text
    assert "123,456 env steps" in card.text and f"| task | {ENV_ID} |" in card.text


@pytest.mark.parametrize("kind", KINDS)
def test_card_without_figures(models: dict[str, Any], kind: str, tmp_path: Path) -> None:
    models[kind].save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "Results" not in card.text


def test_card_of_a_flow_without_a_task(tmp_path: Path) -> None:
    tiny_flow().save_pretrained(tmp_path, model_card_kwargs=dict(results=RESULTS))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "Flow policy" and "| task | unknown |" in card.text and "| prior | 200 |" in card.text


def test_contract_is_in_the_card(models: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("steered", "ticket"):
        text = models[kind].generate_model_card().text
        for name, value in models[kind].contract.as_dict().items():
            assert f"| {name} | {'none' if value is None else value} |" in text, name
    assert f"| fingerprint | {models['flow'].fingerprint()} |" in models["flow"].generate_model_card().text


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_card_says_of_loading_runs(models: dict[str, Any], kind: str, tmp_path: Path) -> None:
    models[kind].save_pretrained(tmp_path / kind)
    models["flow"].save_pretrained(tmp_path / "its")
    text = models[kind].generate_model_card(repo_id=str(tmp_path / kind)).text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = dict(obs=np.zeros(3, np.float32))
    exec(code.replace("path/to/its/flow", str(tmp_path / "its")), names)
    if kind == "steered":
        assert names["action"].shape == (2,)
    else:
        assert names["env"].action_space.shape == (4, 2)


def test_card_of_a_subclass_names_it() -> None:
    text = tiny_flow(policy_class=DiffusionPolicy).generate_model_card().text
    assert "from sb3_dsrl.policies.diffusion import DiffusionPolicy\n" in text and "DiffusionPolicy.from_pretrained(" in text


def test_a_card_that_is_there_stays(models: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Mine.")
    models["flow"].save_pretrained(tmp_path, model_card_kwargs=dict(results=RESULTS))
    assert (tmp_path / "README.md").read_text() == "Mine."


@pytest.mark.parametrize("kind", KINDS)
def test_push_to_hub(models: dict[str, Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the hub; the card says where it is loaded from, and it is."""

    class Api:
        def __init__(self, token: Any = None) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), dict(repo_id=repo_id))

        def upload_folder(self, folder_path: Path, repo_id: str, **kwargs: Any) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return "url"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.chdir(tmp_path)
    model = models[kind]
    assert model.push_to_hub("me/mine", model_card_kwargs=dict(results=RESULTS)) == "url"
    card = ModelCard.load(tmp_path / "me" / "mine" / "README.md")
    assert 'from_pretrained("me/mine")' in card.text and len(card.data.eval_results) == 2
    loaded = type(model).from_pretrained("me/mine")
    assert loaded.generate_model_card(repo_id="me/mine", results=RESULTS).text == card.text


# Tickets


def test_ticket_round_trip(tmp_path: Path) -> None:
    flow = tiny_flow(env_id=ENV_ID)
    ticket = found_ticket(flow, steer_mode="act_horizon")
    ticket.save_pretrained(tmp_path)
    loaded = Ticket.from_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "ticket.safetensors"}
    for field in fields(Ticket):
        np.testing.assert_equal(getattr(loaded, field.name), getattr(ticket, field.name), err_msg=field.name)
    env = make_latent_env(ENV_ID, flow, steer_mode="act_horizon")
    np.testing.assert_array_equal(loaded.noise_for(env), ticket.w)
    assert evaluate(loaded.noise_for(env), env, 2).episodes == 2


def test_a_ticket_is_for_one_flow() -> None:
    ticket = found_ticket(tiny_flow(env_id=ENV_ID))
    other = tiny_flow(seed=1)
    with pytest.raises(ValueError, match=f"The ticket has flow=.*, but the env has '{other.fingerprint()}'"):
        ticket.noise_for(vec_steered(other, [scripted()]))
    with pytest.raises(ValueError, match="The ticket has steer_mode='full', but the env has 'shared'"):
        ticket.noise_for(make_latent_env(ENV_ID, tiny_flow(), steer_mode="shared", allow_other_task=True))


def test_damaged_tickets(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json: expected a folder written by Ticket.save_pretrained"):
        Ticket.from_pretrained(tmp_path)
    found_ticket(tiny_flow(env_id=ENV_ID)).save_pretrained(tmp_path)
    path = tmp_path / "ticket.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"does not hold a valid Ticket: config.json or ticket.safetensors is damaged"):
        Ticket.from_pretrained(tmp_path)
    path.write_bytes(kept)
    config = json.loads((tmp_path / "config.json").read_text())
    for broken in (dict(config, episodes=99), {key: config[key] for key in config if key not in ("sha256", "env_id")}):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="does not hold a valid Ticket"):
            Ticket.from_pretrained(tmp_path)

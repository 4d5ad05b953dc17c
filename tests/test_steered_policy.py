"""A steered policy without its env: the same actions, and a folder that is complete on its own."""

import json
import pickletools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_dsrl import FlowPolicy, LatentPolicy, LatentSteeringWrapper, SteerablePolicy, SteeredPolicy, evaluate
from tests.envs import ScriptedEnv, gym_steered, scripted, tiny_flow
from tests.models import shaken, small, steered, weights


@pytest.fixture
def policy(env: Any) -> SteeredPolicy:
    return SteeredPolicy.of(shaken(small(env)))


def frames(n: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32))


# Playing


def played_with_the_wrapper(model: Any, flow: FlowPolicy, **kwargs: Any) -> list[np.ndarray]:
    inner = ScriptedEnv(episode_lengths=(100, 100), random_start=True)
    env = LatentSteeringWrapper(inner, flow, **kwargs)
    for episode in range(2):
        obs, _ = env.reset(seed=episode)
        for _ in range(5):
            obs, *_ = env.step(model.predict(obs, deterministic=True)[0])
    return inner.actions


@pytest.mark.parametrize("steer_mode", ["full", "act_horizon", "shared"])
@pytest.mark.parametrize("how", ["select_action", "predict"])
@pytest.mark.parametrize("obs_horizon", [1, 2, 5])
def test_it_acts_as_the_model_does_on_the_wrapped_env(steer_mode: Any, how: str, obs_horizon: int) -> None:
    """To the bit: frames, noise, its unsteered tail and its bounds, over two episodes."""
    flow = tiny_flow(obs_horizon=obs_horizon)
    kwargs = dict(steer_mode=steer_mode, noise_bound=0.1)  # some noise is clipped
    model = shaken(small(gym_steered(flow, [scripted()], **kwargs)))
    expected = played_with_the_wrapper(model, flow, **kwargs)
    policy = SteeredPolicy.of(model)
    env = ScriptedEnv(episode_lengths=(100, 100), random_start=True)
    for episode in range(2):
        policy.reset(seed=episode)
        obs, _ = env.reset(seed=episode)
        seen = [obs.copy()]
        for _ in range(5):
            chunk = policy.predict(seen) if how == "predict" else None
            seen = []
            for i in range(3):
                action = policy.select_action(obs) if chunk is None else chunk[i]
                obs, *_ = env.step(action)
                seen.append(obs.copy())
    np.testing.assert_array_equal(np.stack(env.actions), np.stack(expected))


@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluate_plays_it_as_the_model(env: Any, flow: FlowPolicy, deterministic: bool) -> None:
    model = shaken(small(env))
    rows = [
        evaluate(actor, steered(flow), 4, name="", deterministic=deterministic)
        for actor in (model, SteeredPolicy.of(model), "zero")
    ]
    assert rows[0] == rows[1] != rows[2]


def test_evaluate_refuses_it_where_it_does_not_belong(policy: SteeredPolicy, env: Any) -> None:
    with pytest.raises(ValueError, match="The model has flow="):
        evaluate(policy, steered(tiny_flow(seed=1)), 1)
    with pytest.raises(ValueError, match="A steered policy needs the flow's own features: pass the env below VecNormalize"):
        evaluate(policy, VecNormalize(env), 1)


def test_dict_observations() -> None:
    flow = tiny_flow(obs_horizon=1)
    flow.obs_shapes = {"state": (3,)}
    encode = flow.encode
    flow.encode = lambda obs: encode(obs["state"])  # type: ignore[method-assign]
    latent = shaken(small(steered(tiny_flow(obs_horizon=1)))).policy
    policy = SteeredPolicy(flow, latent)
    plain = SteeredPolicy(tiny_flow(obs_horizon=1), latent)
    (frame,) = frames(1)
    np.testing.assert_array_equal(policy.predict({"state": frame}), plain.predict(frame))
    np.testing.assert_array_equal(policy.predict([{"state": th.from_numpy(frame)}]), plain.predict([frame]))
    with pytest.raises(ValueError, match=r"A frame must have shape \{'state': \(3,\)\}, found \(3,\)"):
        policy.predict(frame)


def test_sampled_play(policy: SteeredPolicy) -> None:
    th.manual_seed(0)
    chunks = [policy.predict(frames(2), deterministic=False) for _ in range(2)]
    assert chunks[0].shape == (3, 2) and np.abs(chunks[0]).max() <= 1 and not np.array_equal(*chunks)
    policy.reset()
    assert np.array_equal(policy.select_action(frames(1)[0]), SteeredPolicy(policy.flow, policy.latent).predict(frames(1))[0])


def test_sample(policy: SteeredPolicy) -> None:
    obs = np.stack([frames(2, seed) for seed in range(5)])
    th.manual_seed(0)
    chunk, w, log_prob = policy.sample(obs)
    assert chunk.shape == (5, 3, 2) and w.shape == (5, 4, 2) and log_prob.shape == (5,)
    cond = policy.flow.encode(obs)
    th.testing.assert_close(log_prob, policy.latent.log_prob(cond, w).detach())
    th.testing.assert_close(chunk, policy.flow.executed(policy.flow.decode(cond, w.clamp(-4, 4))))
    th.manual_seed(0)
    assert th.equal(policy.sample(th.from_numpy(obs))[1], w)


@pytest.mark.parametrize(
    ("play", "sentence"),
    [
        (lambda policy: policy.predict([]), "predict needs at least the newest frame, found an empty list"),
        (lambda policy: policy.predict(np.zeros(4)), r"A frame must have shape \(3,\), found \(4,\)"),
        (lambda policy: policy.predict(np.full(3, np.nan)), "The observations .* are NaN or infinite"),
        (lambda policy: [policy.predict(np.zeros(3)) for _ in range(2)], "The flow sees 2 frames: pass a list of all frames"),
    ],
)
def test_frames_that_do_not_fit(policy: SteeredPolicy, play: Callable[[SteeredPolicy], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        play(policy)


# Making


def test_of_copies_the_latent_policy(env: Any, flow: FlowPolicy) -> None:
    model = shaken(small(env))
    policy = SteeredPolicy.of(model)
    before = weights(policy.latent)
    model.learn(16)
    assert weights(policy.latent) == before != weights(model.policy)
    assert policy.flow is flow and policy.contract == env.steering.contract


def test_of_takes_the_decoding_steps_of_the_env(flow: FlowPolicy, tmp_path: Path) -> None:
    small(steered(flow)).save(tmp_path / "model")
    cheaper = PPO.load(tmp_path / "model", env=steered(flow, num_steps=1))
    assert SteeredPolicy.of(cheaper).contract.num_steps == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda env: PPO("MlpPolicy", env, n_steps=8), "of expects a model with 'LatentPolicy', found ActorCriticPolicy"),
        (lambda env: small(VecNormalize(env)), "features that VecNormalize has normalised"),
        (lambda env: small(VecFrameStack(env, 2)), "without wrappers that change observations"),
    ],
)
def test_of_refuses(make: Callable[[Any], Any], sentence: str, env: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        SteeredPolicy.of(make(env))


def test_of_refuses_a_model_without_env(env: Any, tmp_path: Path) -> None:
    small(env).save(tmp_path / "model")
    with pytest.raises(ValueError, match="The model has no env, and its env holds the flow"):
        SteeredPolicy.of(PPO.load(tmp_path / "model"))
    assert SteeredPolicy.of(small(VecNormalize(env, norm_obs=False)))


def test_what_does_not_fit(flow: FlowPolicy, env: Any) -> None:
    latent = small(env).policy
    with pytest.raises(ValueError, match=f"contract is of flow {flow.fingerprint()}, but this is flow"):
        SteeredPolicy(tiny_flow(seed=1), latent)
    with pytest.raises(TypeError, match="flow must be a FlowPolicy"):
        SteeredPolicy(42, latent)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="latent must be a LatentPolicy, found str"):
        SteeredPolicy(flow, "latent")  # type: ignore[arg-type]
    plain = latent.copy(action_space=spaces.Box(-4, 4, (4, 2), np.float32))
    with pytest.raises(ValueError, match="latent must be made for a steered env"):
        SteeredPolicy(flow, plain)


# Files


def test_round_trip(policy: SteeredPolicy, tmp_path: Path) -> None:
    folder = tmp_path / "policies" / "lift"
    policy.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "flow", "latent.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["lift"]
    loaded = SteeredPolicy.from_pretrained(folder, device="cpu")
    assert loaded.contract == policy.contract and weights(loaded.latent) == weights(policy.latent)
    for seen in (frames(1), frames(3)):
        np.testing.assert_array_equal(loaded.predict(seen), policy.predict(seen))
    loaded.save_pretrained(folder)  # once more, over what is there
    assert weights(SteeredPolicy.from_pretrained(str(folder)).latent) == weights(policy.latent)


def test_it_plays_in_a_fresh_process(policy: SteeredPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "lift")
    code = (
        "import sys, numpy as np; from sb3_dsrl import SteeredPolicy; policy = SteeredPolicy.from_pretrained('lift'); "
        "np.save('chunk.npy', policy.predict([np.ones(3), np.zeros(3)]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "chunk.npy"), policy.predict([np.ones(3), np.zeros(3)]))


def test_there_is_no_pickle_in_it(policy: SteeredPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "lift")
    for path in (path for path in (tmp_path / "lift").rglob("*") if path.is_file()):
        assert path.suffix in (".json", ".safetensors", ".md")
        with pytest.raises(ValueError):
            pickletools.dis(path.read_bytes(), open("/dev/null", "w"))  # noqa: SIM115


def test_push_to_hub_uploads_the_whole_folder(policy: SteeredPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), dict(repo_id=repo_id))

        def upload_folder(self, folder_path: Path, repo_id: str, **kwargs: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "hub")
            uploaded["repo_id"] = repo_id
            return "url"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert policy.push_to_hub("me/lift") == "url" and uploaded["repo_id"] == "me/lift"
    assert weights(SteeredPolicy.from_pretrained(tmp_path / "hub").latent) == weights(policy.latent)
    monkeypatch.setattr("sb3_dsrl.utils.hub.snapshot_download", lambda repo_id, **kwargs: str(tmp_path / "hub"))
    assert weights(SteeredPolicy.from_pretrained("me/lift").latent) == weights(policy.latent)


def test_a_failed_save_leaves_no_half_folder(policy: SteeredPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LatentPolicy, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            policy.save_pretrained(tmp_path / "lift")
        assert not list(tmp_path.iterdir())
    policy.save_pretrained(tmp_path / "lift")
    (tmp_path / "lift" / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(LatentPolicy, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            policy.save_pretrained(tmp_path / "lift")
    assert [path.name for path in tmp_path.iterdir()] == ["lift"]
    SteeredPolicy.from_pretrained(tmp_path / "lift")
    policy.save_pretrained(tmp_path / "lift")
    assert (tmp_path / "lift" / "notes.txt").read_text() == "mine"


def replace_flow(folder: Path) -> None:
    tiny_flow(seed=1).save_pretrained(folder / "flow")


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["contract"]["noise_bound"] = 2.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (shutil.rmtree, FileNotFoundError, "lift is neither a folder .* nor a repository"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "lift holds no config.json: expected a folder"),
        (lambda folder: (folder / "latent.safetensors").unlink(), FileNotFoundError, "lift holds no latent.safetensors"),
        (lambda folder: shutil.rmtree(folder / "flow"), FileNotFoundError, "lift holds no flow: expected a folder"),
        (lambda folder: (folder / "flow" / "config.json").unlink(), FileNotFoundError, "flow holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "lift does not hold a valid SteeredPolicy: Exp"),
        (lambda folder: (folder / "config.json").write_text("[]"), ValueError, "config.json does not fit latent.safetensors"),
        (edit_config, ValueError, "config.json does not fit latent.safetensors"),
        (
            lambda folder: (folder / "latent.safetensors").write_text("x"),
            ValueError,
            "latent.safetensors is no file of Latent",
        ),
        (replace_flow, ValueError, "lift does not hold a valid SteeredPolicy: The contract is of flow"),
    ],
)
def test_damage(damage: Callable[[Path], Any], error: Any, sentence: str, policy: SteeredPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "lift")
    damage(tmp_path / "lift")
    with pytest.raises(error, match=sentence) as raised:
        SteeredPolicy.from_pretrained(tmp_path / "lift")
    assert "\n" not in str(raised.value)


class Foreign(SteerablePolicy):
    """A policy without a folder of its own."""

    def __init__(self) -> None:
        super().__init__(obs_shapes=(3,), obs_horizon=2, noise_shape=(4, 2), cond_dim=6, act_horizon=3)
        self.scale = th.nn.Parameter(th.ones(()))

    def encode(self, obs: Any) -> th.Tensor:
        return th.as_tensor(obs).float().flatten(1)

    def decode(self, cond: th.Tensor, w: th.Tensor, num_steps: int | None = None) -> th.Tensor:
        return (self.scale * w).clamp(-1, 1)


def test_other_policies_play_but_cannot_be_saved(tmp_path: Path) -> None:
    policy = SteeredPolicy.of(small(steered(Foreign())))  # type: ignore[arg-type]
    assert policy.predict(frames(1)).shape == (3, 2)
    with pytest.raises(ValueError, match="Only a steered FlowPolicy can be saved, found Foreign: use"):
        policy.save_pretrained(tmp_path / "lift")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file, expected a folder"):
        SteeredPolicy.of(small(steered(tiny_flow()))).save_pretrained(tmp_path / "file")

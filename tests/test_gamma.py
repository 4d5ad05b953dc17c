"""The warning about another gamma than the env's."""

import pathlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
from sb3_contrib import TQC
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_dsrl import FlowPolicy, LatentPolicy
from sb3_dsrl.stage2.gamma_check import install_gamma_check
from tests.envs import FORMS
from tests.models import ON_POLICY, small, steered

#: Any algorithm with any policy: class, policy, further arguments.
OTHERS: dict[str, tuple[type[BaseAlgorithm], str, dict[str, Any]]] = {
    "SAC": (SAC, "MlpPolicy", dict(learning_starts=100)),
    "TQC": (TQC, "MlpPolicy", dict(learning_starts=100)),
    "A2C MlpPolicy": (A2C, "MlpPolicy", dict(n_steps=2)),
    "PPO MlpPolicy": (PPO, "MlpPolicy", dict(n_steps=2, batch_size=4)),
}


def gamma_warnings(learn: Any) -> list[str]:
    """What a call warns of that has to do with macro-steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn()
    return [str(warning.message) for warning in caught if "macro-step" in str(warning.message)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", ON_POLICY.values())
@pytest.mark.parametrize(("gamma", "warns"), [(0.9**3, False), (0.9, True), (0.99, True)])
def test_gamma_mismatch_warns(cls: Any, form: str, gamma: float, warns: bool, flow: FlowPolicy) -> None:
    model = small(steered(flow, form=form, gamma=0.9), cls, gamma=gamma)
    found = gamma_warnings(lambda: model.learn(1))
    expected = f"{cls.__name__} discounts with gamma={gamma} per macro-step, but the env's macro-step discount is 0.729: pass"
    assert len(found) == warns and all(message.startswith(expected) for message in found)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(("gamma", "warns"), [(0.9**3, False), (0.99, True)])
def test_gamma_mismatch_warns_whatever_learns(kind: str, gamma: float, warns: bool, flow: FlowPolicy) -> None:
    cls, policy, kwargs = OTHERS[kind]
    model = cls(policy, steered(flow, gamma=0.9), gamma=gamma, policy_kwargs=dict(net_arch=[8]), **kwargs)  # type: ignore[arg-type]
    found = gamma_warnings(lambda: model.learn(2))
    assert len(found) == warns
    assert all(message.startswith(f"{cls.__name__} discounts with gamma=0.99 per macro-step") for message in found)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (dict(), "VecNormalize discounts with gamma=0.99 per macro-step, but"),
        (dict(gamma=0.9**3), None),
        (dict(norm_reward=False), None),
        (dict(training=False), None),  # its gamma is used for nothing
    ],
)
def test_gamma_of_vec_normalize(kwargs: dict[str, Any], expected: str | None, flow: FlowPolicy) -> None:
    model = small(VecNormalize(steered(flow, gamma=0.9), **kwargs), gamma=0.9**3)
    found = gamma_warnings(lambda: model.learn(1))
    assert len(found) == (expected is not None) and all(message.startswith(expected or "") for message in found)


def test_one_gamma_warning_a_learn(flow: FlowPolicy) -> None:
    model = small(VecNormalize(steered(flow, gamma=0.9)), gamma=0.95)
    expected = "PPO discounts with gamma=0.95 and VecNormalize discounts with gamma=0.99 per macro-step, but"
    for _ in range(2):
        (found,) = gamma_warnings(lambda: model.learn(1))
        assert found.startswith(expected)


@pytest.mark.parametrize("vec_env_cls", [None, SubprocVecEnv])
def test_unsteered_envs_are_left_alone(vec_env_cls: Any) -> None:
    env = make_vec_env("Pendulum-v1", 1, vec_env_cls=vec_env_cls)
    assert not gamma_warnings(lambda: PPO("MlpPolicy", env, n_steps=2, batch_size=2).learn(1))
    env.close()


def test_gamma_warning_stays_silent_on_load(tmp_path: pathlib.Path, flow: FlowPolicy) -> None:
    model = small(steered(flow))
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*macro-step")
        PPO.load(tmp_path / "model")
        PPO.load(tmp_path / "model", env=steered(flow)).learn(1)
        LatentPolicy.load(tmp_path / "policy")


def test_the_hook_is_installed_once_and_by_the_import() -> None:
    method = BaseAlgorithm._setup_learn
    install_gamma_check()
    assert BaseAlgorithm._setup_learn is method
    assert method.__name__ == "_setup_learn" and not hasattr(method.__wrapped__, "__wrapped__")  # type: ignore[attr-defined]
    code = (
        "from stable_baselines3.common.base_class import BaseAlgorithm as B; before = B._setup_learn; import sb3_dsrl; "
        "assert B._setup_learn.__wrapped__ is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Stage 1 in one call: which weighting it takes, which settings it knows, and what it refuses."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
from stable_baselines3 import PPO

from sb3_dsrl import (
    CandidateSettings,
    ExecutedSettings,
    FlowPolicy,
    LatentSteeringWrapper,
    fit_candidates,
    fit_executed,
    pretrain_latent,
)
from sb3_dsrl.stage1 import pretrain
from sb3_dsrl.steering.contract import Contract
from tests.bandit import BEST, bandit_demos, bandit_flow, bandit_model, made_rollouts
from tests.toys import BanditEnv, linear_flow


@pytest.mark.parametrize(
    ("data", "weighting", "expected"),
    [
        (dict(demos="d"), "auto", "candidates"),
        (dict(rollouts="r"), "auto", "executed"),
        (dict(demos="d", rollouts="r"), "candidates", "candidates"),
        (dict(rollouts="r"), "candidates", "candidates"),
        (dict(rollouts="r"), "executed", "executed"),
    ],
)
def test_weighting(monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], weighting: Any, expected: str) -> None:
    """Everything that is given reaches the function of the weighting."""
    called: dict[str, Any] = {}
    monkeypatch.setattr(pretrain, "fit_candidates", lambda *args, **kwargs: called.update(candidates=(args, kwargs)))
    monkeypatch.setattr(pretrain, "fit_executed", lambda *args, **kwargs: called.update(executed=(args, kwargs)))
    common = dict(
        policy_kwargs={},
        gate="gate",
        callback=print,
        callback_freq=7,
        log_interval=5,
        seed=3,
        tensorboard_log="logs",
        progress_bar=True,
        checkpoint="checkpoint",
    )
    pretrain_latent("flow", **data, weighting=weighting, n_iterations=9, beta=None, **common)  # type: ignore[arg-type]
    assert list(called) == [expected]
    args, kwargs = called[expected]
    if expected == "candidates":
        assert args == ("flow", data.get("demos"), data.get("rollouts"), CandidateSettings(n_iterations=9))
    else:
        assert args == ("flow", "r", ExecutedSettings(n_iterations=9))
    assert kwargs == common


def test_recommended_settings() -> None:
    executed, candidates = ExecutedSettings(), CandidateSettings()
    assert (executed.n_iterations, executed.beta, executed.kl_coef) == (500, 0.3, 1e-2)
    assert (candidates.n_iterations, candidates.beta, candidates.kl_coef) == (2_000, 1.0, 1e-3)


@pytest.mark.parametrize(
    ("data", "given", "sentence"),
    [
        (dict(rollouts="r"), "n_candidates", r"weighting='executed' does not know the setting 'n_candidates'; it knows "),
        (dict(rollouts="r"), "warm_start_value", r"weighting='executed' does not know .*'warm_start_value'; .*, gae_lambda,"),
        (
            dict(demos="d"),
            "gae_lambda",
            r"weighting='candidates' does not know the setting 'gae_lambda'; .*n_iterations, beta",
        ),
        (dict(demos="d"), "n_iteration", r"weighting='candidates' does not know the setting 'n_iteration'; .*n_iterations"),
    ],
)
def test_unknown_settings_are_refused(data: dict[str, Any], given: str, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        pretrain_latent(bandit_flow(), **data, **{given: 3})


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(beta=0.0), r"beta is a temperature and must be positive, found 0.0"),
        (dict(n_iterations=0), r"n_iterations must be at least 1, found 0"),
        (dict(batch_size=0), r"batch_size must be at least 1, found 0"),
        (dict(kl_coef=-1.0), r"kl_coef must not be negative, found -1.0"),
        (dict(learning_rate=0.0), r"learning_rate must be positive, found 0.0"),
    ],
)
@pytest.mark.parametrize("cls", [CandidateSettings, ExecutedSettings])
def test_settings_out_of_range(cls: type, kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cls(**kwargs)


@pytest.mark.parametrize(
    ("cls", "kwargs", "sentence"),
    [
        (CandidateSettings, dict(n_candidates=1), r"n_candidates must be at least 2, found 1"),
        (CandidateSettings, dict(pool_size=8), r"pool_size must be at least 16, found 8"),
        (CandidateSettings, dict(tau=0.0), r"tau is a temperature and must be positive, found 0.0"),
        (ExecutedSettings, dict(max_weight=0.0), r"max_weight must be positive, found 0.0"),
        (ExecutedSettings, dict(gae_lambda=2.0), r"gae_lambda must lie in \[0, 1\], found 2.0"),
    ],
)
def test_own_settings_out_of_range(cls: type, kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cls(**kwargs)


def test_no_function_has_more_than_16_parameters() -> None:
    for function in (pretrain_latent, fit_executed, fit_candidates):
        assert len(signature(function).parameters) <= 16


def model_without_env() -> PPO:
    model = bandit_model(bandit_flow())
    model.env = None
    return model


def mlp_model() -> PPO:
    return PPO("MlpPolicy", LatentSteeringWrapper(BanditEnv(BEST / 4), bandit_flow()), device="cpu")


def flow_without_critic() -> FlowPolicy:
    flow = bandit_flow()
    flow.critic = None
    return flow


@pytest.mark.parametrize(
    ("target", "kwargs", "error", "sentence"),
    [
        (bandit_flow, dict(), ValueError, r"pretrain_latent needs demos, rollouts, or both"),
        (
            bandit_flow,
            dict(demos=bandit_demos(), weighting="best"),
            ValueError,
            r"weighting must be 'auto', 'candidates', 'executed' or 'inverted', found 'best'",
        ),
        (
            bandit_flow,
            dict(demos=bandit_demos(), weighting="executed"),
            ValueError,
            r"weighting='executed' weighs the noises of rollouts, but no rollouts were given",
        ),
        (
            bandit_flow,
            dict(demos=bandit_demos(), rollouts=made_rollouts()),
            ValueError,
            r"weighting='executed' learns from rollouts alone, but demos were given, too",
        ),
        (
            bandit_flow,
            dict(rollouts=made_rollouts()),
            ValueError,
            r"The rollouts have flow='none', but the flow has '[0-9a-f]{16}'",
        ),
        (
            lambda: bandit_model(bandit_flow()),
            dict(rollouts=made_rollouts(contract=Contract.of(bandit_flow(), gamma=0.5, reward_scale=2.0))),
            ValueError,
            r"The rollouts have gamma=0.5, but the model's env has 0.99. The rollouts have reward_scale=2.0, .* has 1.0",
        ),
        (
            bandit_flow,
            dict(demos=bandit_demos()),
            ValueError,
            r"This flow's critic is untrained: call train_critic\(flow, demo_transitions\(flow, demos\)\) first",
        ),
        (
            flow_without_critic,
            dict(demos=bandit_demos()),
            ValueError,
            r"This flow has no critic to score candidates with: use fit_executed with rollouts",
        ),
        (
            lambda: linear_flow(obs_dim=5),
            dict(demos=bandit_demos()),
            ValueError,
            r"bandit.h5 does not fit the flow: the shape of an observation is \(2,\) in the demos, \(5,\) in the flow",
        ),
        (bandit_flow, dict(demos="none.h5"), FileNotFoundError, r"none.h5 does not exist; expected the demo file"),
        (
            lambda: 42,
            dict(demos=bandit_demos()),
            TypeError,
            r"Stage 1 expects a FlowPolicy, its folder, or a model with 'LatentPolicy', found int",
        ),
        (
            mlp_model,
            dict(demos=bandit_demos()),
            ValueError,
            r"Stage 1 expects a model with 'LatentPolicy', found ActorCriticPolicy",
        ),
        (
            model_without_env,
            dict(demos=bandit_demos()),
            ValueError,
            r"Stage 1 needs the model's env to find the flow: call model.set_env\(env\) first",
        ),
    ],
)
def test_refusals(target: Callable[[], Any], kwargs: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        pretrain_latent(target(), **kwargs)

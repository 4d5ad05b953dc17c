"""Held-out demos, the best weights so far, and products in bfloat16."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_dsrl import FlowPolicy, TrainingCheckpoint, Validation, create_flow, train_flow
from sb3_dsrl.stage0 import precision
from sb3_dsrl.stage0.validation import Judge
from sb3_dsrl.utils.progress import ProgressLoop
from tests.stage0 import SMALL, make_demos, random_demos

SIZES: dict[str, Any] = dict(pred_horizon=2, act_horizon=1, **SMALL)


@pytest.mark.parametrize("n, fraction, held", [(10, 0.1, 1), (10, 0.25, 2), (2, 0.9, 1), (7, 0.01, 1)])
def test_split(n: int, fraction: float, held: int) -> None:
    """Whole episodes, each in one part, in order."""
    demos = make_demos(np.zeros((n, 3, 2)), np.arange(n)[:, None, None] * np.ones((n, 4, 3)))
    learned, held_out = Validation(fraction).split(demos)
    numbers = [[int(episode.obs[0, 0]) for episode in part.episodes] for part in (learned, held_out)]
    assert len(numbers[1]) == held and sorted(numbers[0] + numbers[1]) == list(range(n))
    assert numbers[0] == sorted(numbers[0])


def test_what_cannot_be_held_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"made\.h5 holds one demo: none can be held out"):
        train_flow(make_demos(np.zeros((1, 3, 2)), np.zeros((1, 4, 3))), validation=Validation(), **SIZES)
    with pytest.raises(ValueError, match=r"fraction must lie between 0 and 1, found 1\.0"):
        Validation(1.0)
    with pytest.raises(ValueError, match="freq must be at least 1, found 0"):
        Validation(freq=0)


class Recorder:
    """Gives the scores that it was told to, and keeps the weights that were scored."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.weights = scores, []

    def __call__(self, flow: FlowPolicy) -> float:
        assert not flow.net.training and not any(p.requires_grad for p in flow.parameters())
        th.rand(3)  # must not disturb the training
        self.weights.append(copy.deepcopy(flow.state_dict()))
        return self.scores[len(self.weights) - 1]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(th.equal(one[name], other[name]) for name in one)


def test_the_best_one_is_the_result() -> None:
    score = Recorder([0.1, 0.7, 0.3])
    flow = train_flow(random_demos(), n_iterations=10, seed=0, validation=Validation(freq=4, score=score), **SIZES)
    assert len(score.weights) == 3  # after 4, 8 and 10 iterations
    assert same(flow.state_dict(), score.weights[1]) and not same(flow.state_dict(), score.weights[2])


def test_training_is_not_disturbed() -> None:
    """The last one being the best, it is what training on the same demos without validation gives."""
    demos = random_demos()
    start = create_flow(demos, **SIZES)
    learned, _ = Validation(0.3).split(demos)
    plain = train_flow(learned, copy.deepcopy(start), n_iterations=10, seed=0)
    validation = Validation(0.3, freq=3, score=Recorder([1.0, 2.0, 3.0, 4.0]))
    judged = train_flow(demos, copy.deepcopy(start), n_iterations=10, seed=0, validation=validation)
    assert same(plain.state_dict(), judged.state_dict())


def test_the_held_out_loss_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out demos that contradict the others: training longer makes it worse, and the first judgement wins."""
    rng = np.random.default_rng(0)
    demos = make_demos(np.concatenate([np.full((9, 8, 2), 0.8), np.full((1, 8, 2), -0.8)]), rng.normal(size=(10, 9, 3)))
    losses, weights = [], []
    judge = Judge.judge

    def spy(self: Judge) -> dict[str, float]:
        record = judge(self)
        losses.append(record["flow/validation_loss"])
        weights.append(copy.deepcopy(self._candidate.state_dict()))
        return record

    monkeypatch.setattr(Judge, "judge", spy)
    kwargs: dict[str, Any] = dict(n_iterations=200, learning_rate=1e-2, ema_decay=0.9, normalize_actions=False, seed=0)
    flow = train_flow(demos, validation=Validation(freq=50), **kwargs, **SIZES)
    assert len(losses) == 4 and losses == sorted(losses) and losses[0] < losses[-1]
    assert same(flow.state_dict(), weights[0])


def test_resume_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(scores: list[float], checkpoint: TrainingCheckpoint | None = None) -> FlowPolicy:
        validation = Validation(freq=4, score=Recorder(scores))
        return train_flow(random_demos(), n_iterations=12, seed=0, validation=validation, checkpoint=checkpoint, **SIZES)

    expected = train([0.9, 0.1, 0.2])
    real = ProgressLoop.log

    def crash(self: ProgressLoop, scalars: Any) -> None:
        if self._i == 6:
            raise KeyboardInterrupt
        real(self, scalars)

    monkeypatch.setattr(ProgressLoop, "log", crash)
    with pytest.raises(KeyboardInterrupt):
        train([0.9], TrainingCheckpoint(tmp_path, save_freq=5))
    monkeypatch.undo()
    resumed = train([0.1, 0.2], TrainingCheckpoint(tmp_path, resume=True))
    assert same(resumed.state_dict(), expected.state_dict())


# Products in bfloat16


@pytest.mark.parametrize("able", [True, False])
def test_products_in_bfloat16_inside_the_block_only(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: able)
    matmul: Any = th.backends.mkldnn.matmul
    assert matmul.fp32_precision == "none"
    with pytest.raises(ZeroDivisionError), precision.fast_products():
        assert matmul.fp32_precision == ("bf16" if able else "none")
        raise ZeroDivisionError
    assert matmul.fp32_precision == "none"


def test_a_users_precision_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    matmul: Any = th.backends.mkldnn.matmul
    try:
        matmul.fp32_precision = "ieee"
        with precision.fast_products():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = "none"

"""A bound on how far a policy may fall while it learns."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_dsrl.stage2.callbacks import SuccessEvalCallback


class KeepBest(BaseCallback):
    """
    Gives a policy back the weights with which it was measured best, its start's among them: at the end of the training, and
    whenever it is measured to have fallen too far below that. The optimiser then forgets its moments. (SB3's ``EvalCallback``
    and :class:`SuccessEvalCallback` save the best model, but training goes on from the worse one.)

    What was measured best was lucky, too: play on other episodes, with :func:`~sb3_dsrl.choose_policy`, say, to know how good
    it is.

    :param curve: measures; it must stand before this callback
    :param max_drop: of success at the end, on the same episodes, below the best so far
    :raises ValueError: if ``max_drop`` is negative; when training begins, if nothing was measured before
    """

    def __init__(self, curve: SuccessEvalCallback, max_drop: float = 0.1) -> None:
        super().__init__()
        if max_drop < 0:
            raise ValueError(f"max_drop must be 0 or positive, found {max_drop}")
        self.curve, self.max_drop = curve, max_drop
        #: env steps at each return to the best weights
        self.restored: list[int] = []
        self._best: tuple[tuple[float, float], dict[str, Any]] | None = None
        self._seen, self._fallen = 0, False

    @property
    def best_success(self) -> float:
        """Success at the end of the best weights; NaN before the training."""
        return float("nan") if self._best is None else self._best[0][0]

    def state_dict(self) -> dict[str, Any]:
        """For :class:`~sb3_dsrl.ResumeCallback`."""
        return dict(best=self._best, seen=self._seen, fallen=self._fallen, restored=self.restored)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on."""
        self._best, self._seen = state_dict["best"], state_dict["seen"]
        self._fallen, self.restored = state_dict["fallen"], list(state_dict["restored"])

    def _on_training_start(self) -> None:
        if not self.curve.history:
            raise ValueError("KeepBest found nothing measured: pass callback=[curve, KeepBest(curve)], in this order")
        self._judge()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._judge()

    def _on_rollout_start(self) -> None:
        if self._fallen:  # not before the update: its rollout is the fallen policy's
            self._restore()
            self.restored.append(self.curve.env_steps)

    def _on_training_end(self) -> None:
        self._judge()
        self._restore()

    def _judge(self) -> None:
        if len(self.curve.history) == self._seen:
            return
        self._seen = len(self.curve.history)
        result = self.curve.history[-1][1]
        score = (result.success_at_end, result.mean_return)
        if self._best is None or score >= self._best[0]:
            self._best = (score, deepcopy(self.model.policy.state_dict()))
        self._fallen = result.success_at_end < self._best[0][0] - self.max_drop

    def _restore(self) -> None:
        assert self._best is not None
        policy = self.model.policy
        kept = {name: policy.state_dict()[name].clone() for name in ("prior_mix", "_decay_due") if hasattr(policy, name)}
        policy.load_state_dict(self._best[1] | kept)
        policy.optimizer.state = defaultdict(dict)
        self._fallen = False

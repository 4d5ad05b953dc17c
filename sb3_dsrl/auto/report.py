"""What ``improve`` did and found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_dsrl.evaluation.choice import PolicyChoice
from sb3_dsrl.evaluation.results import EvalResult
from sb3_dsrl.evaluation.steerability_report import SteerabilityReport


@dataclass
class ImproveReport:
    """
    What :func:`~sb3_dsrl.improve` did and found. ``print`` shows it.

    :param env_id: of the env
    :param budget: env steps that were allowed
    :param spent: env steps of each part
    :param steerability: base and free controls
    :param stage1: test of what stage 1 learned against what it started from, "before" and "after"
    :param stage1_kept: whether stage 2 started from stage 1's policy
    :param curve: (env steps of stage 2, outcome of the mean), the same episodes every time; empty if there was no stage 2
    :param choice: the last test, of all that there was, from the same starts; it decided what is deployed
    :param seconds: of all of it
    """

    env_id: str
    budget: int
    spent: dict[str, int]
    steerability: SteerabilityReport
    stage1: PolicyChoice
    stage1_kept: bool
    curve: list[tuple[int, EvalResult]]
    choice: PolicyChoice
    seconds: float

    @property
    def name(self) -> str:
        """What is deployed: "base", "zero", "ticket", "narrow", "stage1", "stage2" or "stage2_stochastic"."""
        return self.choice.name

    @property
    def env_steps(self) -> int:
        """All env steps."""
        return sum(self.spent.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(
            env_id=self.env_id,
            name=self.name,
            budget=self.budget,
            env_steps=self.env_steps,
            spent=self.spent,
            seconds=round(self.seconds, 1),
            stage1_kept=self.stage1_kept,
            choice=self.choice.as_dict(),
            stage1=self.stage1.as_dict(),
            curve=[dict(env_steps=steps, **result.as_row()) for steps, result in self.curve],
            steerability=self.steerability.as_dict(),
        )

    def save_json(self, path: str | Path) -> None:
        """
        :param path: the ``.json`` file to write
        """
        Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {steps:,}" for name, steps in self.spent.items())
        stage1 = "kept" if self.stage1_kept else "dropped"
        after = self.stage1.results["after"]
        learned = [f"{result.success_at_end:.2f}" for _, result in self.curve]
        return (
            f"{self.env_id}: {self.env_steps:,} of {self.budget:,} env steps ({parts}), {self.seconds:.0f} s\n"
            f"Steerability: {self.steerability.verdict}\n"
            f"Stage 1: {after.success_at_end:.2f} in {after.episodes} episodes, what it started from "
            f"{self.stage1.results['before'].success_at_end:.2f}: {stage1}\n"
            f"Stage 2: {', '.join(learned) if learned else 'no env steps were left for it'}\n\n{self.choice}"
        )

"""What goes to the Hugging Face hub: model cards, and folders that may lie there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult as HubResult
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError

#: Stands for the repository in a card of a folder that was not uploaded.
HERE = "path/to/this/folder"


class Outcome(Protocol):
    """What a card tells of an evaluation, as :class:`~sb3_dsrl.EvalResult` has it."""

    name: str
    episodes: int
    success_once: float
    success_at_end: float
    ci_low: float
    ci_high: float


@dataclass
class About:
    """
    What a model says of itself.

    :param what: what it is, in a title
    :param text: the same in a few sentences
    :param env_id: task; None is unknown
    :param facts: what must fit it, by name
    :param load: Python that loads it; ``{path}`` stands for the folder or repository
    """

    what: str
    text: str
    env_id: str | None
    facts: Mapping[str, Any]
    load: str


class HubModel(ModelHubMixin):
    """A model of the hub whose card says what a stranger needs."""

    def about(self) -> About:
        """What the card tells of the model itself."""
        raise NotImplementedError

    def generate_model_card(  # type: ignore[override]
        self, *, results: Sequence[Outcome] = (), env_steps: int | None = None, repo_id: str | None = None
    ) -> ModelCard:
        """
        The card that ``save_pretrained`` and ``push_to_hub`` write as ``README.md`` where there is none yet;
        ``model_card_kwargs=dict(results=..., env_steps=...)`` of theirs gives it figures.
        ``policy.generate_model_card(...).save(folder / "README.md")`` writes it anew.

        :param results: outcomes of :func:`~sb3_dsrl.evaluate`: of the unsteered flow ("prior"), of w = 0, of what steers it
        :param env_steps: env steps that training took
        :param repo_id: repository that the model can be loaded from; None is a folder
        """
        about = self.about()
        title = about.what if about.env_id is None else f"{about.what} for {about.env_id}"
        own = self._hub_mixin_info.model_card_data.to_dict()
        data = ModelCardData(model_name=title, eval_results=_for_the_index(about.env_id, results), **own)
        parts = [f"# {title}", about.text, "## How to load it"]
        parts += [f"```python\n{about.load.format(path=repo_id or HERE).strip()}\n```"]
        if results or env_steps is not None:
            parts.append("## Results")
        if results:
            parts += [_table(results), "`success_at_end`: at the last env step of an episode. The interval is Wilson's, 95%."]
        if env_steps is not None:
            parts.append(f"Training took {env_steps:,} env steps.")
        rows = "\n".join(f"| {name} | {_plain(value)} |" for name, value in about.facts.items())
        parts += ["## What must fit it", f"| | |\n|---|---|\n{rows}"]
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> str:
        """
        Uploads the model with its card.

        :param repo_id: such as "me/lift_peg"
        :param model_card_kwargs: arguments of :meth:`generate_model_card`
        :param kwargs: further arguments of ``huggingface_hub.ModelHubMixin.push_to_hub``
        :return: url of the commit
        """
        return super().push_to_hub(repo_id, model_card_kwargs=dict(repo_id=repo_id) | (model_card_kwargs or {}), **kwargs)


def _for_the_index(env_id: str | None, results: Sequence[Outcome]) -> list[HubResult] | None:
    if env_id is None or not results:
        return None
    return [
        HubResult(
            task_type="reinforcement-learning",
            dataset_type=env_id,
            dataset_name=env_id,
            metric_type="success_at_end",
            metric_name=f"success_at_end, {row.name}",
            metric_value=round(row.success_at_end, 4),
        )
        for row in results
    ]


def _table(results: Sequence[Outcome]) -> str:
    lines = ["| | episodes | success_at_end | 95% interval | success_once |", "|---|---|---|---|---|"]
    for row in results:
        interval = f"{row.ci_low:.2f} to {row.ci_high:.2f}"
        lines.append(f"| {row.name} | {row.episodes} | {row.success_at_end:.2f} | {interval} | {row.success_once:.2f} |")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)


def find_folder(name: str | Path, files: Sequence[str], writer: str, **kwargs: Any) -> Path:
    """
    :param name: folder, or repository of the Hugging Face hub
    :param files: what it must hold
    :param writer: who writes such folders
    :param kwargs: further arguments of ``huggingface_hub.snapshot_download``, such as ``revision``
    :return: the folder, or the copy of the repository
    :raises FileNotFoundError: if there is no such folder or repository, or a file is missing
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), **kwargs))
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"{name} is neither a folder written by {writer} nor a repository of the Hugging Face hub that can be reached "
                f"from here"
            ) from error
    for file in files:
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder} holds no {file}: expected a folder written by {writer}")
    return folder

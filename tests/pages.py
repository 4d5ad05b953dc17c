"""The Markdown pages of the repository: their blocks of code, and what runs them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: Pages whose Python needs more than a folder with examples and a flow: the test that runs it
OWN_TESTS = {
    "bring_your_own.md": "test_bring_your_own.py",
    "lerobot.md": "lerobot/test_pages.py",
    "original.md": "test_original.py",
}
#: What a page says, and what its test runs instead, where what it says takes minutes
SHORTER = {
    "improve.md": {"budget=100_000": "budget=12_000"},
    "training.md": {
        'load_demos("examples/demos/PushCube-v1.h5")': 'load_demos("examples/demos/PushCube-v1.h5", 5)',
        "(model, demos, n_iterations=20)": "(model, demos, n_iterations=20, batch_size=16)",
    },
    "steerability.md": {"episodes=400": "episodes=40, n_tickets=4"},
}


@dataclass(frozen=True)
class Block:
    """
    :param language: after the opening fence, such as ``python``, or a directive of MyST in braces
    :param text: what stands in it
    :param line: of the opening fence, from 1
    """

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """The pages of the documentation."""
    return sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def all_markdown() -> list[Path]:
    """Every Markdown file of the repository that people read."""
    folders = (ROOT / "examples", ROOT / ".github")
    return sorted({*ROOT.glob("*.md"), *pages(), *(path for folder in folders for path in folder.rglob("*.md"))})


def blocks(path: Path, language: str | None = None) -> list[Block]:
    """
    :param path: of a page
    :param language: of the wanted blocks; None is all
    """
    text = path.read_text()
    found = [
        Block(match.group(2), match.group(3), text.count("\n", 0, match.start()) + 1)
        for match in re.finditer(r"^(```+|:::+)([^\n]*)\n(.*?)^\1[ ]*$", text, re.DOTALL | re.MULTILINE)
    ]
    return [block for block in found if language is None or block.language == language]


def run_blocks(path: Path) -> dict[str, Any]:
    """
    Runs the Python of a page in its order, in the folder that this process is in.

    :param path: of the page
    :return: the names that it leaves behind
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    shorter = SHORTER.get(path.name, {})
    assert all(old in path.read_text() for old in shorter)
    for block in blocks(path, "python"):
        code = "\n" * block.line + block.text  # so that an error names the page's own line
        for old, new in shorter.items():
            code = code.replace(old, new)
        exec(compile(code, str(path), "exec"), names)
    return names

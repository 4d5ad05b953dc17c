"""The documentation: its Python runs, its commands exist, its lines are short, and the reference leaves nothing out."""

import inspect
import math
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from stable_baselines3.common.save_util import load_from_zip_file

import sb3_dsrl
from sb3_dsrl import VelocityMLP, load_demos, policy_defaults, train_flow
from sb3_dsrl.cli.commands import COMMANDS
from sb3_dsrl.stage2 import settings
from sb3_dsrl.stage2.start import START_STD
from sb3_dsrl.utils.checkpoint import previous
from tests.pages import DOCS, OWN_TESTS, ROOT, all_markdown, blocks, pages, run_blocks
from tests.test_awsc import Checkpoint

#: Blocks that nobody runs: output and pictures in characters, and directives of MyST
NOT_RUN = {"text", "{toctree}", "{include} ../CONTRIBUTING.md", "{include} ../CHANGELOG.md", "{note}"}
RUN_HERE = [path for path in pages() if blocks(path, "python") and path.name not in OWN_TESTS]
MAX_LENGTH = 127


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the repository's examples, a flow and a checkpoint, as the pages assume them."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    Checkpoint(folder / "best_eval_success_once.pt")
    demos = load_demos(ROOT / "examples" / "demos" / "PushCube-v1.h5", 10)
    flow = train_flow(demos, net_class=VelocityMLP, pred_horizon=4, act_horizon=4, n_iterations=20)
    flow.save_pretrained(folder / "flows" / "pushcube")
    return folder


@pytest.mark.parametrize("page", [str(path.relative_to(DOCS)) for path in RUN_HERE])
def test_python_of_a_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = run_blocks(DOCS / page)
    if page == "resuming.md":
        path, total = folder / names["path"], names["total"]
        assert saved_steps(path) == total  # the last interval, too
        assert 0 < saved_steps(previous(path)) < total
        before = path.read_bytes()
        run_blocks(DOCS / page)  # there is nothing left to do
        assert path.read_bytes() == before


def saved_steps(path: Path) -> int:
    """Macro-steps of a checkpoint."""
    data, _, _ = load_from_zip_file(path)
    assert data is not None
    return data["num_timesteps"]


def test_pages_with_a_test_of_their_own() -> None:
    for page, test in OWN_TESTS.items():
        assert blocks(DOCS / page, "python") and f'"{page}"' in (ROOT / "tests" / test).read_text()


def test_every_block_is_run_or_marked() -> None:
    assert len(RUN_HERE) > 8
    for path in (ROOT / "README.md", *pages()):
        for block in blocks(path):
            assert block.language in NOT_RUN | {"python", "bash"}, f"{path.name}, line {block.line}: {block.language!r}"


def test_commands_exist() -> None:
    """Scripts, their flags, and targets of make."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    sources = [path for place in ("examples", "sb3_dsrl") for path in (ROOT / place).rglob("*.py")]
    code = "\n".join(path.read_text() for path in sources)
    flags = set(re.findall(r"^ +(\w+): ", code, re.MULTILINE)) | set(re.findall(r'"--([\w-]+)"', code))
    flags |= {f"no_{flag}" for flag in flags}
    n_scripts = 0
    for path in (ROOT / "README.md", *pages()):
        for block in blocks(path, "bash"):
            for command in block.text.replace("\\\n", " ").splitlines():
                command = command.partition("#")[0].strip()
                if command.startswith("make "):
                    assert command.split()[1] in targets, f"{path.name}: {command}"
                if command.startswith("python examples/"):
                    n_scripts += 1
                    assert (ROOT / command.split()[1]).is_file(), f"{path.name}: {command}"
                    given = set(re.findall(r" --([\w-]+)", command))
                    unknown = {flag for flag in given if not {flag, flag.replace("-", "_")} & flags}
                    assert not unknown, f"{path.name}: no script has {unknown}"
    assert n_scripts > 8


def test_commands_of_the_package_and_their_flags() -> None:
    table = (DOCS / "scripts.md").read_text()
    for name, about in COMMANDS.items():
        assert re.search(rf"^\| `sb3-dsrl {name}` \| {re.escape(about)} \| `examples/\w+\.py` \|$", table, re.MULTILINE), name
    shown = set()
    for path in (ROOT / "README.md", *pages()):
        for block in blocks(path, "bash"):
            for command in re.findall(r"^sb3-dsrl (\w+)(.*)$", block.text.replace("\\\n", " "), re.MULTILINE):
                shown.add(command[0])
                fields = vars(import_module(f"sb3_dsrl.cli.{command[0]}").Args)["__dataclass_fields__"]
                given = {flag.replace("-", "_") for flag in re.findall(r" --([\w-]+)", command[1])}
                assert given <= set(fields), f"{path.name}: sb3-dsrl {command[0]} has no {given - set(fields)}"
    assert shown == set(COMMANDS)


def test_settings_in_the_text_are_those_of_the_code() -> None:
    full, shared = policy_defaults("full"), policy_defaults("shared")
    text = (DOCS / "training.md").read_text()
    assert f"| std at the start | {math.exp(full['log_std_init']):.2f}, or {math.exp(shared['log_std_init']):.1f} with" in text
    assert f"| noises from the prior | {full['prior_mix']:.0%} at the start, or none with" in text and not shared["prior_mix"]
    assert (settings.MAX_LR, settings.LR_TIMES_ENTRIES) == (3e-4, 3.2e-3) and settings.LR_TIMES_ENTRIES / 64 == 5e-5
    for page in ("training.md", "faq.md"):
        assert "`min(3e-4, 3.2e-3 / entries)`" in (DOCS / page).read_text()
    assert full["value_lr"] == 1e-3 and "| learning rate of the value function | 1e-3 at the start" in text
    assert f"fit the number of envs: {settings.ROLLOUT_SIZE} macro-steps a rollout, a quarter" in text
    assert settings.N_MINIBATCHES == 4 and f"with a std of {START_STD} around" in text
    assert inspect.signature(sb3_dsrl.DemoStarts).parameters["true_starts"].default == 0.25
    assert "A quarter of the episodes are true starts" in " ".join(text.split())


def test_lines_of_prose_are_short() -> None:
    for path in all_markdown():
        in_block = {line for block in blocks(path) for line in range(block.line, block.line + block.text.count("\n") + 2)}
        for number, line in enumerate(path.read_text().splitlines(), 1):
            is_prose = number not in in_block and not line.startswith(("|", "    "))
            assert not is_prose or len(line) <= MAX_LENGTH, f"{path.relative_to(ROOT)}, line {number}: {len(line)}"


def test_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_reference_has_every_public_name() -> None:
    text = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.rst"))
    documented = set(re.findall(r"^\.\. auto(?:class|function):: (?:sb3_dsrl\.)?(\w+)$", text, re.MULTILINE))
    assert set(sb3_dsrl.__all__) - {"__version__"} <= documented


def test_start_page_leads_to_every_page() -> None:
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    stems = {path.stem for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))} - {"index"}
    assert len(stems) > 18 and not stems - set(listed)


def test_images_and_links_of_the_readme_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)[)#]", (ROOT / "README.md").read_text())
    assert len(links) > 15 and not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "index.html").is_file() and (tmp_path / "searchindex.js").stat().st_size > 10_000

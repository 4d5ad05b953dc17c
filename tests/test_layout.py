"""The shape of the package: small modules, short signatures, a light import, and files that name each other rightly."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.pages import pages

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sb3_dsrl"
#: Public functions and methods may have this many parameters.
MAX_PARAMETERS = 16
#: Imported where they are used: extras, and packages that take long and that stable_baselines3 does not import either.
LAZY = {"mani_skill", "sapien", "ray", "diffusers", "wandb", "lerobot", "minari", "pyarrow"} | {
    *("imageio", "cv2", "matplotlib", "pandas", "scipy")
}
#: The modules of this package that import ManiSkill or an extra, so that importing the package does not.
LAZY_MODULES = {
    *("sb3_dsrl.envs.maniskill", "sb3_dsrl.envs.maniskill_wrappers"),
    *("sb3_dsrl.experts.planner", "sb3_dsrl.experts.scripted", "sb3_dsrl.policies.diffusion", "sb3_dsrl.evaluation.video"),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(*folders: str) -> list[Path]:
    """The Python files of some folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def public_functions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods without a leading underscore, and the special methods of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{owner}{node.name}.")
        elif isinstance(node, Function) and (not node.name.startswith("_") or node.name.endswith("__")):
            yield f"{owner}{node.name}", node


def n_parameters(function: Function, is_method: bool) -> int:
    """Number of parameters without ``self`` or ``cls``; ``*args`` and ``**kwargs`` count one each."""
    args = function.args
    static = any(isinstance(node, ast.Name) and node.id == "staticmethod" for node in function.decorator_list)
    named = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
    return named + (args.vararg is not None) + (args.kwarg is not None) - (is_method and not static)


def inner_imports(tree: ast.Module) -> Iterator[str]:
    """The modules that are imported inside functions."""
    for function in ast.walk(tree):
        if isinstance(function, Function | ast.Lambda):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    assert node.module is not None and not node.level
                    # of ``from sb3_dsrl.envs import maniskill`` the module is sb3_dsrl.envs.maniskill
                    submodules = {alias.name for alias in node.names if (ROOT / _path(node.module, alias.name)).is_file()}
                    yield from (f"{node.module}.{name}" for name in submodules)
                    if len(submodules) < len(node.names):
                        yield node.module


def _path(package: str, module: str) -> str:
    return f"{package.replace('.', '/')}/{module}.py"


def in_fresh_process(code: str) -> str:
    """What some code prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("folder", ["sb3_dsrl", "examples", "tests"])
def test_modules_are_short(folder: str) -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules(folder)}
    assert len(lines) > 10
    assert not {name: n for name, n in lines.items() if n > 400}


def test_signatures_are_short() -> None:
    counts = {}
    for path in modules("sb3_dsrl"):
        for name, function in public_functions(ast.parse(path.read_text()).body):
            counts[f"{path.relative_to(PACKAGE)}: {name}"] = n_parameters(function, is_method="." in name)
    assert len(counts) > 200
    assert not {name: n for name, n in counts.items() if n > MAX_PARAMETERS}


def test_parameters_are_counted() -> None:
    code = (
        "class C:\n def f(self, a, /, b, *args, c=1, **k): ...\n @staticmethod\n def g(a): ...\ndef _h(a): ...\ndef k(a): ..."
    )
    counts = {name: n_parameters(f, "." in name) for name, f in public_functions(ast.parse(code).body)}
    assert counts == {"C.f": 5, "C.g": 1, "k": 1}


def test_imports_stand_at_the_top() -> None:
    """An import inside a function hides a circle, unless it spares the user a package that he does not have or need."""
    found = {}
    for path in modules("sb3_dsrl"):
        for name in inner_imports(ast.parse(path.read_text())):
            if name not in LAZY_MODULES and name.partition(".")[0] not in LAZY:
                found[str(path.relative_to(ROOT))] = name
    assert not found


def test_inner_imports_are_found() -> None:
    code = "import a\ndef f():\n import b.c\n def g():\n  from sb3_dsrl.envs import maniskill\n  from sb3_dsrl import evaluate"
    assert set(inner_imports(ast.parse(code))) == {"b.c", "sb3_dsrl.envs.maniskill", "sb3_dsrl"}


def test_importing_is_as_light_as_importing_sb3() -> None:
    code = (
        "import sys, sb3_contrib, stable_baselines3; before = set(sys.modules); import sb3_dsrl;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    added = set(in_fresh_process(code).split())
    assert "sb3_dsrl" in added
    assert not added & (LAZY | {"tensorboard", "rich", "tyro", "IPython", "torchvision", "transformers", "trimesh"})


@pytest.mark.parametrize(("env_id", "imported"), [("Pendulum-v1", False), ("PushCube-v1", True)])
def test_make_latent_env_imports_maniskill_for_its_ids_alone(env_id: str, imported: bool) -> None:
    code = (
        "import sys, sb3_dsrl; from sb3_dsrl.envs.factory import is_maniskill; from tests.envs import tiny_flow\n"
        "try: sb3_dsrl.make_latent_env({!r}, tiny_flow(99, 9), n_envs=0)\n"
        "except ValueError as error: print(error)\n"
        "print(is_maniskill({!r}), 'mani_skill' in sys.modules)"
    )
    lines = in_fresh_process(code.format(env_id, env_id)).splitlines()
    assert lines[-2:] == ["n_envs must be at least 1, found 0", f"{imported} {imported}"]


def test_pre_commit_runs_what_make_check_runs() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local" and all(hook["language"] == "system" for hook in repo["hooks"])
    recipe = re.search(r"^check: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.strip().replace("$(PY)", ".venv/bin/python") for line in recipe.group(1).splitlines()]
    assert [hook["entry"] for hook in repo["hooks"]] == commands


def test_ci_runs_check_and_test() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step.get("run") for step in jobs["test"]["steps"]]
    assert {"make check", "make test"} <= set(commands)


def test_issue_templates_are_forms() -> None:
    paths = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(paths) > 1
    for path in paths:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in form["body"])


def test_contributing_lists_the_rooms_in_their_order() -> None:
    rooms = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    layers = re.search(r"^layers = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert layers is not None and rooms == re.findall(r'"(\w+)"', layers.group(1))[::-1]
    assert set(rooms) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_contributing_lists_the_files_of_each_room() -> None:
    sections = re.findall(r"^`(\w+)`\n\n((?:- .*\n)+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    listed = {room: sorted(re.findall(r"^- `(\w+\.py)`: ", text, re.MULTILINE)) for room, text in sections}
    rooms = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert listed == {room.name: sorted(path.name for path in room.glob("*.py") if path.stem != "__init__") for room in rooms}


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile"),
        *(str(path.relative_to(ROOT)) for path in pages()),
        *("examples/results/README.md", "examples/results/compare/report.md"),
    ],
)
def test_named_files_exist(name: str) -> None:
    """Scripts and folders of the examples, modules of the tests, and links."""
    text = (ROOT / name).read_text()
    named = re.findall(r"\b(?:examples|tests)/[\w./-]*\w", text)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing
    assert named or name.startswith("docs")

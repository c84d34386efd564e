"""House rules a reader relies on: imports point down, no pickle, short files, known folders."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each folder may import of ours. configs is a leaf that only launch reads.
MAY_IMPORT = {
    "configs": set(),
    "kernels": set(),
    "dist_attn": {"kernels"},
    "parallel": {"kernels", "dist_attn"},
    "finetune": {"kernels", "dist_attn", "parallel"},
    "launch": {"kernels", "dist_attn", "parallel", "finetune", "configs"},
}
LINES = 300
MAY_BE_LONGER: dict[str, str] = {}  # file: why
# Names that load code with data, or evaluate text: never needed here, whatever the arguments.
BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {
    "eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "numpy.load", "np.load",
}  # fmt: skip
BANNED_ATTRIBUTES = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip


def library() -> list[Path]:
    return [file for folder in MAY_IMPORT for file in sorted((ROOT / folder).rglob("*.py"))]


def everything() -> list[Path]:
    others = [file for folder in ("tests", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
    return library() + others


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything imported anywhere in a file; relative with dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_imports(folder: str, source: str) -> list[str]:
    """Return what a file of ``folder`` must not import; tests and benchmarks may take all."""
    allowed = MAY_IMPORT.get(folder, set(MAY_IMPORT)) | {folder}
    wrong = []
    for line, name in imports(ast.parse(source)):
        parts = name.split(".")
        if parts[0] in MAY_IMPORT:
            wrong.append(f"{line}: import ringspan.{name}, not {name}")
        elif name.startswith("."):
            wrong.append(f"{line}: {name} is relative; write it from ringspan on")
        elif parts[0] == "ringspan" and (len(parts) < 2 or parts[1] not in allowed):
            wrong.append(f"{line}: {folder} must not import {name}")
        elif folder == "configs" and parts[0] in ("torch", "transformers"):
            wrong.append(f"{line}: configs must not import {name}")
    return wrong


def wrong_calls(source: str) -> list[str]:
    """Return what runs code from data: banned imports, calls and attributes."""
    tree = ast.parse(source)
    wrong = [
        f"{line}: {name}"
        for line, name in imports(tree)
        if name.split(".")[0] in BANNED_MODULES or name in BANNED_CALLS
        or name.split(".")[-1] in BANNED_ATTRIBUTES
    ]  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = ast.unparse(node)
            if name in BANNED_CALLS or name.split(".")[-1] in BANNED_ATTRIBUTES:
                wrong.append(f"{node.lineno}: {name}")
        if isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) in {
            ("trust_remote_code", "True"), ("weights_only", "False"), ("allow_pickle", "True"),
        }:  # fmt: skip
            wrong.append(f"{node.value.lineno}: {ast.unparse(node)}")
    return wrong


def in_all(files: list[Path], check) -> dict[str, list[str]]:
    found = {}
    for file in files:
        name = file.relative_to(ROOT)
        if wrong := check(name.parts[0], file.read_text()):
            found[str(name)] = wrong
    return found


def test_imports_point_down() -> None:
    assert in_all(everything(), wrong_imports) == {}


def test_the_oracle_imports_nothing_of_ours() -> None:
    dense = (ROOT / "tests" / "dense.py").read_text()
    assert [name for _, name in imports(ast.parse(dense)) if name.startswith("ringspan")] == []


def test_nothing_runs_code_from_data() -> None:
    assert in_all(library(), lambda _, source: wrong_calls(source)) == {}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", "from ringspan.dist_attn import plan"),
        ("kernels", "def f():\n    import ringspan.parallel.mesh"),
        ("dist_attn", "from ringspan import launch"),
        ("finetune", "from ringspan.configs.schema import Config"),
        ("configs", "import torch"),
        ("launch", "from kernels import mask"),
        ("launch", "import kernels"),
        ("tests", "import configs.load"),
        ("parallel", "from .mesh import x"),
        ("launch", "import ringspan"),
    ],
)
def test_the_import_check_notices(folder: str, source: str) -> None:
    assert len(wrong_imports(folder, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(f)",
        "save = torch.save",
        "from torch import load",
        "dist.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "eval('1')",
        "exec(code)",
        "yaml.load(text, Loader=yaml.Loader)",
        "f(x, trust_remote_code=True)",
    ],
)
def test_the_code_check_notices(source: str) -> None:
    assert len(wrong_calls(source)) == 1


def test_the_checks_let_ordinary_code_pass() -> None:
    source = (
        "import torch\nfrom ringspan.kernels.mask import Causal\n"
        "model.eval()\nyaml.safe_load(x)\nclass A:\n    eval: int\n"
    )
    assert wrong_imports("dist_attn", source) == []
    assert wrong_calls(source) == []


def test_files_fit_their_budget() -> None:
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in everything()}
    assert {n: k for n, k in lines.items() if k > LINES and n not in MAY_BE_LONGER} == {}
    assert [name for name in MAY_BE_LONGER if lines.get(name, 0) <= LINES] == []  # now short


def test_every_file_says_what_it_is() -> None:
    silent = [file for file in library() if not ast.get_docstring(ast.parse(file.read_text()))]
    assert silent == []


def test_the_packages_are_the_folders() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    with_python = {f"ringspan.{'.'.join(file.parent.relative_to(ROOT).parts)}" for file in library()}
    assert set(project["tool"]["setuptools"]["packages"]) == with_python
    assert {name.split(".")[1] for name in with_python} == set(MAY_IMPORT)
    banned = project["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == set(MAY_IMPORT)
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would hide Hugging Face's kernels
    assert not (ROOT / "__init__.py").exists()


def test_every_direct_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(one for extra in project["project"]["optional-dependencies"].values() for one in extra),
    ]
    pins = dict(
        line.split("==")
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    names = {re.split(r"[\[>=<]", one)[0] for one in needed}
    assert names <= set(pins)
    for one in needed:
        name, floor = re.split(r"[\[>=<]", one)[0], one.split(">=")[1]
        numbers = [[int(n) for n in v.split(".")] for v in (floor, pins[name])]
        assert numbers[0] <= numbers[1], one
    assert f"TORCH := torch=={pins['torch']}" in (ROOT / "Makefile").read_text()

"""What a user installs: the wheel, in a fresh environment, imported from elsewhere.

Hugging Face publishes a package named `kernels`, which a namesake at the top level of site-packages
would overwrite or hide. Ours is ringspan.kernels; both must be importable wherever Python is
started, the checkout's root included.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = sorted({name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"]})
# Nothing of the caller's that could lead Python to the checkout.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command: object, cwd: Path, timeout: float = 120) -> str:
    """Run a command, which must succeed, and return its standard output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources() -> set[str]:
    """Return what the wheel must hold, by its name in the wheel."""
    return {
        f"ringspan/{file.relative_to(ROOT)}"
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.suffix == ".py" or (folder == "configs" and file.suffix == ".yaml")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel by way of the source distribution, in a copy of the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in [*FOLDERS, "tests", "benchmarks", "docs"]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def python(tmp_path: Path, wheel: Path) -> Path:
    """Return the interpreter of a new environment with the wheel, and torch lent from this one.

    A path in a .pth file lends the packages but not the .pth files among them: an editable install
    stays invisible.
    """
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    interpreter = home / "bin" / "python"
    (site_packages(interpreter) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install(interpreter, "--no-deps", wheel)
    return interpreter


def site_packages(interpreter: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run(interpreter, "-c", code, cwd=interpreter.parent).strip())


def install(interpreter: Path, *what: object) -> None:
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-index"]
    run(*pip, "--quiet", *what, cwd=interpreter.parent)


def test_wheel_holds_the_folders_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == sources()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_command_and_every_module_work_from_elsewhere(python: Path, tmp_path: Path) -> None:
    command = python.parent / "ringspan"
    version = PROJECT["project"]["version"]
    assert run(command, "--version", cwd=Path("/")) == f"ringspan {version}\n"
    home = site_packages(python) / "ringspan"
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in sources()
        if name.endswith(".py")
    )
    code = f"import importlib, sys\nfor name in {modules}:\n    print(importlib.import_module(name).__file__)\n"
    for file in run(python, "-c", code, cwd=tmp_path).splitlines():
        assert Path(file).is_relative_to(home)
    demo = home / "configs" / "demo.yaml"
    load = "import sys; from ringspan.configs.load import load; load(sys.argv[1])"
    run(python, "-c", load, demo, cwd=tmp_path)


BOTH = """
import kernels, sys
import ringspan.kernels.mask, ringspan.kernels.merge
print(kernels.__file__)
print(ringspan.kernels.mask.__file__)
"""


def assert_both_live(python: Path, theirs: Path) -> None:
    """Import both, from elsewhere and from the checkout, and theirs once ours is uninstalled."""
    ours = site_packages(python) / "ringspan" / "kernels" / "mask.py"
    assert run(python, "-c", BOTH, cwd=Path("/")).splitlines() == [str(theirs), str(ours)]
    # At the root the checkout is first on the path, and its folder kernels/ with it.
    assert run(python, "-c", BOTH, cwd=ROOT).splitlines() == [str(theirs), str(ours)]
    pip = [sys.executable, "-m", "pip", "--python", python, "uninstall", "--yes", "--quiet"]
    run(*pip, "ringspan", cwd=python.parent)
    assert not ours.exists()
    assert run(python, "-c", "import kernels; print(kernels.__file__)", cwd=ROOT).strip() == str(theirs)


def test_lives_beside_a_package_named_kernels(python: Path, tmp_path: Path) -> None:
    theirs = site_packages(python) / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("")
    assert_both_live(python, theirs)


def test_lives_beside_hugging_faces_kernels(python: Path, tmp_path: Path) -> None:
    fetched = tmp_path / "fetched"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "0", "--timeout", "20"]
    pip += ["--no-deps", "--dest", str(fetched), "kernels==0.17.2", "tomlkit"]
    if subprocess.run(pip, capture_output=True, timeout=120, check=False).returncode:
        pytest.skip("pip cannot fetch Hugging Face's kernels here")
    install(python, "--no-deps", *fetched.glob("*.whl"))
    theirs = site_packages(python) / "kernels" / "__init__.py"
    assert "get_kernel" in theirs.read_text()
    assert_both_live(python, theirs)

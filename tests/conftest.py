"""What all tests share: system tools that some need; one thread for torch, as forked ranks need."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec

import pytest

if find_spec("triton") and find_spec("interpreter"):  # a test runs this file alone
    # First of all: transformers imports triton too, and what was read without a GPU to be compiled is not interpreted.
    import interpreter  # noqa: F401

# A tool's name: the program that shows it is there, and the Debian package that brings it.
TOOLS = {
    "gxx": ("g++", "g++"),
    "slurm": ("slurmctld", "slurm-wlm"),
    "netns": ("ip", "iproute2"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="TOOL[,TOOL...]",
        help=f"fail, not skip, tests that need these and do not find them: {', '.join(TOOLS)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    if unknown := _required(config) - set(TOOLS):
        raise pytest.UsageError(f"--require: no such tool: {', '.join(sorted(unknown))}; there is {', '.join(TOOLS)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            program, package = TOOLS[name]
            if shutil.which(program) is None:
                missing = f"needs {name}: no {program}; apt-get install {package}"
                if name in _required(item.config):
                    pytest.fail(missing, pytrace=False)
                pytest.skip(missing)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _required(config: pytest.Config) -> set[str]:
    return {name for name in str(config.getoption("--require")).split(",") if name}

"""The command ``ringspan``: verbs, their arguments, exit codes.

Nothing heavy is imported before a verb needs it, so that ``--help`` answers at once and a faulty
config is told before torch is loaded. Exit codes: 0 done, 2 bad input found before any rank
started, others from the verb.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ringspan.configs.schema import Config

BAD_INPUT = 2
VERBS = {
    "train": "fine-tune a causal language model, its sequences sharded over ranks",
    "verify": "run one batch on the configured ranks and on one: the same loss, the same gradients",
    "plan": "say what attention would move and take, for any number of ranks, without starting one",
}
_TRAIN_USAGE = "ringspan train CONFIG.yaml [--section.key value | section.key=value ...]"
_OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)*=.*", re.DOTALL)
_TRAIN_NEEDS = (
    "pydantic", "yaml", "transformers", "datasets", "tokenizers", "peft",
    "safetensors", "rich", "matplotlib", "numpy",
)  # fmt: skip
_PLAN_NEEDS = tuple(name for name in _TRAIN_NEEDS if name not in ("datasets", "tokenizers"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ringspan`` with ``argv`` (default: the process's own) and return the exit code.

    Raises:
        SystemExit: with code 2 and the faults told, or with 0 after --help and --version.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("train", "verify"):
        return _train(arguments[0], arguments[1:])
    if arguments and arguments[0] == "plan":
        return _plan(arguments[1:])
    return _top(arguments)


def parse_train(argv: Sequence[str], usage: str = _TRAIN_USAGE) -> tuple[str, list[str]]:
    """Split the arguments of a verb into the config's path and overrides ``section.key=value``.

    Raises:
        SystemExit: with code 2, after one line on stderr (rank 0) that says why not.
    """
    paths: list[str] = []
    overrides: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            if not equals:
                value = next(rest, "--")
                if value.startswith("--"):
                    _stop(f"{argument}: no value follows; write {argument} VALUE")
            if name not in ("local_rank", "local-rank"):  # the deepspeed launcher's; the environment says it too
                overrides.append(f"{name}={value}")
        elif argument.startswith("-"):
            _stop(f"{argument}: no such option; settings are written --section.key value")
        elif _OVERRIDE.fullmatch(argument):
            overrides.append(argument)
        else:
            paths.append(argument)
    if not paths:
        _stop(f"no config given; usage: {usage}")
    if len(paths) > 1:
        _stop(f"{paths[1]}: a second config, after {paths[0]}; an override is section.key=value")
    return paths[0], overrides


def _top(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ringspan",
        usage="ringspan VERB ... | --version | --help",
        description="Long-context fine-tuning with every sequence sharded over ranks.",
        epilog="\n".join(["verbs:", *(f"  {verb:<8} {text}" for verb, text in VERBS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ringspan {version('ringspan')}")
    if not arguments:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    first = arguments[0]
    known = ["-h", "--help", "--version"]
    if first not in known:
        names = known if first.startswith("-") else list(VERBS)
        near = get_close_matches(first, names, n=1)
        what = "option" if first.startswith("-") else "verb"
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(names)}"
        _stop(f"{first}: no such {what}; {hint}")
    parser.parse_args(arguments)
    return 0


def _train(verb: str, arguments: list[str]) -> int:
    """Train or verify: what both take is a config."""
    usage = _TRAIN_USAGE.replace("train", verb, 1)
    _check_needs(verb, _TRAIN_NEEDS)
    if "-h" in arguments or "--help" in arguments:
        _train_help(verb, usage)
        return 0
    config, path, overrides = read_train(arguments, usage)
    if verb == "verify":
        from ringspan.launch.verify import launch  # torch comes with it
    else:
        from ringspan.launch.train import launch
    return launch(config, path, overrides)


def _plan(arguments: list[str]) -> int:
    _check_needs("plan", _PLAN_NEEDS)
    from ringspan.launch import plan_options

    if "-h" in arguments or "--help" in arguments:
        print(f"usage: {plan_options.USAGE}\n\n{VERBS['plan']}\n\noptions:")
        for name, text in plan_options.HELP.items():
            print(f"  --{name} {plan_options.VALUES[name]}\n        {text}")
        print("\nThe config's settings are those of ringspan train --help.")
        return 0
    try:
        options, rest = plan_options.take(arguments)
    except ValueError as error:
        _stop(str(error))
    config, _, _ = read_train(rest, plan_options.USAGE)
    from ringspan.launch.plan import launch  # torch comes with it

    return launch(config, options)


def _check_needs(verb: str, needs: Sequence[str]) -> None:
    if missing := [name for name in needs if find_spec(name) is None]:
        _stop(f"{verb} needs {', '.join(missing)}; install: pip install 'ringspan[train]'")


def read_train(argv: Sequence[str], usage: str = _TRAIN_USAGE) -> tuple[Config, str, list[str]]:
    """Return the config that the arguments of a verb describe, its path, and the overrides.

    Raises:
        SystemExit: with code 2, after every fault has been told on a line of its own (by rank 0).
    """
    path, overrides = parse_train(argv, usage)
    from ringspan.configs.load import ConfigError, load

    try:
        return load(path, overrides), path, overrides
    except ConfigError as error:
        _stop(*error.faults)


def _train_help(verb: str, usage: str) -> None:
    """Print the usage of a verb and every setting, from the schema."""
    from ringspan.configs.explain import show
    from ringspan.configs.load import sections

    print(f"usage: {usage}\n\n{VERBS[verb]}\n\nsettings:")
    for section, kind in sections().items():
        print(f"\n{section}: {kind.__doc__}")
        for key, field in kind.model_fields.items():
            default = "needed" if field.is_required() else show(field.get_default())
            print(f"  --{section}.{key} ({default})\n        {field.description}")


def _stop(*faults: str) -> NoReturn:
    """Say what is wrong, a line each, and end with code 2; of several ranks the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        for fault in faults:
            print(f"ringspan: {fault}", file=sys.stderr)
    raise SystemExit(BAD_INPUT)


if __name__ == "__main__":
    sys.exit(main())

"""The demo: a tiny base model at 512 tokens, its extension to 8K over two ranks, and the picture.

Everything is made by the commands a user would type, one after another, in the repository's root;
what is newer than its inputs is not made again.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ringspan.configs.load import ConfigError, load
from ringspan.parallel.faults import Fault

DATA = Path("runs/demo_data")
BASE = Path("configs/demo_base.yaml")
LONG = Path("configs/demo.yaml")
PICTURE = Path("docs/report.png")


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return 0, 2 for a fault before a start, or the failed command's own code."""
    parser = argparse.ArgumentParser(prog="python -m ringspan.launch.demo", description=__doc__)
    parser.add_argument("--data-only", action="store_true", help="make the text and its tokenizer, then stop")
    parser.add_argument("--fresh", action="store_true", help="make everything again, whatever is there")
    options = parser.parse_args(argv)
    began = time.monotonic()
    try:
        code = run(data_only=options.data_only, fresh=options.fresh)
    except (Fault, ConfigError) as fault:
        print(f"ringspan demo: {fault}", file=sys.stderr)
        return 2
    how = "done" if code == 0 else f"stopped with code {code}"
    print(f"demo: {how} after {time.monotonic() - began:.0f} s")
    return code


def run(*, data_only: bool, fresh: bool) -> int:
    """Make text, base model and long model as far as they are missing or old; copy the picture."""
    if not data_only:
        for config in (BASE, LONG):
            if not config.is_file():
                raise Fault(f"{config} is not in {Path.cwd()}; run the demo in the repository's root")
    made = DATA / "corpus.json"
    if fresh or not made.is_file():
        # Imported here: this module answers --help before transformers is loaded.
        from ringspan.finetune.corpus import build

        print(build(DATA), flush=True)
    else:
        print(f"demo: text of an earlier run in {DATA} (--fresh makes it again)", flush=True)
    if data_only:
        return 0
    base, long = (Path(load(config).train.output_dir) for config in (BASE, LONG))
    weights = base / "export" / "config.json"
    if fresh or is_older(weights, made, BASE):
        code = train(BASE, base, [made, BASE], fresh)
        if code:
            return code
    else:
        print(f"demo: base model of an earlier run in {base} (--fresh makes it again)", flush=True)
    code = train(LONG, long, [made, LONG, weights], fresh)
    if code == 0:
        PICTURE.parent.mkdir(exist_ok=True)
        shutil.copyfile(long / "report.png", PICTURE)
        print(f"demo: the picture is {PICTURE}")
    return code


def is_older(made: Path, *inputs: Path) -> bool:
    """Tell whether made is missing or older than one of the files it was made from."""
    return not made.exists() or any(made.stat().st_mtime < one.stat().st_mtime for one in inputs)


def train(config: Path, output: Path, inputs: list[Path], fresh: bool) -> int:
    """Run `ringspan train` on config and return its exit code.

    An interrupted run goes on; one whose checkpoint is older than its inputs is deleted and starts again.
    """
    command = [sys.executable, "-m", "ringspan.launch.cli", "train", str(config)]
    if output.exists() and (fresh or is_older(output / "checkpoints" / "latest", *inputs)):
        print(f"demo: deleting {output}, which is older than what it is made from", flush=True)
        shutil.rmtree(output)
    print(f"demo: {' '.join(['ringspan', *command[3:]])}", flush=True)
    with subprocess.Popen(command) as child:
        # The trainer ends its ranks by itself and is waited for: Ctrl-C reaches it too, SIGTERM is
        # handed on.
        before = signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
        try:
            while True:
                try:
                    code = child.wait()
                    break
                except KeyboardInterrupt:
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())

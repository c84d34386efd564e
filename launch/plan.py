r"""``ringspan plan``: what attention moves, computes and takes, before a single rank is started.

No GPU, no process group, no weights and no data: the plan is integers, and of the model only its config is read.
docs/plan.png, a model of 32 layers (five in six with a window) on two million tokens of packed documents, was made by

    ringspan plan configs/demo_base.yaml --world 8x8 --length 2M --documents lognormal:256k,7 --out docs/plan.png \
      model.config.model_type=gemma3_text model.config.hidden_size=4096 model.config.num_hidden_layers=32 \
      model.config.num_attention_heads=32 model.config.num_key_value_heads=8 model.config.head_dim=128 \
      model.config.sliding_window=4096 model.dtype=bfloat16 train.batch_size=1 attention.layout=balanced
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ringspan.configs.schema import Config
from ringspan.launch import plan_draw, plan_figures, plan_inputs, plan_report
from ringspan.launch.plan_options import Options
from ringspan.parallel.faults import Fault

BAD_INPUT = 2  # exit code


def launch(config: Config, options: Options) -> int:
    """Plan, print, and write what was asked for; return the exit code."""
    try:
        run(config, options)
    except Fault as fault:
        print(f"ringspan: {fault}", file=sys.stderr)
        return BAD_INPUT
    return 0


def run(config: Config, options: Options) -> None:
    """Plan, print, and write what was asked for.

    Raises:
        Fault: names the option or setting, its value and the rule.
    """
    for name, path in (("--out", options.out), ("--json", options.json)):
        if path is not None and not path.parent.is_dir():
            raise Fault(f"{name}: {path}: there is no folder {path.parent}; make it, or write elsewhere")
    if options.out is not None and options.out.suffix != ".png":
        raise Fault(f"--out: {options.out} must end in .png")
    inputs = plan_inputs.read(config, options)
    drawn = plan_figures.work_out(inputs)
    kinds = [each.kind for each in drawn]
    total = plan_figures.Total.of(kinds, inputs.batch * inputs.length)
    plan_report.show(inputs, kinds, total)
    if options.json is not None:
        text = json.dumps(plan_figures.as_json(inputs, kinds, total), indent=1) + "\n"
        _write("--json", options.json, text.encode())
    if options.out is not None:
        _write("--out", options.out, plan_draw.png(inputs, drawn, total))


def _write(option: str, path: Path, content: bytes) -> None:
    """Write through a file beside it: a picture is there in full, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise Fault(f"{option}: {path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {path}")

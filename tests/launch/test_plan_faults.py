"""``ringspan plan``: what is wrong is named in one line, before anything is planned."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plan_cases import write_config

from ringspan.configs.load import load
from ringspan.launch import plan, plan_options
from ringspan.launch.cli import main
from ringspan.launch.plan_options import Options


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wrold", "8"], "--wrold: no such option; perhaps --world"),
        (["--quux=8"], "--quux=8: no such option; there is --world, --length, --documents, --costs, --out, --json"),
        (["--world"], "--world: no value follows; write --world 8, or 16x8"),
        (["--world", "--length", "8"], "--world: no value follows"),
        (["--world", "0x8"], "--world: '0x8' must be ranks, or nodes x ranks in a node: 8, or 16x8"),
        (["--world=-1"], "--world: '-1' must be ranks"),
        (["--world", "2000"], "--world: 2000 ranks must be <= the 1024 tokens of a sequence"),
        (["--length", "ten"], "--length: 'ten' must be a positive whole number of tokens, as 4096, 128k or 1.5M"),
        (["--documents", "even:0"], "--documents: 'even:0' must give a number of documents of at least 1"),
        (["--documents", "even:2000"], "--documents: even:2000 asks for more documents than the 1024 tokens"),
        (["--documents", "lognormal:x,0"], "--documents: 'x' must be a positive whole number of tokens"),
        (["--documents", "lognormal:8,x"], "--documents: the seed of 'lognormal:8,x' must be a whole number"),
        (["--documents", "gone.txt"], "--documents: gone.txt cannot be read: No such file or directory; give a file"),
        (["--documents", "{bad}"], "document 1: 'long' must be a positive whole number of tokens"),
        (["--documents", "{empty}"], "is empty; it must hold lengths in tokens, one a line"),
        (["--costs", "gone.json"], "--costs: gone.json cannot be read: No such file or directory; give what bench"),
        (["--costs", "{bad}"], "bad.txt: Extra data"),
        (["--costs", "{slow}"], "slow.json: a bandwidth or rate is not above 0"),
        (["--costs", "{fields}"], "fields.json: costs: "),
        (["--out", "plan.pdf"], "--out: plan.pdf must end in .png"),
        (["--out", "gone/plan.png"], "--out: gone/plan.png: there is no folder gone; make it, or write elsewhere"),
        (["--json", "gone/plan.json"], "--json: gone/plan.json: there is no folder gone"),
        (["attention.mask=causal & dilated(4)"], "attention.mask: "),
        (["attention.mask=causal & documents([0, 1024])"], "holds documents; these come from the data, leave them out"),
        (["attention.mask=window(4, 4)"], "shows a query later tokens, the labels it is trained on"),
        (
            ["parallel.cp=0"],
            "parallel.cp: 0 must be a number of ranks, or -1 for what the world leaves (override parallel.cp=0)",
        ),
        (["x.yaml"], "x.yaml: a second config"),
        (
            ["model.config.layer_types=[chunked_attention]", "model.config.num_hidden_layers=1"],
            "layer 0 of gemma3_text",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_code_2(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"bad": "bad.txt", "empty": "empty.txt", "slow": "slow.json", "fields": "fields.json"}
    contents = (
        "5\nlong\n",
        "",
        json.dumps({"links": [{"latency": 0, "bandwidth": 0}], "ranks_per_node": 1, "forward": 1, "backward": 1}),
        '{"links": []}',
    )
    paths = {name: str(config.parent / file) for name, file in files.items()}
    for path, content in zip(paths.values(), contents, strict=True):
        Path(path).write_text(content)
    filled = [argument.format(**paths) if "{" in argument else argument for argument in arguments]
    try:
        code = main(["plan", str(config), *filled])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("ringspan: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_strategy_that_refuses_is_told_with_the_layers_it_is_for(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = load(config)
    asked = read.model_copy(update={"attention": read.attention.model_copy(update={"strategy": "double_ring"})})
    assert plan.launch(asked, Options(world=(8,))) == 2
    assert "attention.strategy: 'double_ring' needs a 2-D mesh" in capsys.readouterr().err


def test_help_comes_without_torch() -> None:
    code = (
        "import sys, atexit; from ringspan.launch.cli import main\n"
        "atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)))\n"
        "sys.exit(main(['plan', '--help']))"
    )
    seconds = []
    for _ in range(3):  # the first may have to compile and to read from disk
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        seconds.append(time.monotonic() - began)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr
        assert all(f"--{name}" in done.stdout for name in plan_options.PARSERS)
    assert min(seconds) < 2  # a third of a second on an idle machine


def test_bad_options_come_without_torch(config: Path) -> None:
    code = f"import sys; from ringspan.launch.cli import main\ntry: main(['plan', {str(config)!r}, '--world', 'x'])\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "False\n", done.stderr

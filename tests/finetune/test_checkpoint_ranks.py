"""Checkpoints of several ranks: one that fails or is missing, another library's files, and tables that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import filled, load
from torch import Tensor

from ringspan.finetune import checkpoint, manifest, shards
from ringspan.finetune.checkpoint import Saver
from ringspan.finetune.shards import Reader
from ringspan.parallel.faults import Fault


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def begun(folder: Path, step: int, *, world: int | None = 2) -> list[Saver]:
    """Let two ranks begin, each with a tensor of its own."""
    savers = [Saver(folder, rank=rank, world=world, keep=2) for rank in range(2)]
    savers[0].prepare(step)
    for rank, saver in enumerate(savers):
        saver.begin(step, {f"model/{rank}": torch.full((5,), float(step))})
    return savers


def published(folder: Path, step: int) -> Path:
    savers = begun(folder, step)
    for saver in savers:
        saver.wait()
    path = savers[0].publish({"mesh": "two"}, {})
    savers[1].published()
    return path


def test_a_rank_that_cannot_write_says_so_whenever_it_is_asked_and_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path, 1)
    real: Callable[..., None] = shards.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if path.name == "rank0001.safetensors":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(shards, "save_file", full)
    good, bad = begun(tmp_path, 2)
    good.wait()
    assert good.done()
    for ask in (bad.wait, bad.done, bad.done, bad.wait):
        with pytest.raises(Fault, match=r"step-000002: .*No space left on device; it needs .* are free there"):
            ask()
    # What it wrote makes room; what the other wrote is not pulled from under it.
    assert names(tmp_path / ".step-000002.tmp") == {"rank0000.safetensors", "rank0000.json"}
    good.abandon()
    assert names(tmp_path) == {"latest", "step-000001"}
    assert load(tmp_path).step == 1
    monkeypatch.setattr(shards, "save_file", real)
    published(tmp_path, 3)
    assert load(tmp_path).step == 3


def test_without_the_part_of_a_rank_nothing_is_published(tmp_path: Path) -> None:
    published(tmp_path, 1)
    saver = Saver(tmp_path, rank=0, world=2, keep=1)
    saver.prepare(2)
    saver.begin(2, {"model/0": torch.zeros(5)})
    saver.wait()
    with pytest.raises(Fault, match="of 2 ranks, the parts of 1 are there"):
        saver.publish({}, {})
    assert names(tmp_path) == {"latest", "step-000001"}


@pytest.mark.parametrize("name", ["rank0001.safetensors", "rank0001.json"])
def test_a_rank_whose_file_is_missing_is_named_with_the_newest_whole_one(tmp_path: Path, name: str) -> None:
    published(tmp_path, 1)
    path = published(tmp_path, 2)
    (path / name).unlink()
    with pytest.raises(Fault, match=rf"{name} is missing; the newest whole one is step-000001: .*fallback") as caught:
        checkpoint.verify(path)
    assert "\n" not in str(caught.value)
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-000001"
    assert checkpoint.by_age(tmp_path) == [path, tmp_path / "step-000001"]


def test_only_a_fallback_passes_over_a_stale_latest(tmp_path: Path) -> None:
    first, second = published(tmp_path, 1), published(tmp_path, 2)
    (tmp_path / "latest").write_text("step-000009\n")
    with pytest.raises(Fault, match="step-000009"):
        checkpoint.by_age(tmp_path)
    assert checkpoint.by_age(tmp_path, fallback=True) == [second, first]


def test_files_of_another_library_are_in_the_manifest_and_verified(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "zero" / "global_step2").mkdir(parents=True)
        (folder / "zero" / "global_step2" / "states.pt").write_bytes(b"of another library")

    saver = Saver(tmp_path, keep=1)
    saver.prepare(2)
    saver.begin(2, {}, write=write)
    saver.wait()
    path = saver.publish({}, {})
    foreign = path / "zero" / "global_step2" / "states.pt"
    checkpoint.verify(path)
    foreign.write_bytes(foreign.read_bytes().replace(b"a", b"b"))
    with pytest.raises(Fault, match=r"zero/global_step2/states\.pt has the right size and a wrong sha256"):
        checkpoint.verify(path)


def test_another_library_that_fails_leaves_the_saver_free(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1)
    saver.prepare(1)
    with pytest.raises(OSError, match="of another library"):
        saver.begin(1, {}, write=_raise)
    assert saver.step is None
    saver.prepare(2)
    saver.begin(2, {"model/w": torch.ones(3)})
    saver.wait()
    saver.publish({}, {})
    assert load(tmp_path).step == 2


def _raise(folder: Path) -> None:
    raise OSError(f"of another library, in {folder}")


def test_a_format_of_another_version_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path, 1)
    body = {**manifest.read(path), "format": 1}
    (path / "manifest.json").write_text(manifest._text(body))
    for attempt in (checkpoint.verify, Reader):
        with pytest.raises(Fault, match=r"manifest\.json has format 1, and this version of ringspan reads 2"):
            attempt(path)


PIECE: dict[str, Any] = {
    "name": "model/w", "offsets": [0], "sizes": [64], "shape": [64], "dtype": "float32", "key": "0"
}  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([{"offsets": [-1]}], "outside of"),
        ([{"offsets": [1]}], "outside of"),
        ([{"sizes": [-1]}], "outside of"),
        ([{"sizes": [64, 1]}], "not a table"),
        ([{"sizes": [6.4]}], "not a table"),
        ([{"sizes": [1 << 70]}], "not a table"),
        ([{"dtype": "from_file"}], "not a table"),
        ([{"dtype": ["float32"]}], "not a table"),
        ([{"name": ["model/w"]}], "not a table"),
        ([{"key": 0}], "not a table"),
        ([{}, {"shape": [65]}], "told twice"),
        ([{}, {"dtype": "float16"}], "told twice"),
        ([{}, {"sizes": [63]}], "told twice"),
        ([{"sizes": [63]}], "not whole: of the 64 values of model/w, 63 are there"),
        ([{"shape": [1 << 60], "name": "rng/0/cpu"}], "not whole"),
    ],
)
def test_a_table_that_lies_is_refused_before_anything_is_read(
    tmp_path: Path, pieces: list[dict[str, Any]], said: str
) -> None:
    path = filled(tmp_path, 1)
    (path / "rank0000.json").write_text(json.dumps({"pieces": [PIECE | piece for piece in pieces]}))
    with pytest.raises(Fault, match=said):
        Reader(path)


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        ({"key": "../rank0000"}, "rank0000.safetensors"),
        ({"sizes": [2], "shape": [2]}, r"0 is \[64\], and \[2\] in its table"),
        ({"sizes": [64, 3], "shape": [64, 3], "offsets": [0, 0]}, r"0 is \[64\], and \[64, 3\] in its table"),
        ({"dtype": "int32"}, "0 is torch.float32, and torch.int32 in its table"),
    ],
)
def test_a_table_that_does_not_fit_its_file_is_refused(tmp_path: Path, piece: dict[str, Any], said: str) -> None:
    path = filled(tmp_path, 1)
    (path / "rank0000.json").write_text(json.dumps({"pieces": [PIECE | piece]}))
    with pytest.raises(Fault, match=said):
        Reader(path).whole("model/w")


def test_ranks_that_the_manifest_does_not_name_are_not_looked_at(tmp_path: Path) -> None:
    path = filled(tmp_path, 1)
    (path / "rank0007.json").write_text(json.dumps({"pieces": [PIECE | {"name": "model/v"}]}))
    assert "model/v" not in Reader(path).tensors


def test_another_dtype_is_refused_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"model/w is torch\.float32 in .*, torch\.bfloat16 now"):
        Reader(filled(tmp_path, 1)).fill({"model/w": torch.zeros(64, dtype=torch.bfloat16)})


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path, 1)
    (path / "rank0000.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(Fault, match=r"is damaged: rank0000\.safetensors"):
        Reader(path).whole("model/w")


@pytest.mark.parametrize("name", ["/etc/hostname", "../elsewhere", "link"])
def test_a_manifest_cannot_make_ranks_read_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    path = filled(tmp_path / "c", 1)
    outside = tmp_path / "c" / "elsewhere"
    outside.write_text("secret")
    (path / "link").symlink_to(outside)
    files = {**manifest.read(path)["files"], name: {"bytes": 1, "sha256": "0"}}
    (path / "manifest.json").write_text(manifest._text({**manifest.read(path), "files": files}))
    with pytest.raises(Fault, match=f"names '{name}', outside the folder"):
        checkpoint.verify(path)


@pytest.mark.parametrize("entry", [None, 7, [], {}, {"bytes": 1}])
def test_a_manifest_that_does_not_say_what_a_file_is_is_refused(tmp_path: Path, entry: Any) -> None:
    path = filled(tmp_path, 1)
    files = {**manifest.read(path)["files"], "state.json": entry}
    (path / "manifest.json").write_text(manifest._text({**manifest.read(path), "files": files}))
    with pytest.raises(Fault, match=r"manifest\.json does not say what state\.json is"):
        checkpoint.verify(path)

"""Checkpoints: exact, whole or not there, and every kind of damage is named."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import filled as _save
from checkpoints import load, save
from torch import Tensor

from ringspan.finetune import checkpoint, manifest, publish
from ringspan.finetune.shards import Reader
from ringspan.parallel.faults import Fault

FILES = ["rank0000.safetensors", "rank0000.json", "state.json", "manifest.json"]


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip_keeps_every_bit_and_dtype(tmp_path: Path) -> None:
    tensors = {
        "model/w.weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "model/transposed": torch.randn(4, 6).T,
        "model/empty": torch.zeros(0, 3),
        "model/scalar": torch.tensor(2.5, dtype=torch.float64),
        "model/nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "optimizer/w.weight/step": torch.tensor(7.0),
        "rng/0/cpu": torch.get_rng_state(),
        "rng/1/cpu": torch.arange(5, dtype=torch.uint8),
    }
    state = {"schedule": {"last_lr": [0.1 + 0.2]}, "counters": {"tokens": 2**40}, "none": None}
    path = save(tmp_path / "c", 7, tensors, state, keep=1)
    back = load(tmp_path / "c")
    assert path == back.path == tmp_path / "c" / "step-000007"
    assert (back.step, back.state) == (7, state)
    assert _names(path) == set(FILES)
    assert set(tensors) == set(back.tensors)
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert back.tensors[name].shape == tensor.shape
        assert _bits(back.tensors[name]) == _bits(tensor)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["mesh"]) == (7, "one rank")


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_tensors_that_share_a_storage_are_saved_whole(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    model = {"left": whole[:5], "right": whole[5:], "all": whole, "again": whole}
    save(tmp_path, 1, model)
    back = load(tmp_path).tensors
    assert all(torch.equal(back[name], tensor) for name, tensor in model.items())


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.by_age(tmp_path / "absent") == []


def test_what_changes_after_begin_is_not_in_the_file(tmp_path: Path) -> None:
    """Training goes on while a thread writes."""
    saver, weight = checkpoint.Saver(tmp_path, keep=1), torch.zeros(300_000)
    saver.prepare(1)
    saver.begin(1, {"model/w": weight})
    weight.fill_(1.0)
    saver.wait()
    assert saver.done()
    assert checkpoint.latest(tmp_path) is None  # durable, and not yet visible
    saver.publish({}, {})
    assert load(tmp_path).tensors["model/w"].eq(0).all()


def test_ranks_verify_a_share_each_and_together_everything(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / "rank0000.safetensors").write_bytes(b"x")
    damaged = []
    for rank in range(3):
        try:
            checkpoint.verify(path, (rank, 3))
        except Fault:
            damaged.append(rank)
    assert len(damaged) == 1


@pytest.mark.parametrize(
    "table",
    [
        '{"pieces": [{"name": "model/w", "offsets": [0], "sizes": [64], "shape": [64], "dtype": "os", "key": "0"}]}',
        '{"pieces": [{"name": "model/w", "offsets": [0], "sizes": [64], "shape": [64], "dtype": "load", "key": "0"}]}',
        '{"pieces": [{"name": "model/w"}]}',
        '{"pieces": 3}',
        "[]",
        "no json",
    ],
)
def test_a_table_that_says_something_else_is_refused_by_name(tmp_path: Path, table: str) -> None:
    path = _save(tmp_path, 1)
    (path / "rank0000.json").write_text(table)
    with pytest.raises(Fault, match=r"rank0000\.json is not a table of tensors"):
        Reader(path)


def test_a_manifest_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    path, outside = _save(tmp_path, 1), tmp_path / "secret"
    outside.write_text("x")
    manifest.write(path, {"step": 1}, {})
    body = manifest.read(path)
    files = {**body["files"], "../secret": manifest.measure(outside)}
    (path / "manifest.json").write_text(manifest._text({**body, "files": files}))
    with pytest.raises(Fault, match=r"names '\.\./secret', outside the folder"):
        checkpoint.verify(path)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    reader = Reader(_save(tmp_path, 1))
    with pytest.raises(Fault, match="another model: .* has no model/v"):
        reader.fill({"model/v": torch.zeros(64)})
    with pytest.raises(Fault, match=r"another model: model/w has shape \[64\] in .*, \[32\] now"):
        reader.fill({"model/w": torch.zeros(32)})


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_names_the_file(tmp_path: Path, name: str) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2) / name
    original = path.read_bytes()
    for place in {0, 1, len(original) // 2, len(original) - 1}:
        damaged = bytearray(original)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(Fault) as caught:
            load(tmp_path)
        assert name in str(caught.value)
        assert "step-000001" in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(original)
    assert load(tmp_path).step == 2


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path, 1) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Fault, match=name):
        load(tmp_path)
    path.unlink()
    with pytest.raises(Fault, match=f"{name} is missing.*no whole checkpoint is left"):
        load(tmp_path)


def test_files_of_two_saves_do_not_mix(tmp_path: Path) -> None:
    first, second = _save(tmp_path, 1, value=1.0), _save(tmp_path, 2, value=2.0)
    (second / "rank0000.safetensors").write_bytes((first / "rank0000.safetensors").read_bytes())
    with pytest.raises(Fault, match=r"rank0000\.\w+.*sha256"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["step-000009", "../elsewhere", ""])
def test_a_stale_latest_names_itself_and_the_newest_whole_one(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    (tmp_path / "elsewhere").mkdir()
    _save(folder, 1)
    broken = _save(folder, 2)
    (broken / "state.json").unlink()
    (folder / "latest").write_text(name + "\n")
    with pytest.raises(Fault, match="newest whole one is step-000001") as caught:
        checkpoint.latest(folder)
    assert repr(name) in str(caught.value)
    # The remedy that the message gives works.
    (folder / "latest").write_text("step-000001\n")
    assert load(folder).step == 1


def test_keep_deletes_the_oldest_written_and_never_the_latest(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        _save(tmp_path, step, keep=2)
    assert _names(tmp_path) == {"latest", "step-000200", "step-000300"}
    # Resumed by hand from an older step: what is written now counts, not the larger number.
    _save(tmp_path, 150, keep=2)
    assert _names(tmp_path) == {"latest", "step-000150", "step-000300"}
    _save(tmp_path, 160, keep=2)
    assert _names(tmp_path) == {"latest", "step-000150", "step-000160"}
    _save(tmp_path, 170, keep=1)
    assert _names(tmp_path) == {"latest", "step-000170"}
    assert load(tmp_path).step == 170
    with pytest.raises(Fault, match="keep=0"):
        _save(tmp_path, 180, keep=0)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    _save(tmp_path, 5, value=1.0)
    _save(tmp_path, 5, value=2.0)
    assert _names(tmp_path) == {"latest", "step-000005"}
    assert load(tmp_path).tensors["model/w"][0] == 2.0


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (tmp_path / ".step-000002.123.tmp").mkdir()
    (tmp_path / ".step-000002.123.tmp" / "rank0000.safetensors").write_bytes(b"half")
    assert load(tmp_path).step == 1
    _save(tmp_path, 3)
    assert _names(tmp_path) == {"latest", "step-000001", "step-000003"}


def test_too_little_space_is_seen_before_anything_is_written() -> None:
    publish.check_space(1000, 1000, Path("c/step-000001"), "x")
    with pytest.raises(Fault, match=r"c/step-000001: it needs 3\.0 GiB and 1\.0 GiB are free.* 2\.0 GiB too few"):
        publish.check_space(3 * 2**30, 2**30, Path("c/step-000001"), "lower checkpoint.keep")


def test_a_folder_that_cannot_be_made_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Fault, match="cannot write"):
        _save(tmp_path / "file" / "checkpoints", 1)


def test_state_that_is_no_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path, 1, {}, {"x": object()})
    assert checkpoint.latest(tmp_path) is None


def test_another_model_is_named_by_its_first_difference() -> None:
    saved = {
        "model_type": "llama",
        "rope": {"factor": 16.0, "axes": [1, 2]},
        "parameters": {"a": "float32 [2, 3]", "b": "float32 [3]"},
    }
    read = json.loads(json.dumps(saved))
    checkpoint.check_same_model(read, {**saved, "rope": {"factor": 16.0, "axes": (1, 2)}})
    with pytest.raises(Fault, match=r"rope\.factor is 16\.0 in the checkpoint and 8\.0 now"):
        checkpoint.check_same_model(read, {**saved, "rope": {"factor": 8.0, "axes": [1, 2]}})
    with pytest.raises(Fault, match=r"parameters\.b is in the checkpoint and not in the model"):
        checkpoint.check_same_model(read, {**saved, "parameters": {"a": "float32 [2, 3]"}})
    with pytest.raises(Fault, match=r"lora is not in the checkpoint"):
        checkpoint.check_same_model(read, {**saved, "lora": 8})

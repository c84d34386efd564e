"""Exports of a sharded model: the files of several ranks are, bit for bit, what stock libraries save on one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import SIZES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import ringspan.parallel.context  # noqa: F401 - registers "ringspan" with transformers
from ringspan.finetune import export_weights
from ringspan.finetune.export import Export, export
from ringspan.finetune.export_weights import Part, Unit
from ringspan.finetune.loss import ChunkedLoss
from ringspan.parallel.faults import Fault
from ringspan.parallel.mesh import Sizes, mesh_of
from ringspan.parallel.parallelize import Staging, parallelize
from ringspan.parallel.testing import run_ranks

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "saved": {"target_modules": ["k_proj"], "modules_to_save": ["norm"]},
}


def build(kind: str, adapters: str | None, *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    changes = EXPERTS if kind == "mixtral" else {}
    config = AutoConfig.for_model(kind, **{**SIZES, "vocab_size": 261, "tie_word_embeddings": tied, **changes})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="ringspan", dtype=torch.float32)
    if adapters is not None:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **ADAPTERS[adapters]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def by_stock(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return what peft and transformers save."""
    model = copy.deepcopy(model)
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    plain.save_pretrained(folder)
    return weights(folder)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def by_ranks(
    group: dist.ProcessGroup, sizes: Sizes, model: Any, folder: str, max_bytes: int, broken: int | None = None
) -> dict[str, Any]:
    """Export from a mesh; return which files this rank wrote, the largest it held, and a fault."""
    mesh, rank = mesh_of(sizes, "cpu"), dist.get_rank(group)
    staging = Staging("1f1b", sizes.pp, 1, 45, 45)
    parallel = parallelize(model, mesh, loss=ChunkedLoss(16, mesh.group("tp")), staging=staging)
    export_weights.MAX_BYTES = max_bytes  # of this forked rank alone
    written: dict[str, int] = {}
    save = export_weights.save_file

    def noted(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if rank == broken:
            raise OSError(28, "No space left on device")
        written[path.name] = sum(tensor.nbytes for tensor in tensors.values())
        save(tensors, path, **options)

    export_weights.save_file = noted
    made = Export(model, tokenizer(), Path(folder))
    if rank == 0:
        made.prepare(1)
    dist.barrier(group)
    ranks = sizes.world // sizes.pp
    part = Part(mesh.place["pp"], mesh.place["dp_cp"] * sizes.tp + mesh.place["tp"], ranks)
    fault = ""
    try:
        made.write(parallel.named_modules(), part)
    except Fault as error:
        fault = str(error)
    dist.barrier(group)  # everyone gets here
    if rank == 0 and broken is None:
        made.publish()
    elif rank == 0:
        made.abandon()
    return {"written": written, "fault": fault}


MESHES = {
    "fsdp 2": Sizes(dp_shard=2),
    "replicas 2 x fsdp 2": Sizes(dp_replicate=2, dp_shard=2),
    "tp 2": Sizes(tp=2),
    "fsdp 2 x tp 2": Sizes(dp_shard=2, tp=2),
    "pp 2": Sizes(pp=2),
    "pp 2 x fsdp 2": Sizes(pp=2, dp_shard=2),
}
CASES = [
    ("fsdp 2", "llama", None, False),
    ("fsdp 2", "llama", "dora", False),
    ("fsdp 2", "qwen3", "saved", True),
    ("fsdp 2", "mixtral", None, False),
    ("replicas 2 x fsdp 2", "llama", "linear", False),
    ("tp 2", "llama", None, True),
    ("tp 2", "qwen3", "linear", False),
    ("fsdp 2 x tp 2", "llama", "linear", False),
    ("pp 2", "llama", None, True),
    ("pp 2", "qwen3", "linear", False),
    ("pp 2 x fsdp 2", "llama", "linear", False),
]


@pytest.mark.parametrize(("mesh", "kind", "adapters", "tied"), CASES)
def test_several_ranks_write_what_stock_libraries_do_on_one(
    tmp_path: Path, mesh: str, kind: str, adapters: str | None, tied: bool
) -> None:
    model, sizes, folder = build(kind, adapters, tied=tied), MESHES[mesh], tmp_path / "export"
    wanted = by_stock(model, tmp_path / "stock")
    said = run_ranks(by_ranks, sizes.world, sizes, model, str(folder), 40_000)
    found = weights(folder)
    assert set(found) == set(wanted)
    assert [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])] == []
    # No rank has written the whole, and none holds more than a file at once.
    assert all(rank["written"] for rank in said)
    everything = sum(tensor.nbytes for tensor in wanted.values())
    assert sum(sum(rank["written"].values()) for rank in said) == everything
    largest = max(tensor.nbytes for tensor in found.values()) * (4 if kind == "mixtral" else 1)  # experts are stacked
    assert max(max(rank["written"].values()) for rank in said) <= max(40_000, largest)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == everything
    assert {name: (folder / file).is_file() for name, file in index["weight_map"].items()} == dict.fromkeys(found, True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", attn_implementation="sdpa")
    assert loaded.config.tie_word_embeddings is tied
    ids = torch.arange(40)[None] * 5 % 256
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, stock(ids).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "stock"]


def test_one_file_where_all_fits_into_one(tmp_path: Path) -> None:
    model = build("llama", None)
    run_ranks(by_ranks, 2, MESHES["fsdp 2"], model, str(tmp_path / "export"), 1 << 30)
    assert [path.name for path in (tmp_path / "export").glob("model*")] == ["model.safetensors"]


def test_a_rank_whose_disk_is_full_still_gathers_for_the_others(tmp_path: Path) -> None:
    model, folder = build("llama", None), tmp_path / "export"
    export(model, tokenizer(), folder)
    older = {path.name: path.read_bytes() for path in folder.iterdir()}
    first, second = run_ranks(by_ranks, 2, MESHES["fsdp 2"], model, str(folder), 40_000, 1)
    assert "No space left on device" in second["fault"]
    assert first["fault"] == ""
    assert max(first["written"]) == "model-000-00004.safetensors"  # to the end
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == older
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "gemma3_text"])
def test_names_are_those_of_the_hub(tmp_path: Path, kind: str) -> None:
    """Transformers stacks a mixture's experts in memory; files have them one by one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, "vocab_size": 261, **EXPERTS}))
    wanted = by_stock(model, tmp_path / "stock")
    found = weights(export(model, tokenizer(), tmp_path / "export"))
    assert set(found) == set(wanted)
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_a_weight_that_fits_no_model_is_an_error_not_an_export(tmp_path: Path) -> None:
    model = build("llama", None)
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM that do not fit it: .*model\.extra\.weight"):
        export(model, tokenizer(), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_files_are_full_and_only_a_single_weight_is_larger() -> None:
    sizes = [1, 2, 1 << 31, 5, 1 << 30, 1 << 30, 7, 3 << 30, 9]
    files = list(export_weights._files(Unit(size, lambda keep: {}) for size in sizes))
    counts = [[unit.bytes for unit in file] for file in files]
    assert [size for file in counts for size in file] == sizes
    assert all(len(file) == 1 or sum(file) <= export_weights.MAX_BYTES for file in counts)
    pairs = zip(counts, counts[1:], strict=False)
    assert all(sum(file) + following[0] > export_weights.MAX_BYTES for file, following in pairs)

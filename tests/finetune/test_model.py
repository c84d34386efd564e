"""Building a model: by config or folder, with LoRA, and refusing what the loop could not train rightly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from ringspan.finetune import rope
from ringspan.finetune.model import Lora, build, read_config, read_tokenizer
from ringspan.parallel.faults import Fault

FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_a_config_gives_the_same_random_model_for_a_seed() -> None:
    first, second, other = (build(read_config(None, FIELDS), path=None, seed=seed) for seed in (1, 1, 2))
    pairs = list(zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.base.lm_head.weight, other.base.lm_head.weight)  # pyright: ignore
    assert first.base.config._attn_implementation == "ringspan"


def test_a_folder_is_loaded_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(LlamaConfig(**FIELDS)).to(torch.bfloat16)
    stock.save_pretrained(tmp_path)
    trained = build(read_config(str(tmp_path), None), path=str(tmp_path))
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert torch.equal(trained.base.lm_head.weight, stock.lm_head.weight.float())  # pyright: ignore[reportAttributeAccessIssue]


def test_lora_trains_only_the_adapters() -> None:
    lora = Lora(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
    trained = build(read_config(None, FIELDS), path=None, lora=lora)
    every, trainable = trained.counts()
    assert 0 < trainable < every / 2
    assert all(("lora_" in name) == trains for name, (_, trains) in trained.whole.items())
    with pytest.raises(Fault, match=r"lora.target_modules: .*no_such"):
        build(read_config(None, FIELDS), path=None, lora=Lora(4, 8, 0.0, ["no_such"]))


def test_rope_is_applied_and_in_the_fingerprint() -> None:
    config = read_config(None, FIELDS)
    scaled = build(config, path=None, rope=rope.work_out(config, "yarn", target_length=256))
    plain = build(read_config(None, FIELDS), path=None)
    assert scaled.fingerprint()["rope"]["factor"] == 4
    assert scaled.fingerprint() != plain.fingerprint()
    assert plain.fingerprint() == build(read_config(None, FIELDS), path=None, seed=5).fingerprint()


def test_a_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    config = Gemma2Config(
        **{
            **FIELDS,
            "model_type": "gemma2",
            "head_dim": 8,
            "attn_logit_softcapping": None,
            "sliding_window": 64,
        }
    )
    config.final_logit_softcapping = 0.05
    with pytest.raises(Fault, match="gemma2 changes its logits after the output head"):
        build(config, path=None)


@pytest.mark.parametrize(
    ("path", "fields", "made_by", "message"),
    [
        (None, {"model_type": "lama"}, None, "unknown model_type 'lama'"),
        (None, {"model_type": "bert"}, None, None),
        (None, {"model_type": "t5"}, None, "t5 is not a causal language model"),
        (
            "./nowhere",
            None,
            None,
            "model.path: ./nowhere is not there or holds no config.json; give a folder",
        ),
        ("./nowhere", None, "ringspan train x.yaml", "make it with: ringspan train x.yaml"),
    ],
)
def test_bad_models_are_named(
    path: str | None, fields: dict[str, Any] | None, made_by: str | None, message: str | None
) -> None:
    if message is None:
        assert read_config(path, fields, made_by).model_type == "bert"  # transformers knows a causal BERT
        return
    with pytest.raises(Fault, match=message):
        read_config(path, fields, made_by)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"model.tokenizer: .* cannot be read"):
        read_tokenizer(str(tmp_path))

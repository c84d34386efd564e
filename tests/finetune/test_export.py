"""Exports: stock transformers loads them and computes the same, and the live model is untouched."""

import json
import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ringspan.finetune.export import export
from ringspan.parallel.faults import Fault
from ringspan.parallel.testing import run_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
TOKENS = torch.arange(40)[None] * 5 % 256


def _model(kind: str, *, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, rope_parameters=rope))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied))
    return model.eval()


def _tokenizer() -> PreTrainedTokenizerBase:
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def _lora(model: PreTrainedModel, targets: str | list[str], **options: Any) -> PeftModel:
    with warnings.catch_warnings():
        # peft warns about adapters on tied layers; that case is what one test is about.
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return wrapped.eval()


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
    ).eval()


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().numpy().tobytes() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_stock_transformers_gives_identical_logits(tmp_path: Path, kind: str, tied: bool) -> None:
    model, tokenizer = _model(kind, tied=tied), _tokenizer()
    want, before = _logits(model), _bits(model)
    folder = export(model, tokenizer, tmp_path / "export")
    loaded = _load(folder)
    assert torch.equal(_logits(loaded), want)
    assert _bits(model) == before
    assert loaded.config.tie_word_embeddings is tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert loaded.config.to_dict()["rope_parameters"] == model.config.to_dict()["rope_parameters"]
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    assert again("def f():\n")["input_ids"] == tokenizer("def f():\n")["input_ids"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
    assert not list(folder.glob("*.bin"))


def test_dtype_is_kept_and_the_attention_implementation_is_not(tmp_path: Path) -> None:
    model = _model("llama").bfloat16()
    model.set_attn_implementation("eager")
    folder = export(model, _tokenizer(), tmp_path / "export")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in config if "attn_impl" in key]
    assert "eager" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_lora_is_merged_and_the_live_model_keeps_every_bit(tmp_path: Path, kind: str) -> None:
    model = _lora(_model(kind), "all-linear")
    want, before = _logits(model), _bits(model)
    with model.disable_adapter():
        assert (_logits(model) - want).abs().max() > 1e-2
    loaded = _load(export(model, _tokenizer(), tmp_path / "export"))
    assert (_logits(loaded) - want).abs().max() < 1e-5
    assert _bits(model) == before
    assert torch.equal(_logits(model), want)
    assert not [name for name in loaded.state_dict() if "lora" in name]
    assert not (tmp_path / "export" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("targets", "options", "still_tied"),
    [
        (["q_proj", "v_proj"], {}, True),
        (["lm_head"], {}, False),
        (["embed_tokens"], {}, False),
        (["q_proj", "down_proj"], {"use_dora": True}, True),
        (["q_proj"], {"modules_to_save": ["norm"]}, True),
    ],
)
def test_adapters_of_every_kind_on_a_tied_model(
    tmp_path: Path, targets: list[str], options: dict[str, Any], still_tied: bool
) -> None:
    base = _model("qwen3", tied=True)
    model = _lora(base, targets, **options)
    want, before = _logits(model), _bits(model)
    loaded = _load(export(model, _tokenizer(), tmp_path / "export"))
    assert (_logits(loaded) - want).abs().max() < 1e-5
    assert _bits(model) == before
    assert loaded.config.tie_word_embeddings is still_tied
    assert base.config.tie_word_embeddings is True


def test_generation_stops_at_the_tokenizers_end(tmp_path: Path) -> None:
    model, tokenizer = _model("llama"), _tokenizer()
    assert model.config.eos_token_id == 2  # the config class's default: an ordinary byte here
    folder = export(model, tokenizer, tmp_path / "export")
    generation = GenerationConfig.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert generation.eos_token_id == config["eos_token_id"] == tokenizer.eos_token_id == 256
    assert generation.bos_token_id is None
    assert model.config.eos_token_id == 2


def test_a_generation_config_that_transformers_refuses_to_save_is_mended(tmp_path: Path) -> None:
    model = _model("llama")
    assert model.generation_config is not None
    # As published with several models: loads with a warning, cannot be saved once touched.
    text = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 256}
    (tmp_path / "generation_config.json").write_text(json.dumps(text))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    folder = export(model, _tokenizer(), tmp_path / "export")
    assert GenerationConfig.from_pretrained(folder).do_sample is True


def test_an_older_export_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export(_model("qwen3"), _tokenizer(), folder)
    (folder / "stale.txt").write_text("of the older export")
    model = _model("llama")
    export(model, _tokenizer(), folder)
    assert torch.equal(_logits(_load(folder)), _logits(model))
    assert not (folder / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]


def test_disk_full_keeps_the_older_export(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    model, tokenizer = _model("llama"), _tokenizer()
    export(model, tokenizer, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def attempt(_: object) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            export(model, tokenizer, folder)
        except Fault as fault:
            return str(fault)
        return "no fault"

    [message] = run_ranks(attempt, 1)
    assert "File too large" in message
    assert str(folder) in message
    assert "\n" not in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]


def test_what_is_no_transformers_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear"):
        export(nn.Linear(2, 2), _tokenizer(), tmp_path / "export")

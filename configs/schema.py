"""What a run is: every setting, its type, its default and its rule.

Each section is a frozen model, and each field is followed by one line that says what it is. Rules
between fields stand in across.py, types of fields in fields.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from ringspan.configs.across import across
from ringspan.configs.fields import (
    Axis,
    Count,
    CountOrZero,
    Float,
    Size,
    Text,
    TextOrList,
    off,
    recompute,
)


class Section(BaseModel):
    """A part of the config: unknown keys are faults, and types are not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    """The model to train."""

    path: Text | None = None
    """Hugging Face id or local folder; exactly one of path and config."""
    config: dict[str, JsonValue] | None = None
    """Fields of a Hugging Face config, model_type among them: a model with random weights."""
    tokenizer: Text | None = None
    """Folder or Hugging Face id; default: model.path; required with model.config."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; weights, gradients and optimizer state stay in float32."""
    made_by: Text | None = None
    """The command that makes model.path or the tokenizer; named where they are missing."""


class Data(Section):
    """The text to train on."""

    path: TextOrList
    """File, folder or glob, or a list of them."""
    root: Text | None = None
    """Folder that relative paths start from, and outside of which nothing is read."""
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    """What the files are; auto: by their ending. In text, a file is a document."""
    text_field: Text = "text"
    """The field of a jsonl or parquet row that holds the text."""
    seq_length: Size
    """Tokens of a sequence, over all the ranks that share it."""
    packing: bool = True
    """Several documents in a sequence, hidden from each other; false: one document a sequence."""
    overlong: Literal["split", "drop", "truncate"] = "split"
    """What becomes of a document longer than seq_length."""
    on_bad_line: Literal["stop", "skip"] = "stop"
    """What a broken line of jsonl does; skipped lines are counted."""
    shuffle_block: CountOrZero = 0
    """Documents shuffled together; 0 keeps the order of the files."""
    made_by: Text | None = None
    """The command that makes the files; named where they are missing."""


class Train(Section):
    """The optimization."""

    learning_rate: Annotated[Float, Field(gt=0)] = 1e-4
    """The highest learning rate, reached after the warm-up."""
    max_steps: Count
    """Optimizer steps."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises from 0."""
    min_lr_ratio: Annotated[Float, Field(ge=0, le=1)] = 0.1
    """The last learning rate over the highest: where the cosine ends."""
    batch_size: Count = 1
    """Sequences in a micro-batch."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches in a step."""
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    """The norm over all gradients is clipped to this."""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """AdamW's decay of weight matrices, per step and unit of learning rate."""
    adam_beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """AdamW's memory of the gradient."""
    adam_beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    """AdamW's memory of the squared gradient."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of random weights, of the order of documents, of dropout."""
    output_dir: Text
    """The run folder: config, metrics, checkpoints, export, report."""
    activation_checkpointing: Annotated[Literal["none", "full", "selective", "offload"], BeforeValidator(recompute)] = (
        "none"
    )
    """What the backward computes anew; full: layers; selective: all but attention; offload: so, kept on the host."""
    mlp_tile: Size | None = None
    """Tokens that go through a layer's MLP at once; default: all of a rank's."""
    loss_chunk: Size = 1024
    """Tokens whose logits exist at once."""
    compile: bool = False
    """Compile each decoder layer with torch.compile."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a step whose loss or gradient is not finite does; skipped steps are counted."""


class Attention(Section):
    """How attention is computed over the ranks."""

    strategy: Literal["auto", "ring", "all_gather", "ulysses", "dist_attention", "double_ring", "ulysses_ring"] = "auto"
    """What travels: keys (ring), all keys (all_gather), heads (ulysses), queries (dist_attention); or a hybrid."""
    layout: Literal["zigzag", "contiguous", "striped", "balanced"] = "zigzag"
    """Which tokens a rank holds; zigzag: even causal work; balanced: even work of each batch's documents and layers."""
    mask: Text | None = None
    """Which keys a query sees, as causal & (window(1024) | sinks(4)); default: what each layer declares."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which dtype gradients of keys and values travel; they are summed in float32 all the same."""
    costs: Text | None = None
    """Speeds that auto reckons with, as benchmarks/links.py measures them; default: typical ones of the device."""


class Rope(Section):
    """Scaling of the rotary position embedding."""

    type: Literal["linear", "dynamic", "yarn", "llama3"]
    """The method."""
    factor: Annotated[Float, Field(gt=1)] | None = None
    """New length over the model's own; default: worked out from target_length."""
    target_length: Size | None = None
    """The context length aimed at; default: data.seq_length."""


class Lora(Section):
    """Low-rank adapters: only they are trained, and merged at the export."""

    r: Count = 8
    """Rank of the adapters."""
    alpha: Annotated[Float, Field(gt=0)] = 16.0
    """Adapters are scaled by alpha / r."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapters' input."""
    target_modules: TextOrList = "all-linear"
    """all-linear, a regular expression, or names of modules."""


class Parallel(Section):
    """How many ranks do what."""

    cp: Axis = 1
    """Ranks that share one sequence."""
    ulysses: Count = 1
    """How many of cp are close together and exchange heads for tokens; the ring is between these groups."""
    dp_shard: Axis | None = None
    """Groups with sequences of their own, which share parameters; default: 1, under other launchers -1 (the rest)."""
    dp_replicate: Axis = 1
    """Copies of the sharded model, each with sequences of its own."""
    tp: Axis = 1
    """Ranks that share each layer."""
    pp: Axis = 1
    """Pipeline stages; micro-batches are train.gradient_accumulation_steps."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """In which order pipeline stages take micro-batches."""
    engine: Literal["fsdp", "deepspeed"] = "fsdp"
    """Who shards parameters and optimizer state: FSDP2, or DeepSpeed ZeRO."""
    deepspeed: Text | dict[str, JsonValue] | None = None
    """DeepSpeed's config, a JSON file or the block itself; auto is filled in. Default: ZeRO stage 2."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which dtype FSDP2 gathers parameters to compute with; gradients are summed in float32 all the same."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory (FSDP2)."""
    timeout_s: Count = 600
    """Seconds after which a silent rank counts as lost."""


class Checkpoint(Section):
    """What is saved to resume from."""

    every: CountOrZero = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """Checkpoints kept; older ones are deleted."""
    resume: Literal["auto", "never", "fallback"] = "auto"
    """auto: go on from the latest checkpoint, if there is one; fallback: where it is damaged, the newest whole one."""
    background: bool = True
    """Write checkpoints while training goes on; false: stand still meanwhile."""


class Track(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Annotated[Literal["off", "auto", "offline", "online"], BeforeValidator(off)] = "off"
    """auto: online where an API key is known, else offline."""
    project: Text = "ringspan"
    """Weights & Biases project."""
    name: Text | None = None
    """Name of the run there."""
    log_every: Count = 1
    """Steps between lines of metrics."""


class Eval(Section):
    """Judging by documents that are not trained on."""

    path: TextOrList | None = None
    """Held-out documents: file, folder or glob, or a list of them; null: no evaluation."""
    every: CountOrZero = 0
    """Steps between held-out losses while training; 0: none."""
    documents: Count = 16
    """How many held-out documents."""
    by_position: bool = True
    """Loss by position in the document, at the end."""
    before: bool = False
    """Judge the model as it came, too."""
    passkey_lengths: list[Size] = []
    """Context lengths at which a pass key must be found; empty: no such test."""
    passkey_depths: Count = 5
    """Depths in the context at which the pass key is hidden."""
    passkey_trials: Count = 4
    """Pass keys for each length and depth."""


class Config(Section):
    """A run."""

    model: Model
    data: Data
    train: Train
    attention: Attention = Attention()
    rope: Rope | None = None
    lora: Lora | None = None
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    track: Track = Track()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _check_across(self) -> Config:
        values = {
            f"{name}.{key}": getattr(section, key)
            for name in type(self).model_fields
            if (section := getattr(self, name)) is not None
            for key in type(section).model_fields
        }
        if faults := across(values):
            lines = "; ".join(f"{fault.key}: {fault.text}" for fault in faults)
            raise PydanticCustomError("across", "{lines}", {"lines": lines})
        return self

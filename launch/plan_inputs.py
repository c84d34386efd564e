"""What is to be planned: layers of a kind, documents, layout and speeds, from the config and the options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringspan.configs.fields import parse_size
from ringspan.configs.schema import Config
from ringspan.dist_attn import Contiguous, Documents, Mask, ZigZag, parse_mask
from ringspan.dist_attn.balanced import Balanced
from ringspan.dist_attn.cost import Costs, typical
from ringspan.dist_attn.layout import Layout, Striped
from ringspan.finetune.model import heads_of, read_config
from ringspan.kernels.parts import parts_of
from ringspan.launch import plan_options
from ringspan.launch.plan_options import Options
from ringspan.parallel.faults import Fault

SIGMA = 1.0  # of the logarithm of random document lengths: a sixth of them longer than e times the median


@dataclass(frozen=True)
class Shape:
    """A model as attention sees it: layers (numbers) by their mask's text, heads, features of a head."""

    model: str
    layers: dict[str, tuple[int, ...]]
    other_layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Inputs:
    """All that a plan is made from.

    Args:
        masks: of each kind of layer, without documents; ``packed`` adds them.
        documents: boundaries of each batch row; None: each row is one document, and there is one row.
        mesh: (ranks,) or (nodes, ranks in a node).
        keep: attention's results are kept under activation checkpointing.
    """

    shape: Shape
    masks: tuple[Mask, ...]
    documents: Documents | None
    layout: Layout
    mesh: tuple[int, ...]
    length: int
    batch: int
    dtype: torch.dtype
    strategy: str
    keep: bool
    gradient_dtype: torch.dtype | None
    costs: Costs

    @property
    def world(self) -> int:
        """Ranks that share a sequence."""
        return int(np.prod(self.mesh))

    def packed(self, mask: Mask) -> Mask:
        """Return the mask with the batch's documents."""
        return mask if self.documents is None else mask & self.documents


def read(config: Config, options: Options) -> Inputs:
    """Read the model's config, documents and speeds.

    Raises:
        Fault: names the option or setting, its value and the rule.
    """
    shape = _shape(config)
    length = options.length or config.data.seq_length
    mesh = options.world or _ranks(config)
    if (world := int(np.prod(mesh))) > length:
        raise Fault(f"--world: {world} ranks must be <= the {length} tokens of a sequence, so that each has one")
    masks = tuple(checked_mask(text, shape.kv_heads, length) for text in shape.layers)
    rows = config.train.batch_size
    documents = _documents(options.documents, length, rows)
    layers = [(mask, len(numbers)) for mask, numbers in zip(masks, shape.layers.values(), strict=True)]
    layout = layout_of(config.attention.layout, layers, shape.kv_heads).fitted(documents)
    return Inputs(
        shape,
        masks,
        documents,
        layout,
        mesh,
        length,
        rows,
        getattr(torch, config.model.dtype),
        config.attention.strategy,
        config.train.activation_checkpointing in ("selective", "offload"),
        gradient_dtype(config),
        _costs(options.costs or config.attention.costs or "cuda", mesh),
    )


def _ranks(config: Config) -> tuple[int, ...]:
    """Return the mesh of ranks that share a sequence, as the config has it."""
    cp, ulysses = config.parallel.cp, config.parallel.ulysses
    if cp == -1:
        raise Fault("parallel.cp: -1 takes what the world leaves, and no world is known here; give --world")
    return (cp,) if ulysses in (1, cp) else (cp // ulysses, ulysses)


def _shape(config: Config) -> Shape:
    whole = read_config(config.model.path, config.model.config, config.model.made_by)
    hf = whole.get_text_config()
    found: dict[str, list[int]] = {}
    kinds = layer_masks(hf)
    for number, text in enumerate(kinds):
        if text is not None:
            found.setdefault(config.attention.mask or text, []).append(number)
    return Shape(
        config.model.path or whole.model_type,
        {text: tuple(numbers) for text, numbers in found.items()},
        kinds.count(None),
        *heads_of(hf),
    )


def layer_masks(hf: Any) -> list[str | None]:
    """Return the mask of each layer as transformers makes it for this config; None for a layer without attention.

    Raises:
        Fault: for a kind of attention that is refused.
    """
    count = int(hf.num_hidden_layers)
    window, chunk = getattr(hf, "sliding_window", None), getattr(hf, "attention_chunk_size", None)
    plain = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
    kinds = list(getattr(hf, "layer_types", None) or [plain] * count)
    known = {
        "full_attention": "causal",
        "sliding_attention": None if window is None else f"causal & window({window - 1})",  # it counts the query itself
        "linear_attention": None,
    }
    for number, kind in enumerate(kinds):
        if kind not in known:
            raise Fault(f"model: layer {number} of {hf.model_type} is of type {kind!r}, which ringspan cannot compute")
    return [known[kind] for kind in kinds]


def checked_mask(text: str, kv_heads: int, length: int) -> Mask:
    """Return the mask of a text, with which a causal language model of these heads can be trained.

    Raises:
        Fault: for any other.
    """
    try:
        mask = parse_mask(text)
        for part in parts_of(mask, 1, kv_heads):
            part.mask.check(length)
    except ValueError as error:
        raise Fault(f"attention.mask: {error}") from error
    if mask.documents is not None:
        raise Fault(f"attention.mask: {text!r} holds documents; these come from the data, leave them out")
    if not mask.causal:
        raise Fault(
            f"attention.mask: {text!r} shows a query later tokens, the labels it is trained on; write causal & ({text})"
        )
    return mask


def _documents(asked: plan_options.Documents | None, length: int, rows: int) -> Documents | None:
    if asked is None:
        return Documents([[0, length]] * rows) if rows > 1 else None
    if asked.kind == "even":
        if asked.count > length:
            raise Fault(f"--documents: {asked.text} asks for more documents than the {length} tokens of a sequence")
        edges = [[i * length // asked.count for i in range(asked.count + 1)]] * rows
    else:
        lengths = _random(asked.count, asked.seed) if asked.kind == "lognormal" else cycle(_listed(Path(asked.text)))
        edges = [_packed(lengths, length) for _ in range(rows)]
    return Documents(edges if rows > 1 else edges[0])


def _packed(lengths: Iterator[int], length: int) -> list[int]:
    """Lay documents end to end; the last is cut at the sequence's end."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(edges[-1] + next(lengths), length))
    return edges


def _random(mean: int, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        drawn = generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, 1024)
        yield from np.maximum(1, drawn.round()).astype(np.int64).tolist()


def _listed(path: Path) -> list[int]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise Fault(
            f"--documents: {path} cannot be read: {reason}; give a file of lengths, even:32 or lognormal:64k,0"
        ) from error
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(parse_size(line))
        except ValueError as error:
            raise Fault(f"--documents: {path}: document {number}: {line[:40]!r} {error}") from error
    if not found:
        raise Fault(f"--documents: {path} is empty; it must hold lengths in tokens, one a line")
    return found


def layout_of(name: str, layers: Sequence[tuple[Mask, int]], kv_heads: int) -> Layout:
    """Return a layout by its name in the config; balanced: by the work of all layers of the model."""
    if name == "balanced":
        return Balanced(layers, kv_heads=kv_heads)
    return {"zigzag": ZigZag, "contiguous": Contiguous, "striped": Striped}[name]()


def gradient_dtype(config: Config) -> torch.dtype | None:
    """Return the dtype of travelling gradients; None: as they are summed."""
    return torch.bfloat16 if config.attention.gradient_dtype == "bfloat16" else None


def _costs(text: str, mesh: tuple[int, ...]) -> Costs:
    """Return the speeds; a mesh says itself which ranks share a node."""
    costs = typical(text) if text in ("cuda", "cpu") else measured_costs(Path(text), "--costs")
    return replace(costs, ranks_per_node=mesh[1]) if len(mesh) == 2 else costs


def measured_costs(path: Path, name: str) -> Costs:
    """Read speeds that were measured; ``name`` is who asks, for messages."""
    try:
        costs = Costs.load(path)
        speeds = chain((link.bandwidth for link in costs.links), (costs.forward, costs.backward, costs.ranks_per_node))
        waits = chain((link.latency for link in costs.links), (costs.call,))
        if not costs.links or min(speeds) <= 0 or min(waits) < 0:
            raise ValueError("a bandwidth or rate is not above 0, a latency is below 0, or there is no link")
    except OSError as error:
        raise Fault(f"{name}: {path} cannot be read: {error.strerror}; give what benchmarks/links.py wrote") from error
    except (ValueError, TypeError, AttributeError) as error:  # TypeError: a text where a number must stand
        raise Fault(f"{name}: {path}: {error}; give what benchmarks/links.py wrote") from error
    return costs

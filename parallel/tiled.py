"""A layer's MLP on a few tokens at a time, so that its wide intermediate results exist for one tile only.

Forward keeps the MLP's input alone; backward computes each tile again and adds up what it says of the parameters, which
get their gradient once, whole. So FSDP gathers a layer once and reduces it once, however many tiles there are.

The input is saved before the MLP runs: where a layer is checkpointed and nothing after its MLP needs its result, the
recompute of the layer stops there, and the MLP is computed twice in all, as without tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("mlp", "feed_forward", "block_sparse_moe")


def tile_mlps(layers: Iterable[nn.Module], tokens: int) -> None:
    """Let each layer's MLP, or mixture of experts, run on ``tokens`` tokens at a time, in place; names stay.

    Results and gradients are the same but for the order of sums. An MLP maps each token by itself; where it returns
    several tensors, each must have a row for every token.

    Args:
        layers: of a transformers model, as ``parts_of(model).layers``, or of a pipeline stage; after tensor parallelism
            has cut them.
        tokens: of a tile, over all sequences of the batch together; the last tile may have fewer.

    Raises:
        ValueError: by name for a layer without an MLP, or whose router's logits are asked for; nothing is changed then.
    """
    if tokens < 1:
        raise ValueError(f"mlp_tile: {tokens} tokens are no tile; give at least 1, or none for all at once")
    found = [(f"layer {index} ({type(layer).__name__})", layer) for index, layer in enumerate(layers)]
    for where, mlp in [(where, _mlp_of(layer, where)) for where, layer in found]:
        mlp.forward = _Tiles(mlp.forward, mlp, tokens, where)


def _mlp_of(layer: nn.Module, where: str) -> nn.Module:
    """Return a layer's MLP.

    Raises:
        ValueError: if there is none, or tiles would lose something of it.
    """
    mlp = next((each for name in _NAMES if isinstance(each := getattr(layer, name, None), nn.Module)), None)
    if mlp is None:
        raise ValueError(f"mlp_tile: {where} has none of {', '.join(_NAMES)}; leave mlp_tile out for this model")
    configs = [getattr(module, "config", None) for module in layer.modules()]
    if any(getattr(config, "output_router_logits", False) for config in configs):
        raise ValueError(
            f"mlp_tile: {where} is asked for its router's logits, which would have no gradient; "
            "set output_router_logits=False in the model's config, or leave mlp_tile out"
        )
    return mlp


@dataclass
class _Tiles:
    """A forward that runs another one on tiles; no closure, so that a copied model runs its own."""

    run: Callable[[Tensor], Any]  # the forward of ``mlp``
    mlp: nn.Module
    tokens: int
    where: str

    @torch.compiler.disable(reason="gradients are made inside of the backward pass")
    def __call__(self, hidden_states: Tensor) -> Any:
        """Map [..., E] as ``run`` does."""
        x = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        if not x.shape[1]:
            return self.run(hidden_states)
        call, trained = _Call(self, x.device), self.trained()
        if torch.is_grad_enabled() and (x.requires_grad or trained):
            # Only a node of something that has a gradient keeps what it saves.
            saved: Any = _Save.apply(x, torch.empty(0, device=x.device, requires_grad=not x.requires_grad))
            outs: Any = _Tiled.apply(call, saved.grad_fn, x.requires_grad, saved, *trained)
        else:
            outs = call.forward(x)
        before = hidden_states.shape[:-1]
        outs = [out.reshape(*before, *out.shape[2:]) if dim else out for out, dim in zip(outs, call.dims, strict=True)]
        return outs[0] if call.single else tuple(outs)

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that get a gradient; FSDP's are whole while the layer is at work."""
        return [parameter for parameter in self.mlp.parameters() if parameter.requires_grad]


class _Save(torch.autograd.Function):
    """Keeps the MLP's input, in a node of its own: under a checkpoint the MLP need not run again to have it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        del anchor
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        del ctx
        return grads[0], None


class _Tiled(torch.autograd.Function):
    """Runs the tiles; the parameters are among its inputs so that their gradients leave by the graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, saved: Any, needed: bool, x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        del trained
        ctx.set_materialize_grads(False)
        ctx.call, ctx.saved, ctx.needed = call, saved, needed
        return call.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        (x,) = ctx.saved.saved_tensors
        return None, None, None, *ctx.call.backward(x.detach(), grads, ctx.needed)


class _Call:
    """One forward of an MLP on x [1, T, E], whose tiles can run again as they ran."""

    def __init__(self, tiles: _Tiles, device: torch.device) -> None:
        self._tiles, kind = tiles, device.type
        self._autocast: Callable[[], Any] = partial(
            torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        self._random = _Random(device)
        self.dims: list[int] = []  # where each result has its tokens: [1, T, ...] or [T, ...]
        self.single = False

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the results of all tokens."""
        wholes: list[Tensor] = []
        for span in self._spans(x.shape[1]):
            outs = self._run(x[:, span])
            if not wholes:
                wholes = [
                    out.new_empty(_longer(out, dim, x.shape[1])) for out, dim in zip(outs, self.dims, strict=True)
                ]
            for whole, out, dim in zip(wholes, outs, self.dims, strict=True):
                _rows(whole, dim, span).copy_(out)
        return tuple(wholes)

    def backward(self, x: Tensor, grads: tuple[Tensor | None, ...], needed: bool) -> list[Tensor | None]:
        """Return the gradients of x, if ``needed``, and of the parameters; ``grads`` are those of the results."""
        dx = torch.zeros_like(x) if needed else None
        sums = [_Sum() for _ in self._tiles.trained()]
        with self._random.again(), self._autocast():
            for span in self._spans(x.shape[1]):
                of_tile, *of_parameters = self._tile(x[:, span], span, grads, needed)
                if dx is not None and of_tile is not None:
                    dx[:, span] = of_tile
                for total, grad in zip(sums, of_parameters, strict=True):
                    total.add(grad)
        return [dx, *(total.result() for total in sums)]

    def _tile(
        self, x: Tensor, span: slice, grads: tuple[Tensor | None, ...], needed: bool
    ) -> tuple[Tensor | None, ...]:
        """Run one tile again and return its gradients; what it held is gone afterwards."""
        x = x.detach().requires_grad_(needed)
        with torch.enable_grad():
            outs = self._run(x)
        pairs = [
            (out, _rows(grad, dim, span))
            for out, grad, dim in zip(outs, grads, self.dims, strict=True)
            if grad is not None and out.requires_grad
        ]
        trained = self._tiles.trained()
        if not pairs:
            return (None,) * (1 + len(trained))
        wanted = [x, *trained] if needed else trained
        found = torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
        return found if needed else (None, *found)

    def _spans(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self._tiles.tokens):
            yield slice(start, min(start + self._tiles.tokens, tokens))

    def _run(self, x: Tensor) -> list[Tensor]:
        made = self._tiles.run(x)
        self.single = isinstance(made, Tensor)
        outs = [made] if self.single else list(made)
        if not self.dims:
            self.dims = [_token_dim(out, x.shape[1], self._tiles.where) for out in outs]
        return outs


class _Random:
    """The random state of a moment, to which one can go back: dropout of adapters must drop the same."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._host, self._states = torch.get_rng_state(), [torch.cuda.get_rng_state(each) for each in self._devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._host)
            for device, state in zip(self._devices, self._states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class _Sum:
    """Adds up gradients of tiles in fp32 (fp64 stays): sums of bf16 would round at every tile."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._dtype = torch.float32

    def add(self, grad: Tensor | None) -> None:
        if grad is None:
            return
        self._dtype = grad.dtype
        wide = grad if grad.dtype == torch.float64 else grad.float()
        self._total = wide if self._total is None else self._total.add_(wide)

    def result(self) -> Tensor | None:
        return None if self._total is None else self._total.to(self._dtype)


def _token_dim(out: object, tokens: int, where: str) -> int:
    """Return which dimension of an MLP's result is that of its tokens.

    Raises:
        ValueError: if it has none.
    """
    if isinstance(out, Tensor) and tuple(out.shape[:2]) == (1, tokens):
        return 1
    if isinstance(out, Tensor) and tuple(out.shape[:1]) == (tokens,):
        return 0
    found = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
    raise ValueError(
        f"mlp_tile: the MLP of {where} returns {found} for {tokens} tokens, not a row for each; leave mlp_tile out"
    )


def _longer(out: Tensor, dim: int, tokens: int) -> tuple[int, ...]:
    return (*out.shape[:dim], tokens, *out.shape[dim + 1 :])


def _rows(x: Tensor, dim: int, span: slice) -> Tensor:
    return x.narrow(dim, span.start, span.stop - span.start)

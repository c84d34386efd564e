"""Run one arm on one case, on every rank, and say how far its results are from the truth."""

from __future__ import annotations

import torch
import torch.distributed as dist
from peers import models
from peers.arm import Arm
from peers.cases import Case, tensors, truth
from torch import Tensor


def measure(group: dist.ProcessGroup, arm: Arm, case: Case, backward: bool) -> dict[str, float]:
    """Return relative RMS errors by tensor; the same on every rank."""
    if arm.level == "operator":
        return operator_errors(group, arm, case, backward)
    return model_errors(group, arm, case)


def operator_errors(group: dist.ProcessGroup, arm: Arm, case: Case, backward: bool) -> dict[str, float]:
    """Compare out, and with ``backward`` dq, dk, dv and dsinks, under a random upstream gradient."""
    assert arm.operator is not None
    given = tensors(case)
    bound = arm.operator(case, group)
    local = [cut(x, bound.rows).requires_grad_(backward) for x in (given.q, given.k, given.v)]
    sinks = None if given.sinks is None else given.sinks.clone().requires_grad_(backward)
    out = bound.call(local[0], local[1], local[2], sinks)
    found: dict[str, Tensor | None] = {"out": out}
    if backward:
        out.backward(cut(given.dout, bound.rows))
        found |= {name: x.grad for name, x in zip(("dq", "dk", "dv"), local, strict=True)}
    right = truth(case, given)
    errors = {name: sharded_error(group, tensor, right[name], bound.rows) for name, tensor in found.items()}
    if sinks is not None and backward:
        # A rank's part, summed over the group, as a trainer sums the gradients of a parameter.
        whole = torch.zeros_like(sinks) if sinks.grad is None else sinks.grad.clone()
        dist.all_reduce(whole, group=group)
        errors["dsinks"] = ratio((whole.double() - right["dsinks"]).square().sum(), right["dsinks"].square().sum())
    return errors


def cut(x: Tensor, rows: Tensor) -> Tensor:
    """Return [1, L, H, D], these rows of x; a row beyond its end is zeros."""
    inside = rows < x.shape[1]
    part = x[:, rows.clamp(max=x.shape[1] - 1)] * inside[None, :, None, None]
    return part.detach().clone()


def sharded_error(group: dist.ProcessGroup, found: Tensor | None, right: Tensor, rows: Tensor) -> float:
    """Return the relative RMS error over the rows of all ranks together."""
    inside = rows < right.shape[1]
    mine = right[:, rows[inside]]
    got = torch.zeros_like(mine) if found is None else found.detach().double()[:, inside]
    sums = torch.stack([(got - mine).square().sum(), mine.square().sum()])
    dist.all_reduce(sums, group=group)
    return ratio(sums[0], sums[1])


def ratio(error: Tensor, size: Tensor) -> float:
    """Return the root of a ratio of sums of squares; infinity for a NaN, which is no result at all."""
    value = float((error / size).sqrt())
    return value if value == value else float("inf")


def model_errors(group: dist.ProcessGroup, arm: Arm, case: Case) -> dict[str, float]:
    """Compare the loss and the worst parameter's gradient of a tiny model with one process in float64."""
    assert arm.model is not None
    right_loss, right = models.truth(case)
    model, given = models.build(case, arm.implementation), models.batch(case)
    count = int((models.shifted(given["labels"]) != -100).sum())
    bound = arm.model(case, group, model, given)
    loss = models.total_loss(bound.forward(), bound.labels, count)
    loss.backward()
    whole = loss.detach().double()
    dist.all_reduce(whole, group=group)
    errors: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        summed = grad.double()
        dist.all_reduce(summed, group=group)
        errors[name] = ratio((summed - right[name]).square().sum(), right[name].square().sum())
    return {"loss": float((whole - right_loss).abs() / right_loss.abs()), "gradients": max(errors.values())}

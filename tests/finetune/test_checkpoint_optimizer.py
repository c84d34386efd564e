"""AdamW through a checkpoint continues as if it had never stopped."""

from pathlib import Path

import pytest
import torch
from checkpoints import save
from torch import Tensor, nn
from torch.optim import AdamW

from ringspan.finetune.shards import Reader
from ringspan.parallel.faults import Fault
from ringspan.parallel.optimizer_state import restore_state, state_tensors


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def _optimizer(model: nn.Module) -> AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def _steps(model: nn.Module, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)  # the schedule's part
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_adamw_continues_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    straight = _Tiny()
    broken = _Tiny()
    broken.load_state_dict(straight.state_dict())
    a, b = _optimizer(straight), _optimizer(broken)
    _steps(straight, a, range(7))
    _steps(broken, b, range(3))
    tensors = state_tensors(b, broken.named_parameters())
    assert set(tensors) == {
        f"{name}/{key}"
        for name, _ in broken.named_parameters()
        if name != "unused"
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    reader = Reader(save(tmp_path, 3, {**broken.state_dict(), **tensors}))

    resumed = _Tiny()
    reader.fill(dict(resumed.state_dict()))
    c = _optimizer(resumed)
    shapes = {name: entry.size for name, entry in reader.tensors.items() if "/" in name}
    restore_state(c, resumed.named_parameters(), shapes, reader.fill)
    # Nothing depends on the file any more.
    for path in reader.folder.iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    _steps(resumed, c, range(3, 7))
    assert [g["weight_decay"] for g in c.param_groups] == [0.1, 0.0]
    for (name, want), got in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(want, got), name
        assert set(a.state.get(want, {})) == set(c.state.get(got, {}))
        for key, value in a.state.get(want, {}).items():
            assert torch.equal(value, c.state[got][key]), (name, key)
            assert value.dtype == c.state[got][key].dtype


def test_optimizer_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = _Tiny()
    optimizer = _optimizer(model)
    _steps(model, optimizer, range(1))
    tensors = state_tensors(optimizer, model.named_parameters())
    reader = Reader(save(tmp_path, 1, {**tensors, "first.weight/exp_avg": torch.zeros(2, 8)}))
    shapes = {name: entry.size for name, entry in reader.tensors.items()}
    with pytest.raises(Fault, match=r"another model: first\.weight/exp_avg has shape \[2, 8\] in .*, \[16, 8\] now"):
        restore_state(_optimizer(model), model.named_parameters(), shapes, reader.fill)

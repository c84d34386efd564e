"""When a run's checkpoints are written, and how ranks agree on it; how they are found again; the export at the end."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.configs.schema import Config
from ringspan.dist_attn import Disagreement
from ringspan.finetune import checkpoint, manifest, shards
from ringspan.finetune.export import Export
from ringspan.finetune.export_weights import Part
from ringspan.launch.ranks import Place
from ringspan.parallel.faults import Fault, together


class Saving:
    """Writes checkpoints of a state as the config says, while training goes on."""

    def __init__(self, config: Config, place: Place, state: Any) -> None:
        self._config, self._place, self._state = config, place, state
        self._saver = checkpoint.Saver(folder(config), rank=place.rank, world=place.world, keep=config.checkpoint.keep)
        self._facts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # of the one that is being written

    def step(self, *, last: bool) -> None:
        """After each optimizer step, on every rank: begin a checkpoint if one is due, publish one that is written.

        Raises:
            Disagreement: on every rank alike, if a rank could not write.
        """
        every, number = self._config.checkpoint.every, self._state.step
        if self._saver.step is not None and (self._all_done() or last):
            self._publish()
        if last or (every and number % every == 0):
            if self._saver.step is not None:
                self._publish()
            self._begin()
            if last or not self._config.checkpoint.background:
                self._publish()

    def _begin(self) -> None:
        place, saver, state = self._place, self._saver, self._state
        together(place.group, "checkpoint folder", lambda: saver.prepare(state.step) if place.rank == 0 else None)
        facts = {"mesh": asdict(place.sizes), "engine": self._config.parallel.engine, "versions": _versions()}
        kept = {
            "tokens": state.tokens,
            "skipped": state.skipped,
            "data": state.stream.state_dict(),
            "sequences_per_step": sequences(self._config, place),
            "fingerprint": state.trained.fingerprint(),
        }
        self._facts = {**facts, "tokens": state.tokens}, kept
        tensors = _rng(place) | state.engine.saved()
        together(place.group, f"checkpoint of step {state.step}", lambda: saver.begin(state.step, tensors))

    def _all_done(self) -> bool:
        fault, done = None, False
        try:
            done = self._saver.done()
        except Fault as error:
            fault = error
        waiting = torch.tensor([0 if done else 1, 0 if fault is None else 1])
        if self._place.group is not None:
            dist.all_reduce(waiting, group=self._place.group)
        return int(waiting[0]) == 0 or int(waiting[1]) > 0  # a fault is told when it is published

    def _publish(self) -> None:
        place, saver = self._place, self._saver
        step = saver.step
        try:
            together(place.group, f"save of step {step}", saver.wait)
            publish = (lambda: saver.publish(*self._facts)) if place.rank == 0 else (lambda: None)
            together(place.group, f"publishing step {step}", publish)
        except Disagreement:
            if place.rank == 0:
                saver.abandon()
            raise
        saver.published()


def folder(config: Config) -> Path:
    """Return the run's folder of checkpoints."""
    return Path(config.train.output_dir) / "checkpoints"


def sequences(config: Config, place: Place) -> int:
    """Return how many sequences a step trains on."""
    return config.train.batch_size * config.train.gradient_accumulation_steps * place.dp


def other_steps(found: checkpoint.Found, config: Config, place: Place) -> str | None:
    """Say so, where a step trains on more or fewer sequences than those of the checkpoint did."""
    before, now = found.state["sequences_per_step"], sequences(config, place)
    if before == now:
        return None
    return (
        f"note: a step trained on {before} sequences until step {found.step}, and on {now} from now on; to stay on the "
        f"curve give train.gradient_accumulation_steps x dp so that they are {before}"
    )


def find(config: Config, place: Place) -> checkpoint.Found | None:
    """Return the checkpoint to go on from, verified by all ranks together, or None to start afresh.

    Raises:
        Disagreement: on every rank alike, if the latest is damaged, or checkpoint.resume is never and there is one.
    """
    candidates = together(place.group, "checkpoints", lambda: _candidates(config))
    share = (place.rank, place.world)
    for number, path in enumerate(candidates):
        if config.checkpoint.resume == "fallback" and number < len(candidates) - 1:
            if _anywhere(place, manifest.damage(path, share) is not None):
                continue
        else:
            together(place.group, f"verifying {path.name}", lambda path=path: checkpoint.verify(path, share))
        return together(place.group, f"reading {path.name}", lambda path=path: checkpoint.find(path))
    return None


def restore(found: checkpoint.Found, reader: shards.Reader, state: Any, place: Place) -> None:
    """Put place in the data, counters and random state back, on whatever mesh; the engine has its own already.

    Raises:
        Fault: the checkpoint is of other data.
    """
    state.stream.load_state_dict(found.state["data"])
    state.step, state.tokens, state.skipped = found.step, found.state["tokens"], found.state["skipped"]
    for kind, current in _rng_states(place).items():
        names = [f"rng/{which}/{kind}" for which in (place.at("dp_cp"), 0)]
        name = next((name for name in names if name in reader.tensors), None)
        if name is not None and reader.tensors[name].size == current.shape:
            saved = reader.whole(name)
            torch.set_rng_state(saved) if kind == "cpu" else torch.cuda.set_rng_state(saved, place.device)


def _candidates(config: Config) -> list[Path]:
    found = checkpoint.by_age(folder(config), fallback=config.checkpoint.resume == "fallback")
    if found and config.checkpoint.resume == "never":
        raise Fault(
            f"checkpoint.resume: never, but {folder(config)} holds checkpoints; choose another train.output_dir, "
            "delete that folder, or resume with --checkpoint.resume auto"
        )
    return found


def _anywhere(place: Place, mine: bool) -> bool:
    flag = torch.tensor([int(mine)])
    if place.group is not None:
        dist.all_reduce(flag, group=place.group)
    return bool(flag[0])


def _rng_states(place: Place) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if place.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(place.device)
    return states


def _rng(place: Place) -> dict[str, Tensor]:
    """Return the random states that this rank saves: one for each place in data and sequence."""
    if place.at("tp") or place.at("pp"):
        return {}
    return {f"rng/{place.at('dp_cp')}/{kind}": state for kind, state in _rng_states(place).items()}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("ringspan", "torch", "transformers")}


def export(place: Place, state: Any, tokenizer: Any, target: Path) -> None:
    """Write the model as a Hugging Face folder, every rank its files; no rank holds all of it.

    Raises:
        Disagreement: on every rank alike, if the disk refuses; an older export stays.
    """
    made, sizes = Export(state.trained.model, tokenizer, target), place.sizes
    needed = 4 * state.trained.counts()[0] + 2**24
    together(place.group, "export folder", lambda: made.prepare(needed) if place.rank == 0 else None)
    ranks = place.world // sizes.pp
    part = Part(place.at("pp"), place.at("dp_cp") * sizes.tp + place.at("tp"), ranks)
    fault: Fault | None = None
    try:
        made.write(
            state.engine.named_modules(), part, state.engine.whole
        )  # communicates: a fault of one rank is told afterwards
    except Fault as error:
        fault = error

    def finish() -> None:
        if fault is not None:
            raise fault

    try:
        together(place.group, "export", finish)
        together(place.group, "publishing the export", lambda: made.publish() if place.rank == 0 else None)
    finally:
        if place.rank == 0:
            made.abandon()

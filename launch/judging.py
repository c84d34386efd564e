"""When a run is judged and where the results go: evaluation.json in the run folder, rewritten whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringspan.configs.schema import Config
from ringspan.finetune.evaluate import (
    Judge,
    edges_up_to,
    held_out,
    loss_by_position,
    passkey_accuracy,
)
from ringspan.finetune.model import Trained
from ringspan.launch.ranks import Place
from ringspan.parallel.faults import together


class Evaluation:
    """Held-out loss by position and pass keys, before, during and after training; nothing without ``eval.path``."""

    def __init__(self, config: Config, place: Place, tokenizer: Any, folder: Path, *, resumed: bool) -> None:
        # A resumed run, and one judged before training, adds to what it wrote; another starts anew.
        self._adds = resumed or config.eval.before
        self._config, self._place, self._tokenizer = config, place, tokenizer
        self._file = folder / "evaluation.json"
        self._edges = edges_up_to(config.data.seq_length)
        self._documents: list[list[int]] = []
        if config.eval.path is not None:
            self._documents = together(place.group, "held-out documents", lambda: self._read())
        tenth = max(1, config.eval.passkey_depths - 1)
        self._depths = [depth / tenth for depth in range(config.eval.passkey_depths)]

    def before(self, judge: Judge) -> None:
        """Judge the model as it came."""
        self._write(
            {
                "title": self._config.train.output_dir,
                **self._judged(judge, "before", lambda _: None),
            }
        )

    def during(self, judge: Judge) -> dict[str, float]:
        """Return the held-out loss, to be logged."""
        sums, counts = loss_by_position(judge, self._documents, self._edges)
        loss = sum(sums) / max(1, sum(counts))
        return {
            "eval/loss": loss,
            f"eval/ppl@{self._config.data.seq_length}": math.exp(min(loss, 50.0)),
        }

    def after(self, judge: Judge, trained: Trained, summary: dict[str, Any], say: Callable[[str], None]) -> None:
        """Judge the trained model, and write everything the report draws."""
        known = self._read_file() if self._adds else {}
        known |= summary
        known["title"] = self._title(trained)
        for name, part in self._judged(judge, "after", say).items():
            known[name] = {**known.get(name, {}), **part}
        self._write(known)

    def _judged(self, judge: Judge, when: str, say: Callable[[str], None]) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        if self._documents and self._config.eval.by_position:
            say(f"evaluating {len(self._documents)} held-out documents {when} training")
            sums, counts = loss_by_position(judge, self._documents, self._edges)
            losses = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
            parts["by_position"] = {"edges": self._edges, "tokens": counts, when: losses}
        if self._documents and self._config.eval.passkey_lengths:
            lengths = self._config.eval.passkey_lengths
            table = passkey_accuracy(
                judge,
                self._tokenizer,
                lengths=lengths,
                depths=self._depths,
                trials=self._config.eval.passkey_trials,
                filler=[token for document in self._documents for token in document],
                seed=self._config.train.seed,
                progress=say,
            )
            parts["passkey"] = {"lengths": list(lengths), "depths": self._depths, when: table}
        return parts

    def _read(self) -> list[list[int]]:
        evaluation, data = self._config.eval, self._config.data
        assert evaluation.path is not None
        return held_out(
            evaluation.path,
            self._tokenizer,
            length=data.seq_length,
            count=evaluation.documents,
            root=data.root,
            text_field=data.text_field,
        )

    def _title(self, trained: Trained) -> str:
        parameters = trained.counts()[0] / 1e6
        ranks = f"{self._place.world} rank{'s' if self._place.world > 1 else ''}"
        kind = trained.base.config.model_type
        return (
            f"{kind} {parameters:.1f} M, {self._config.data.seq_length} tokens over {ranks}, "
            f"{self._config.attention.mask or 'causal'} & documents, ring"
        )

    def _read_file(self) -> dict[str, Any]:
        return json.loads(self._file.read_text()) if self._file.is_file() else {}

    def _write(self, values: dict[str, Any]) -> None:
        if self._place.rank == 0:
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps(values, indent=1))
            os.replace(temporary, self._file)

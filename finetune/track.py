"""The numbers of a run: a line of JSON in metrics.jsonl first, then Weights & Biases if wanted.

metrics.jsonl is the record: flushed before anything else is told, strict JSON, no doubles after
a resume. W&B is a guest whose failure never stops a run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import netrc
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ringspan.parallel.faults import Fault

FILE = "metrics.jsonl"


class Tracker:
    """Writes a run's numbers; made on one rank only.

    Attributes:
        notes: what to tell the user about W&B, a line each: a fallback to offline, its death.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        wandb: str,
        project: str,
        name: str | None,
        resume_step: int = 0,
    ) -> None:
        """Open folder/metrics.jsonl, then W&B.

        Args:
            folder: the run folder; made if need be.
            config: the resolved config, shown in W&B.
            wandb: off, offline, online, or auto (online if an API key is at hand, else offline).
            project: W&B's project.
            name: the run's name in W&B; None lets W&B choose one.
            resume_step: the checkpoint's step: later lines are dropped, they will be written
                again. 0 starts a new record; one that is there becomes metrics.previous.jsonl.

        Raises:
            Fault: W&B is wanted and not installed, or online and no API key.
        """
        _check_wandb(wandb)
        self.notes: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        _cut(folder / FILE, resume_step)
        self._file = (folder / FILE).open("a", encoding="utf-8")
        self._run, self._mode = None, "off"
        if wandb != "off":
            self._run, self._mode = _open_wandb(folder, dict(config), wandb, project, name, resume_step > 0, self.notes)

    @property
    def mode(self) -> str:
        """How W&B logs: off, offline or online, after auto was decided and failures were met."""
        return self._mode

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line: step, time (Unix, s), the values; NaN, inf as null and in "nonfinite".

        Raises:
            Fault: the disk refuses.
        """
        plain = {name: v if isinstance(v, int) else float(v) for name, v in values.items()}
        strange = {name: str(v) for name, v in plain.items() if not math.isfinite(v)}
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        line |= {name: None if name in strange else v for name, v in plain.items()}
        if strange:
            line["nonfinite"] = strange
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise Fault(f"cannot append step {step} to {self._file.name}: {_line(error)}") from error
        if self._run is not None:
            self._guarded(lambda run: run.log({"step": step, **plain}))

    def finish(self, exit_code: int = 0) -> None:
        """Close both; without it W&B loses the last seconds of an offline run. Twice is once."""
        self._file.close()
        if self._run is not None:
            self._guarded(lambda run: run.finish(exit_code=exit_code))
            self._run = None

    def _guarded(self, call: Any) -> None:
        from wandb.errors import Error

        try:
            call(self._run)
        except (
            Error,
            OSError,
        ) as error:  # its service process died, or the disk it writes to is full
            self._run, self._mode = None, "off"
            self.notes.append(f"W&B stopped ({_line(error)}): {FILE} goes on")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
        Fault: another line is broken; names its number.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    out = []
    # What follows the last newline is empty, or a line whose writer was killed.
    for number, text in enumerate(lines[:-1], start=1):
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, KeyError, TypeError):
            raise Fault(f"{path} line {number} is not a JSON object with a step: {text[:60]!r}") from None
        if not isinstance(step, int):
            raise Fault(f"{path} line {number}: step {step!r} is not a whole number")
        out.append(line)
    return out


def has_api_key() -> bool:
    """Return whether W&B finds a key or token: in the environment, its settings or netrc."""
    import wandb

    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if settings.api_key or settings.identity_token_file:
        return True
    path = os.environ.get("NETRC", "~/.netrc")
    with suppress(OSError, netrc.NetrcParseError):
        hosts = netrc.netrc(os.path.expanduser(path)).hosts
        return urlsplit(settings.base_url).netloc in hosts or "api.wandb.ai" in hosts
    return False


def _check_wandb(wandb: str) -> None:
    if wandb not in ("off", "auto", "offline", "online"):
        raise Fault(f"track.wandb={wandb!r}: give off, auto, offline or online")
    if wandb == "off":
        return
    if importlib.util.find_spec("wandb") is None:
        raise Fault(f"track.wandb={wandb} needs wandb: pip install 'ringspan[wandb]', or set track.wandb=off")
    if wandb == "online" and not has_api_key():
        raise Fault("track.wandb=online finds no API key: run `wandb login`, or set track.wandb=offline")


def _open_wandb(
    folder: Path,
    config: dict[str, Any],
    wanted: str,
    project: str,
    name: str | None,
    resumes: bool,
    notes: list[str],
) -> tuple[Any, str]:
    """Return (run, mode); falls from online to offline, from offline to none, with a note."""
    import wandb
    from wandb.errors import Error

    online = wanted == "online" or (wanted == "auto" and has_api_key())
    identity = folder / "wandb" / "run_id"
    # The same id continues the same curves. Steps that are logged again lie over their old selves,
    # since the x axis is our own step and not W&B's count of calls.
    known = identity.read_text().strip() if resumes and identity.exists() else None
    for mode in ("online", "offline") if online else ("offline",):
        settings = wandb.Settings(silent=True, console="off")
        options: dict[str, Any] = {"resume": "allow"} if known and mode == "online" else {}
        try:
            run = wandb.init(
                project=project,
                name=name,
                config=config,
                dir=folder,
                mode=mode,
                id=known,
                settings=settings,
                **options,
            )
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except (Error, OSError) as error:
            then = "logging offline, `wandb sync` it later" if mode == "online" else f"{FILE} goes on"
            notes.append(f"W&B {mode} failed ({_line(error)}): {then}")
            continue
        identity.parent.mkdir(exist_ok=True)
        identity.write_text(run.id + "\n")
        return run, mode
    return None, "off"


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to step; at step 0 nothing is continued and an older record moves away."""
    if not path.exists():
        return
    if step == 0:
        os.replace(path, path.with_name("metrics.previous.jsonl"))
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

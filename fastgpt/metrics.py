"""metrics.jsonl: one JSON object a line, and a resumed run's file reads as if it had never stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_atomically


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a metrics file; a last line cut short by a kill is left out. Raises UserError."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON; expected one object a line") from None
        rows.append(row)
    return rows


class MetricsLog:
    """Appends to metrics.jsonl; lines of steps after `step` (a resume goes back to its checkpoint) are dropped, and a
    line of `step` itself that comes again (an evaluation made up for) is not written twice.

    A full disk costs no run: what it refuses is kept and goes before the next line; the first time is warned of.
    """

    def __init__(self, path: str | Path, step: int, warn: Callable[[str], None]):
        self.path, self.warn = Path(path), warn
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._there = {(row["step"], *row) for row in rows if row["step"] == step}
        self._unwritten = b""
        self._warned = False
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for the length of the run

    def write(self, row: dict[str, Any]) -> None:
        """Append one line; a number that is not finite, which JSON cannot hold, becomes null."""
        if (row["step"], *row) in self._there:
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._unwritten += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._flush("it is kept and tried again with the next line")

    def _flush(self, remedy: str) -> None:
        try:
            while self._unwritten:  # a disk may take a part of it: the rest follows
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                self.warn(f"could not write to {self.path} ({error.strerror}); {remedy}")
            self._warned = True

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._warned = False
        self._flush(f"{len(self._unwritten.splitlines())} lines are lost")
        self._file.close()

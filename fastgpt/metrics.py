"""metrics.jsonl: one JSON object a line, and a resumed run's file reads as if it had never stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import sync, write_atomically

# a number, and those that are there wherever it is
_BESIDE = {"loss": ("seconds",), "val_loss": ("seconds", "val_bits_per_byte")}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a metrics file; a last line cut short by a kill is left out, and null, for a number that is not
    finite, comes back as NaN. Raises UserError, also where a line is damaged."""
    path = Path(path)
    rows, damaged = _parse(_read(path))
    if damaged:
        raise UserError(
            f"{path}: {_lines(len(damaged))} damaged, the first is line {damaged[0]}; expected an object with a step "
            f"in each; remove what is damaged, or resume the run, which sets it aside"
        )
    return rows


def _lines(count: int) -> str:
    return "1 line is" if count == 1 else f"{count:,} lines are"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _parse(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a metrics file, and the numbers of its damaged lines; one cut short by a kill is neither."""
    rows, damaged = [], []
    *lines, cut = content.split(b"\n")
    for number, line in enumerate([*lines, cut], 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number <= len(lines):
            damaged.append(number)
    return rows, damaged


def _row(line: bytes) -> dict[str, Any] | None:
    """One line, where it is a row with a step, numbers where numbers belong, and nothing missing; else None."""
    try:
        row = json.loads(line.decode())
        if not isinstance(row, dict) or type(row["step"]) is not int:
            return None
        row = {name: math.nan if value is None else value for name, value in row.items()}
        for name, others in _BESIDE.items():
            if math.isfinite(row.get(name, math.nan)) and not all(math.isfinite(row[other]) for other in others):
                return None
        _text(row)  # a NaN may also hide in a list
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return row


def _text(row: dict[str, Any]) -> str:
    """The line of a row; a number that is not finite, which JSON cannot hold, becomes null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(row, allow_nan=False) + "\n"


def _copy(content: bytes, path: Path) -> None:
    """Raises OSError where the disk is full, leaving nothing."""
    try:
        path.write_bytes(content)
        sync(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


class MetricsLog:
    """Appends to metrics.jsonl; lines of steps after `step` (a resume goes back to its checkpoint) are dropped, and a
    line of `step` itself that comes again (an evaluation made up for) is not written twice.

    Damaged lines are left out and warned of, and the file that had them stays, as damaged-metrics-step-N.jsonl.

    A full disk costs no run: what it refuses is kept and goes before the next line; the first time is warned of.
    """

    def __init__(self, path: str | Path, step: int, warn: Callable[[str], None]):
        self.path, self.warn = Path(path), warn
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            content = _read(self.path)
            rows, damaged = _parse(content)
            if damaged:
                aside = self.path.with_name(f"damaged-{self.path.stem}-step-{step}{self.path.suffix}")
                _copy(content, aside)
                warn(f"{self.path}: {_lines(len(damaged))} damaged and left out; the file as it was is {aside.name}")
            rows = [row for row in rows if row["step"] <= step]
            write_atomically(self.path, "".join(map(_text, rows)))
        self._there = {(row["step"], *row) for row in rows if row["step"] == step}
        self._unwritten = b""
        self._warned = False
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for the length of the run

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        if (row["step"], *row) in self._there:
            return
        self._unwritten += _text(row).encode()
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

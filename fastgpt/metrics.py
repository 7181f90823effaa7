"""metrics.jsonl: one JSON object a line, and a resumed run's file reads as if it had never stopped."""

from __future__ import annotations

import json
import math
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
    """Appends to metrics.jsonl; lines of steps after `step` (a resume goes back to its checkpoint) are dropped."""

    def __init__(self, path: str | Path, step: int):
        self.path = Path(path)
        if self.path.exists():
            rows = [row for row in read_metrics(self.path) if row["step"] <= step]
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open for the length of the run

    def write(self, row: dict[str, Any]) -> None:
        """Append one line; a number that is not finite, which JSON cannot hold, becomes null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

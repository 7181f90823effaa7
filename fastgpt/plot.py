"""loss.png: how a run's loss fell, over the seconds it trained."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from .config import ConfigError, TrainConfig
from .errors import UserError
from .metrics import read_metrics

INK, MUTED, FAINT = "#1f2328", "#6e7781", "#d8dee4"
COLORS = ("#0b5cad", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be185d", "#4d7c0f")  # one for each run
LABEL_HEIGHT = 0.035  # of the axes' height: labels closer than this are moved apart
FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Run:
    """What is drawn of one run. Losses are in nats per token, `val_bits` in bits per byte."""

    folder: Path
    train_seconds: list[float]
    train_loss: list[float]
    val_seconds: list[float]
    val_loss: list[float]
    val_bits: list[float]
    bits_per_nat: Optional[float]
    """What a training loss is multiplied by for bits per byte of the training text; None where the dataset is gone."""
    ladder: dict[str, float]
    """Bits per byte of what the run is compared with, by name; empty for a run that is no demo."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @classmethod
    def read(cls, folder: Union[str, Path]) -> Run:
        """Raises UserError where there is nothing to draw."""
        folder = Path(folder)
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} holds no metrics.jsonl; give the folder of a run (train's --out_dir)")
        rows = read_metrics(folder / "metrics.jsonl")
        train = [row for row in rows if math.isfinite(row.get("loss", math.nan))]
        val = [row for row in rows if math.isfinite(row.get("val_loss", math.nan))]
        if not train and not val:
            raise UserError(f"{folder / 'metrics.jsonl'} has no losses yet; they are written every --log_every steps")
        return cls(
            folder,
            [row["seconds"] for row in train],
            [row["loss"] for row in train],
            [row["seconds"] for row in val],
            [row["val_loss"] for row in val],
            [row["val_bits_per_byte"] for row in val],
            _bits_per_nat(folder),
            _ladder(folder),
        )


def plot(run_dir: Union[str, Path], out: Union[str, Path, None] = None) -> Path:
    """`plot_runs` for one run."""
    return plot_runs([run_dir], out)


def plot_runs(
    runs: Sequence[Union[str, Path]],
    out: Union[str, Path, None] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> Path:
    """Draw the training losses and validations of runs, from their metrics.jsonl, over the seconds they trained.

    Returns the path of the picture (.png, .svg or .pdf). Unless `out` is given it is loss.png in the run's folder, for
    several runs loss-N-runs.png beside the first one's. The unit is bits per byte where the runs' datasets are still
    there to tell how many bytes a token stands for, in the training split and in the held-out one; nats per token
    elsewhere. Where a single run's folder holds a ladder.json (the demo's), its
    entries are drawn as lines and the validations are marked as sample times.

    Of several, one that cannot be drawn is left out and told of through `warn` (stderr when not given).

    Raises UserError where there is nothing to draw, the picture cannot be written, or matplotlib is missing.
    """
    warn = warn or (lambda message: print(f"fastgpt: warning: {message}", file=sys.stderr))
    if out is not None and Path(out).suffix.lower() not in FORMATS:
        raise UserError(f"cannot draw {out}: expected a name that ends in {', '.join(FORMATS)}")
    read, problems = [], []
    for run in runs:
        try:
            read.append(Run.read(run))
        except UserError as error:
            problems.append(str(error))
    if not read:
        several = f"; none of the {len(problems)} can be drawn" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{several}")
    for problem in problems:
        warn(f"left out: {problem}")
    runs = [run.folder for run in read]
    first = runs[0]
    path = first / "loss.png" if len(runs) == 1 else first.parent / f"loss-{len(runs)}-runs.png"
    path = path if out is None else Path(out)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plotting needs matplotlib: pip install matplotlib") from None

    figure = Figure(figsize=(10, 5.6), dpi=150)
    FigureCanvasAgg(figure)
    _draw(figure, read)
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, format=path.suffix[1:].lower(), facecolor="white")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; give another with --out") from None
    return path


def _draw(figure: Any, runs: list[Run]) -> None:
    bits = all(run.bits_per_nat for run in runs)
    ladder = runs[0].ladder if bits and len(runs) == 1 else {}
    axes = figure.add_axes((0.07, 0.11, 0.62 if ladder or len(runs) > 1 else 0.76, 0.77))
    labels: list[tuple[float, str, str]] = []  # at the right: height, text, colour
    lowest, highest, last = math.inf, -math.inf, 0.0
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        train = [loss * (run.bits_per_nat if bits else 1.0) for loss in run.train_loss]  # type: ignore[operator]
        val = run.val_bits if bits else run.val_loss
        who = f"{run.name}, " if len(runs) > 1 else "fastgpt, " if ladder else ""
        if train:
            smooth = smoothed(train)
            if len(runs) == 1:
                axes.plot(run.train_seconds, train, color=FAINT, linewidth=0.8, zorder=1)
            axes.plot(run.train_seconds, smooth, color=color, alpha=0.4, linewidth=1.8, zorder=2)
            if len(runs) == 1 or not val:
                labels.append(
                    (smooth[-1], f"{'' if ladder else who}training {smooth[-1]:.2f}", color if not val else MUTED)
                )
        if val:
            marker = "o" if len(val) <= 40 else None
            # not clipped: the last point lies on the edge
            axes.plot(
                run.val_seconds, val, color=color, linewidth=1.6, marker=marker, markersize=5, zorder=4, clip_on=False
            )
            labels.append((val[-1], f"{who}held out {val[-1]:.2f}", color))
        lowest = min(lowest, *train, *val)
        highest = max(highest, *(val or smoothed(train)))
        last = max(last, *run.train_seconds, *run.val_seconds)
    if ladder:
        _mark_samples(axes, runs[0].val_seconds, runs[0].val_bits)
    for name, value in ladder.items():
        axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=(0, (5, 4)), zorder=0)
        labels.append((value, f"{name} {value:.2f}", MUTED))
    lowest, highest = min([lowest, *ladder.values()]), max([highest, *ladder.values()])
    room = max(highest - lowest, 1e-3)
    axes.set_ylim(lowest - 0.08 * room, highest + 0.06 * room)  # a wild first step does not count
    axes.set_xlim(-0.01 * last, max(last, 1e-3))
    _right_labels(axes, labels)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.set_xlabel("seconds of training", color=INK, fontsize=10)
    unit = "bits per byte, each text by its own bytes per token" if bits else "nats per token"
    title = f"{runs[0].name}: {unit}" if len(runs) == 1 else unit
    axes.set_title(f"{title}; less is better", loc="left", color=INK, fontsize=11, pad=12)


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Running mean with exponentially falling weights, corrected for its start."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def _bits_per_nat(run_dir: Path) -> Optional[float]:
    """Of the training split, if the dataset in the run's configuration still has the run's tokenizer."""
    try:
        data = Path(TrainConfig.load(run_dir / "config.toml").data.path)
        if (data / "tokenizer.json").read_bytes() != (run_dir / "tokenizer.json").read_bytes():
            return None
        split = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["splits"]["train"]
        return split["tokens"] / (split["text_bytes"] + split["documents"]) / math.log(2)
    except (ConfigError, OSError, ValueError, KeyError, ZeroDivisionError):
        return None


def _ladder(run_dir: Path) -> dict[str, float]:
    try:
        return json.loads((run_dir / "ladder.json").read_text(encoding="utf-8"))["others"]
    except (OSError, ValueError, KeyError):
        return {}


def _mark_samples(axes: Any, seconds: list[float], values: list[float]) -> None:
    """Ticks, lines and values where the model was sampled and evaluated; the last value stands at the right."""
    axes.set_xticks(seconds, [f"{at:.0f}" for at in seconds])
    for at, value in zip(seconds[:-1], values[:-1], strict=True):
        axes.axvline(at, color=FAINT, linewidth=0.7, zorder=0)
        axes.annotate(
            f"{value:.2f}",
            (at, value),
            textcoords="offset points",
            xytext=(5, 6),
            color=COLORS[0],
            fontsize=9,
            zorder=5,
        )


def _right_labels(axes: Any, labels: list[tuple[float, str, str]]) -> None:
    """Names beside the ends of their lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    placed: list[float] = []
    for value, text, color in sorted(labels):
        y = (value - low) / (high - low)
        y = max(y, placed[-1] + LABEL_HEIGHT) if placed else y
        placed.append(y)
        axes.text(
            1.012,
            y,
            text,
            transform=axes.transAxes,
            color=color,
            fontsize=9,
            va="center",
            weight="bold" if color != MUTED else None,
        )

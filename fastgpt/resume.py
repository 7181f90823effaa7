"""Which checkpoint a run goes on from, and whether it is still the same run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, latest, resolve, steps_on_disk
from .config import OptimConfig, TrainConfig
from .errors import UserError
from .schedule import learning_rate_scale

if TYPE_CHECKING:
    from .data import Dataset

# What may differ between a checkpoint and the run that resumes it without changing any result.
FREE_TO_CHANGE = ("out_dir", "log_every", "device", "eval", "checkpoint", "max_bad_steps", "precision", "data.path")


def warn_of_new_run(config: TrainConfig, resume: str | None, warn: Callable[[str], None]) -> None:
    """Say that "auto" finds no run in out_dir, and which folder beside it with nearly that name has one. For whoever
    mistyped it, before anything that a new run has to say."""
    run_dir = Path(config.out_dir)
    if resume != "auto" or steps_on_disk(run_dir):
        return
    beside = run_dir.parent.iterdir() if run_dir.parent.is_dir() else ()
    near = difflib.get_close_matches(run_dir.name, [path.name for path in beside if steps_on_disk(path)], n=1)
    hint = f"; did you mean {run_dir.parent / near[0]}?" if near else ""
    warn(f"nothing to resume in {run_dir}: a new run begins there{hint}")


def find_checkpoint(config: TrainConfig, resume: str | None, warn: Callable[[str], None]) -> Checkpoint | None:
    """What a run of `config` goes on from; None where it begins anew. `resume` is as in Trainer.

    Raises UserError where out_dir holds another run, or one that nobody asked to resume.
    """
    run_dir = Path(config.out_dir)
    if resume == "auto":
        return latest(run_dir, warn)
    own = latest(run_dir, warn, optimizer=False)
    if resume is not None:
        checkpoint = resolve(resume)
        if own is not None and own.path.resolve() != checkpoint.path.resolve():
            raise UserError(f"{run_dir} already goes on to {own.path.name}; give another --out_dir")
        return checkpoint
    if own is not None:
        raise UserError(f"{run_dir} has a run up to {own.path.name}; give --resume auto or another --out_dir")
    return None


def check_same_run(
    checkpoint: Checkpoint, config: TrainConfig, dataset: Dataset, allow_changes: bool, warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The changes that the run has seen so far, those of this resume last: {"step", "changes"}.

    More steps than planned need no leave, since they are what was asked for; what they do to the learning rate is
    warned of. Raises UserError for another model or tokenizer, and for other changes without `allow_changes`.
    """
    saved, now, step = checkpoint.state["config"], config.to_dict(), checkpoint.state["step"]
    dataset.check_tokenizer(checkpoint.state["tokenizer_sha256"], owner=str(checkpoint.path))
    found = dict(differences(saved, now))
    if checkpoint.state["dataset_sha256"] != dataset.meta["sha256"]:
        found["data"] = f"what was in {saved['data']['path']} -> {config.data.path}"
    if config.precision not in ("auto", checkpoint.state["precision"]):
        found["precision"] = f"{checkpoint.state['precision']} -> {config.precision}"
    if shape := {name: change for name, change in found.items() if name.startswith("model.")}:
        raise UserError(f"{checkpoint.path} holds another model: {'; '.join(_lines(shape))}")
    longer = config.steps > saved["steps"]
    needs_leave = {name: change for name, change in found.items() if not (longer and name == "steps")}
    if needs_leave and not allow_changes:
        raise UserError(
            f"{checkpoint.path} was trained otherwise: {'; '.join(_lines(needs_leave))}; give --allow-changes to go on "
            f"so"
        )
    if longer and step:
        before = config.optim.lr * learning_rate_scale(step - 1, saved["steps"], OptimConfig.from_dict(saved["optim"]))
        after = config.optim.lr * learning_rate_scale(step, config.steps, config.optim)
        if not math.isclose(before, after, rel_tol=0.05):
            warn(
                f"the planned steps went from {saved['steps']:,} to {config.steps:,}: after step {step:,} the learning "
                f"rate goes from {before:.1e} to {after:.1e}, where the {config.optim.schedule} of the longer run is"
            )
    changes = [*checkpoint.state["changes"]]
    return [*changes, {"step": step, "changes": _lines(found)}] if found else changes


def differences(saved: dict, now: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(field, `saved value -> new value`) for every field that matters to the result."""
    for key in sorted(saved.keys() | now.keys()):
        if prefix + key in FREE_TO_CHANGE:
            continue
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, f"{a} -> {b}"


def _lines(changes: dict[str, str]) -> list[str]:
    return [f"{name}: {change}" for name, change in changes.items()]

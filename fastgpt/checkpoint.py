"""Checkpoints that survive a kill at any moment: safetensors and JSON, checksummed, renamed into place.

A run's folder:

    runs/NAME/
      config.toml  tokenizer.json  metrics.jsonl
      checkpoints/step-00001000/
        model.safetensors       the weights; for low-precision training the fp32 masters
        optimizer.safetensors   every tensor of the optimizer's state, as PARAMETER/STATE
        state.json              step, configuration, hyperparameters, and the SHA-256 of the other two

A checkpoint is written into a temporary folder beside its place, synced to the disk and renamed, so a
folder under a final name is complete. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import ConfigError, ModelConfig
from .errors import UserError
from .files import FolderLock, sync, write_atomically
from .machine import disk_free
from .units import size

if TYPE_CHECKING:
    from .model import GPT
    from .optim import AdamW

FORMAT = 1
CHECKPOINTS = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SAVE_AGAIN_SECONDS = 1.0  # between two tries of a run that is about to end
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(UserError):
    """Truncated, changed or incomplete on the disk: the one before it may serve instead."""


@dataclass
class Checkpoint:
    """What `load` returns: the tensors on the CPU, and the JSON state."""

    path: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


# ---- writing -----------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:  # the library's own name for what the disk said
        raise OSError(str(error)) from None


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    run_dir: str | Path, step: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write runs/NAME/checkpoints/step-N and return its path. Raises OSError where the disk refuses; what was
    there before is then untouched, and no temporary folder is left."""
    root = Path(run_dir) / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    final = root / folder_name(step)
    if final.exists():
        raise UserError(f"{final} exists already: this run has been here before; give another --out_dir")
    temporary = root / f".saving-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    try:
        temporary.mkdir()
        _write_tensors(weights, temporary / MODEL)
        _write_tensors(optimizer, temporary / OPTIMIZER)
        for name in (MODEL, OPTIMIZER):
            sync(temporary / name)
        state = {
            "format": FORMAT,
            "step": step,
            "sha256": {name: _sha256(temporary / name) for name in (MODEL, OPTIMIZER)},
            **state,
        }
        write_atomically(temporary / STATE, json.dumps({**state, "state_sha256": _digest(state)}, indent=1) + "\n")
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # it is there; only a power cut could still undo the rename
        sync(root)
    return final


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def hold(run_dir: Path) -> FolderLock:
    """Create a run's folder and hold it for this process. Raises UserError where another run does, and where it cannot
    be written to."""
    try:
        lock = FolderLock(run_dir, create=True)
        try:
            tempfile.TemporaryFile(dir=run_dir).close()  # without a name: a kill leaves nothing
        except OSError:
            lock.undo()
            raise
    except BlockingIOError:
        raise UserError(f"another run is training in {run_dir}; give another --out_dir") from None
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}; give another --out_dir") from None
    return lock


class Keeper:
    """Saves a run's checkpoints and keeps the newest few and the best.

    A save that the disk refuses is warned of and due again at step `retry_at`, at the latest at `last_step`, the
    run's end; the third failure in a row raises UserError. An old checkpoint that cannot be deleted is only warned of.
    """

    TRIES = 3
    RETRY_STEPS = 20

    def __init__(self, run_dir: str | Path, keep_last: int, warn: Callable[[str], None], last_step: float = math.inf):
        self.run_dir, self.keep_last, self.warn, self.last_step = Path(run_dir), keep_last, warn, last_step
        self.failures = 0
        self.retry_at: int | None = None
        self.last_saved: int | None = None
        self.kept_best: int | None = None
        """The best step whose checkpoint is on the disk: a better one may be known that could not be saved."""

    def check_space(self, model: GPT, optimizer: AdamW, keep_best: bool) -> None:
        """Warn where the disk cannot hold what this run will keep, the checkpoint being written included."""
        each = checkpoint_bytes(model, optimizer)
        at_a_time = self.keep_last + int(keep_best) + 1
        needed = each * max(1, at_a_time - len(steps_on_disk(self.run_dir)))
        free = disk_free(self.run_dir)
        if needed > free:
            self.warn(
                f"too little space at {self.run_dir}: its checkpoints need {size(needed)} more (up to {at_a_time} at a "
                f"time, {size(each)} each), {size(free)} are free; make room, lower --checkpoint.keep_last or give "
                f"another --out_dir"
            )

    def tidy(self, step: int) -> None:
        """Before a run goes on from `step`: remove what a kill left half-done, and set damaged newer checkpoints
        aside (as damaged-step-N), whose places will be needed. Only for whoever holds the run's folder."""
        root = self.run_dir / CHECKPOINTS
        for pattern in (".saving-*", ".deleting-*"):
            for leftover in root.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        for path in steps_on_disk(self.run_dir):
            if int(path.name.split("-")[1]) > step:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)  # set aside before, at the same step
                os.replace(path, aside)

    def save(
        self,
        step: int,
        weights: dict,
        optimizer: dict,
        state: dict[str, Any],
        best_step: int | None,
        leaving: bool = False,
    ) -> bool:
        """True where a checkpoint of this step is now on the disk. `leaving`: no step follows, the caller tries again
        by itself."""
        if self.last_saved == step:
            return True
        known_best = best_step is not None and best_step in (step, *self._steps())
        kept_best = best_step if known_best else self.kept_best
        try:
            save(self.run_dir, step, weights, optimizer, {**state, "kept_best": kept_best})
        except OSError as error:
            self.failures += 1
            reason = f"could not save a checkpoint in {self.run_dir} ({error.strerror or error})"
            there = self._steps()
            if self.failures >= self.TRIES:
                begin = folder_name(there[-1]) if there else "the beginning: nothing was saved so far"
                raise UserError(f"{reason}, {self.TRIES} times in a row; make room and resume, from {begin}") from None
            self.retry_at = int(min(step + self.RETRY_STEPS, self.last_step))
            again = f"in {SAVE_AGAIN_SECONDS:g} s" if leaving else f"at step {self.retry_at}"
            kept = "the older ones are kept, and it" if there else "it"
            self.warn(f"{reason}; {kept} is tried again {again}")
            return False
        self.failures, self.retry_at, self.last_saved, self.kept_best = 0, None, step, kept_best
        self._prune()
        return True

    def _steps(self) -> list[int]:
        return [int(path.name.split("-")[1]) for path in steps_on_disk(self.run_dir)]

    def _prune(self) -> None:
        for path in steps_on_disk(self.run_dir)[: -self.keep_last]:
            if self.kept_best is not None and path.name == folder_name(self.kept_best):
                continue
            try:
                # renamed first, so that a kill in the middle leaves no half-deleted folder under a final name
                doomed = path.with_name(f".deleting-{path.name}")
                os.replace(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                self.warn(f"could not delete the old checkpoint {path} ({error.strerror}); training goes on")


# ---- reading -----------------------------------------------------------------------------------


def steps_on_disk(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first (complete by name; contents not yet checked)."""
    root = Path(run_dir) / CHECKPOINTS
    found = [p for p in root.iterdir() if _NAME.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def read_state(path: str | Path) -> dict[str, Any]:
    """state.json of a checkpoint, checked. Raises UserError saying what is wrong."""
    path = Path(path)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        recorded = state.pop("state_sha256")
        if _digest(state) != recorded:
            raise DamagedCheckpoint(f"{path}: {STATE} is damaged (its checksum does not match); use another checkpoint")
        if state["format"] != FORMAT:
            raise UserError(f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}")
        state["sha256"], state["step"]
    except UserError:
        raise
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{path} is not a checkpoint: it has no {STATE}; expected .../checkpoints/step-N"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: {STATE} is damaged ({error}); use another checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: {STATE} cannot be read ({error.strerror})") from None
    return state


def _read_tensors(path: Path, expected_sha256: str | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if _sha256(path) != expected_sha256:
            raise DamagedCheckpoint(
                f"{path} is damaged (its checksum does not match state.json); use another checkpoint"
            )
        return load_file(path)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing; use another checkpoint") from None
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}); use another checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def load(path: str | Path, optimizer: bool = True) -> Checkpoint:
    """Read one checkpoint whole, checksums verified. Raises UserError; never falls back to another one."""
    path = Path(path)
    state = read_state(path)
    weights = _read_tensors(path / MODEL, state["sha256"].get(MODEL))
    moments = _read_tensors(path / OPTIMIZER, state["sha256"].get(OPTIMIZER)) if optimizer else {}
    return Checkpoint(path, weights, moments, state)


def latest(run_dir: str | Path, warn: Callable[[str], None] | None = None, optimizer: bool = True) -> Checkpoint | None:
    """The newest intact checkpoint of a run, or None where there is none at all.

    A damaged one is reported through `warn` (stderr when not given) and the one before it taken; nothing on the
    disk is changed. Raises UserError where all are damaged, or the newest is of another format.
    """
    warn = warn or (lambda message: print(f"fastgpt: warning: {message}", file=sys.stderr))
    found = steps_on_disk(run_dir)
    for path in reversed(found):
        try:
            return load(path, optimizer)
        except DamagedCheckpoint as error:
            warn(f"{error}; the one before it is tried")
    if found:
        raise UserError(f"{run_dir}: none of its {len(found)} checkpoints can be read; start a new run")
    return None


def resolve(path: str | Path, optimizer: bool = True) -> Checkpoint:
    """A checkpoint from what a user names: its own folder, or a run's folder, whose newest is taken."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a run's folder or a checkpoint in it")
    if (path / STATE).exists() or _NAME.fullmatch(path.name):
        return load(path, optimizer)
    checkpoint = latest(path, optimizer=optimizer)
    if checkpoint is None:
        raise UserError(f"{path} has no checkpoints; expected a run's folder, or one of its {CHECKPOINTS}/step-N")
    return checkpoint


# ---- model and optimizer, to and from named tensors ----------------------------------------------


def _check_keys(found: dict[str, Tensor], expected: dict[str, torch.Size], where: str | Path) -> None:
    """Raises UserError listing missing, extra and misshapen keys."""

    def listed(words: list[str], most: int = 8) -> str:
        return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")

    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "shape": [
            f"{key} {tuple(found[key].shape)}, expected {tuple(expected[key])}"
            for key in sorted(found.keys() & expected.keys())
            if found[key].shape != expected[key]
        ],
        "no floating point": sorted(key for key, value in found.items() if not value.is_floating_point()),
    }
    said = [f"{what} {listed(words)}" for what, words in problems.items() if words]
    if said:
        raise UserError(f"{where} does not fit the model: {'; '.join(said)}")


def load_weights(model: GPT, weights: dict[str, Tensor], where: str | Path) -> None:
    """Copy weights into the model. Raises UserError listing missing, extra and misshapen keys."""
    _check_keys(weights, {name: value.shape for name, value in model.state_dict().items()}, where)
    model.load_state_dict(weights)


def _parameter_names(model: GPT, optimizer: torch.optim.Optimizer, group: dict | None = None) -> list[str]:
    """The parameters' names, of one group or of all, in the order in which the optimizer's state_dict numbers them."""
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for g in ([group] if group else optimizer.param_groups) for p in g["params"]]


def training_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, optimizer state) to save. A parameter with an fp32 master is saved as its master, in the weights."""
    rows = model.logical_rows()
    weights, moments = dict(model.state_dict()), {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if name in rows and value.dim():
                value = value[: rows[name]]
            if key == "master":
                weights[name] = value
            else:
                moments[f"{name}/{key}"] = value if value.dim() else value.clone()  # step counts are shared
    return weights, moments


def checkpoint_bytes(model: GPT, optimizer: AdamW) -> int:
    """What one checkpoint takes on the disk once there is a whole state, without the headers and the JSON."""
    counts = {name: value.numel() for name, value in model.state_dict().items()}
    total = 0
    for group in optimizer.param_groups:
        for name, p in zip(_parameter_names(model, optimizer, group), group["params"], strict=True):
            width = max(4, p.element_size())
            weight = width if optimizer.uses_master(p, group) else p.element_size()
            total += counts[name] * (weight + width * len(optimizer.moments(group)))
    return total


def load_training_tensors(model: GPT, optimizer: AdamW, checkpoint: Checkpoint, other_optimizer: bool = False) -> None:
    """The inverse of `training_tensors`. Raises UserError where keys or shapes do not fit; with `other_optimizer`, a
    parameter whose state is of another kind begins afresh instead."""
    load_weights(model, checkpoint.weights, checkpoint.path / MODEL)
    names, parameters, rows = _parameter_names(model, optimizer), dict(model.named_parameters()), model.logical_rows()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    expected: dict[str, dict[str, torch.Size]] = {}  # parameter -> key -> shape
    for group in optimizer.param_groups:
        for name in _parameter_names(model, optimizer, group):
            moments = {f"{name}/{what}": shapes[name] for what in optimizer.moments(group)}
            expected[name] = {f"{name}/step": torch.Size(), **moments}
    saved = checkpoint.optimizer
    if other_optimizer:
        expected = {name: keys for name, keys in expected.items() if keys.keys() <= saved.keys()}
        saved = {key: saved[key] for keys in expected.values() for key in keys}
    if saved or checkpoint.state["step"] > 0:  # before the first step there is no state
        _check_keys(
            saved, {k: shape for keys in expected.values() for k, shape in keys.items()}, checkpoint.path / OPTIMIZER
        )

    def padded(name: str, value: Tensor) -> Tensor:
        """With the rows of zeros that a vocabulary has in memory only."""
        if name not in rows or not value.dim():
            return value
        whole = value.new_zeros(parameters[name].shape)
        whole[: rows[name]] = value
        return whole

    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, _, what = key.rpartition("/")
        state.setdefault(names.index(name), {})[what] = padded(name, value)
    for group in optimizer.param_groups:
        for name in _parameter_names(model, optimizer, group):
            if optimizer.uses_master(parameters[name], group) and names.index(name) in state:
                state[names.index(name)]["master"] = padded(name, checkpoint.weights[name].float())
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, Any]:
    """A trained model, in fp32 and ready to sample from, and its Tokenizer (None where the run has none).

    path: a run's folder (the newest checkpoint) or a checkpoint's. Raises UserError.
    """
    from .model import GPT

    checkpoint = resolve(path, optimizer=False)
    try:
        config = ModelConfig.from_dict(checkpoint.state["config"]["model"])
    except (KeyError, TypeError, ConfigError) as error:
        raise UserError(f"{checkpoint.path}: its configuration cannot be used ({error})") from None
    model = GPT(config)
    load_weights(model, {k: v.float() for k, v in checkpoint.weights.items()}, checkpoint.path / MODEL)
    model.to(device).eval()
    file = checkpoint.path.parent.parent / "tokenizer.json"
    if not file.exists():
        return model, None
    from .tokenizer import Tokenizer

    tokenizer = Tokenizer.load(file)
    if tokenizer.sha256 != checkpoint.state.get("tokenizer_sha256", tokenizer.sha256):
        raise UserError(f"{file} is not the tokenizer that {checkpoint.path} was trained with; put the right one back")
    return model, tokenizer

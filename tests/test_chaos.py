"""Runs that are killed, stopped, starved of disk and shared, all of it for real.

Every run here is a process of its own, `fastgpt train` whole. To make twenty of them cheap they are forked from one
server (`python -m tests.test_chaos`) that has imported everything and computed nothing.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import checkpoint as ckpt
from fastgpt import estimate, train
from fastgpt.config import CheckpointConfig, EvalConfig, OptimConfig
from fastgpt.metrics import read_metrics
from tests.synthetic import text_ids, write_dataset
from tests.test_train import config, curve, files

ROOT = Path(__file__).resolve().parents[1]
CANNOT = 77  # exit code of a child that may not mount

# ---- what is done inside a run, by name ----------------------------------------------------------------------------


def before(owner: Any, name: str, action) -> None:
    """Call `action` with the arguments of owner.name before every call of it."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def stop(place: str, number: int, count: int) -> None:
    """Send this process a signal at the count-th time that it comes to a place of the loop."""
    came = 0

    def come(*args, **kwargs) -> None:
        nonlocal came
        came += 1
        if came == count:
            os.kill(os.getpid(), number)

    if place == "evaluation":
        import fastgpt.data

        original = fastgpt.data.evaluation_batches

        def batches(*args, **kwargs):
            for batch in original(*args, **kwargs):
                come()
                yield batch

        fastgpt.data.evaluation_batches = batches
        return
    owner, name = {
        "micro-batch": (train.Step, "accumulate"),
        "step": (train.Trainer, "_step"),
        "save": (ckpt, "_write_tensors"),  # the second file of a checkpoint, say
        "pruning": (ckpt.Keeper, "_prune"),
        "metrics": (train.MetricsLog, "write"),
        "measuring": (train, "measure_precision"),
        "building": (train, "GPT"),
        "warnings": (estimate, "load_warning"),
    }[place]
    before(owner, name, come)


def note_batches(path: str) -> None:
    """Append the numbers of the samples of every step to a file, when it is done: a signal may drop it before."""
    from fastgpt.data import Batch, Batches

    read: dict[int, tuple[Batch, int]] = {}  # by identity: a batch that is kept is no other's
    used: list[int] = []
    batch, step = Batches.batch, train.Trainer._step

    def noted_batch(self: Batches, first: int) -> Batch:
        made = batch(self, first)
        read[id(made)] = made, first
        return made

    def noted_step(trainer: train.Trainer) -> dict[str, Any] | None:
        used.clear()
        metrics = step(trainer)
        if metrics is not None:
            with open(path, "a") as file:
                file.writelines(f"{first}\n" for first in used)
        return metrics

    before(train.Step, "accumulate", lambda step, made, divisor: used.append(read.pop(id(made))[1]))
    Batches.batch, train.Trainer._step = noted_batch, noted_step


def save_killed(run: str, call: int) -> None:
    """Instead of a run: save its newest checkpoint as the next step's, which deletes the one before, and be killed
    before the call-th call through which that reaches the disk. Ends with the number of calls where there were not so
    many."""
    made = 0

    def count(*args, **kwargs) -> None:
        nonlocal made
        made += 1
        if made == call:
            os.kill(os.getpid(), signal.SIGKILL)

    found = ckpt.latest(run)
    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        before(os, name, count)
    state = {key: found.state[key] for key in ("config", "progress")}
    keeper = ckpt.Keeper(run, 1, print)
    keeper.save(found.state["step"] + 1, found.weights, found.optimizer, state, best_step=None)
    os._exit(made)


def small_files(first: int, last: int, limit: int) -> None:
    """Before the steps `first` to `last` no file may grow past `limit` bytes: all writing fails with EFBIG."""

    def set_limit(trainer) -> None:
        now = trainer.progress.step + 1
        soft = limit if first <= now <= last else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    before(train.Trainer, "_step", set_limit)


def mount(place: str, options: str, flags: int = 0) -> None:
    """An empty file system in memory, seen by this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(b"none", place.encode(), b"tmpfs", ctypes.c_ulong(flags), options.encode())
    if done != 0:
        os._exit(CANNOT)


def own_mounts() -> None:
    """Let this process mount things that no other one sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, private = 0x10000000, 0x00020000, 0x40000 | 0x4000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_user | new_mounts) != 0:
        os._exit(CANNOT)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    libc.mount(b"none", b"/", None, ctypes.c_ulong(private), None)


def small_disk(place: str, kib: int, copy: str) -> None:
    """A disk of so many KiB at `place`; what is on it when the run is over is copied out."""
    own_mounts()
    mount(place, f"size={kib}k")
    AFTERWARDS.append(lambda: shutil.copytree(place, copy))


def full_disk(place: str) -> None:
    """A disk at `place` on which nothing more can be written."""
    small_disk(place, 4, place + "-copy")
    with open(f"{place}/filler", "wb", buffering=0) as file:
        file.write(bytes(1 << 16))


def read_only_disk(place: str) -> None:
    own_mounts()
    mount(place, "size=1m", flags=1)


def undeletable() -> None:
    """The first checkpoint that is to be deleted has something mounted in it."""
    own_mounts()
    done: list[Path] = []

    def hold(keeper) -> None:
        if (found := ckpt.steps_on_disk(keeper.run_dir)) and not done:
            (found[0] / "mounted").mkdir()
            mount(str(found[0] / "mounted"), "size=1m")
            done.append(found[0])

    before(ckpt.Keeper, "_prune", hold)


def no_model() -> None:
    """Whoever builds a model ends with an exit code of its own."""
    before(train, "GPT", lambda *args: os._exit(99))


ACTIONS = (
    stop,
    note_batches,
    save_killed,
    small_files,
    small_disk,
    full_disk,
    read_only_disk,
    undeletable,
    no_model,
)
AFTERWARDS: list = []  # what a child does when its run is over


# ---- the server and its children -------------------------------------------------------------------------------------


def serve() -> None:
    """Read requests, a JSON object a line: fork a run and answer its process id, or wait for one and answer its exit
    code."""
    import safetensors.torch  # noqa: F401 - imported once, not in every child
    import torch._dynamo  # noqa: F401 - every optimizer asks for it

    import fastgpt.data
    import fastgpt.evaluate
    import fastgpt.progress
    import fastgpt.tokenizer  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(answer, flush=True)
    os._exit(0)  # nothing is worth tidying up after


def child(request: dict[str, Any]) -> None:
    """One run, its output in a file. It does not return."""
    # whatever happens, it ends; but a long run may take its time on a busy machine, as long as it comes forward
    signal.alarm(100)
    before(train.Trainer, "_step", lambda trainer: signal.alarm(100))
    with open(request["log"], "ab", buffering=0) as log, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = 1
    try:
        for name, arguments in request["actions"]:
            next(action for action in ACTIONS if action.__name__ == name)(*arguments)
        from fastgpt.__main__ import main

        sys.argv = ["fastgpt", "train", *request["argv"]]
        code = main()
        for action in AFTERWARDS:
            action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Run:
    """A run that has been started."""

    def __init__(self, server: subprocess.Popen, argv: list[str], actions: list, log: Path):
        self.server, self.log = server, log
        log.unlink(missing_ok=True)
        self.pid = int(self._ask(dict(argv=argv, actions=actions, log=str(log))))

    def _ask(self, request: dict) -> str:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # not waited for yet, so the number is still its own

    def wait(self) -> int:
        code = int(self._ask(dict(wait=self.pid)))
        assert "Traceback" not in self.said(), self.said()
        if code == CANNOT:
            pytest.skip("this machine does not let a process mount a file system of its own")
        return code

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def complaints(self) -> list[str]:
        """Warnings, and the refusal."""
        beginnings = ("fastgpt: warning: ", "fastgpt: error: ")
        return [line for line in self.said().splitlines() if line.startswith(beginnings)]


class Runs:
    """Starts runs of one configuration in folders below `folder`."""

    def __init__(self, server: subprocess.Popen, folder: Path, data: Path):
        self.server, self.folder, self.data = server, folder, data

    def start(self, name: str, *actions: list, argv: tuple = (), **changes) -> Run:
        """Resumed, unless `argv` is given or there is nothing to resume, which is warned of."""
        file = self.folder / f"{name}.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(config(self.data, self.folder / name, **changes).to_toml())
        if not argv and ckpt.steps_on_disk(self.folder / name):
            argv = ("--resume", "auto")
        argv = ["--config", str(file), *argv]
        return Run(self.server, argv, list(actions), self.folder / f"{name}.log")

    def finish(self, name: str, *actions: list, **changes) -> Path:
        run = self.start(name, *actions, **changes)
        assert run.wait() == 0, run.said()
        return self.folder / name


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_chaos"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """62 samples and a bit: with 8 in a step, the eighth crosses the end of an epoch."""
    return write_dataset(tmp_path_factory.mktemp("data"), text_ids(1000), text_ids(300, seed=1), shard_tokens=400)


@pytest.fixture
def runs(server, tmp_path, data) -> Runs:
    return Runs(server, tmp_path, data)


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: weights, optimizer state, the whole curve, what it writes, and the state beside the clock's."""
    assert files(one) == files(other)
    assert curve(one) == curve(other)
    a, b = (ckpt.latest(run, pytest.fail).state for run in (one, other))
    for state in (a, b):
        state["progress"].pop("seconds")
        state["config"].pop("out_dir")
        state.pop("changes")
    assert a == b
    written = []
    for run in (one, other):
        model, _ = ckpt.load_model(run)
        draw = torch.Generator().manual_seed(5)
        written.append(model.generate(torch.tensor([[97, 98]]), 20, generator=draw))
    assert torch.equal(*written)


def leftovers(run: Path) -> list[str]:
    """Names in a run's folders that a kill left behind."""
    return [path.name for path in run.rglob(".*")]


# ---- kills ---------------------------------------------------------------------------------------------------------


# Where a run kills itself if nothing did so before, in its fourth step or the save after it: place, count.
LATEST = (("step", 4), ("save", 7), ("micro-batch", 8), ("save", 8))


def wait_for_steps(run: Path, count: int) -> tuple[float, float]:
    """Until so many more checkpoints are there. Returns the seconds up to the first and from there to the last."""
    began = first = time.monotonic()
    before = newest = newest_step(run)
    while newest < before + count:
        assert time.monotonic() < began + 90, f"{run} stands still at step {newest}"
        time.sleep(0.002)
        newest = newest_step(run)
        if newest == before:
            first = time.monotonic()
    return first - began, time.monotonic() - first


def newest_step(run: Path) -> int:
    found = ckpt.steps_on_disk(run)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def survives_kills(runs: Runs, kills: int, **changes) -> None:
    """SIGKILL at all kinds of moments of one run that saves after every step, and it ends as if nothing had been.

    The moments follow the run's own progress, so they fit into it whatever else the machine has to do. Of four kills
    two come in the step or the save after its second checkpoint and one at its start, each at a random moment for as
    long as that took last; the fourth is the run's own.
    """
    changes = dict(
        steps=3 * kills + 1,  # none gets further than three
        eval=EvalConfig(every=3, batch_size=4),
        checkpoint=CheckpointConfig(every=1, keep_last=2),
        **changes,
    )
    run = runs.start("whole", **changes)
    start, step = wait_for_steps(runs.folder / "whole", 1)
    assert run.wait() == 0, run.said()
    draw = random.Random(kills)
    found, reached = [], []
    for number in range(kills):
        place, count = LATEST[number // 4 % len(LATEST)]
        run = runs.start("run", ["stop", [place, signal.SIGKILL, count]], **changes)
        moment = ("start", "step", "step", "its own")[number % 4]
        if moment == "step":
            start, step = wait_for_steps(runs.folder / "run", 2)
        if moment != "its own":
            time.sleep(draw.uniform(0, start if moment == "start" else step))
            run.kill()
        assert run.wait() == -signal.SIGKILL, run.said()
        found.append(leftovers(runs.folder / "run"))
        saved = ckpt.latest(runs.folder / "run", pytest.fail)  # none is damaged, ever
        reached.append(saved.state["step"] if saved else 0)
    assert reached == sorted(reached) and len(set(reached)) >= kills * 3 // 4, f"it came forward: {reached}"
    inside = sum(any(name.startswith((".saving", ".deleting")) for name in names) for names in found)
    assert kills // 10 <= inside < kills, f"kills inside a save, and outside: {found}"
    assert_same_run(runs.finish("run", **changes), runs.folder / "whole")
    assert leftovers(runs.folder / "run") == []


def test_twenty_kills_change_nothing(runs):
    survives_kills(runs, kills=20)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16_stochastic"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fifty_kills_change_nothing(runs, precision, optimizer):
    optim = OptimConfig(optimizer=optimizer, lr=1e-2, warmup_steps=2)
    survives_kills(runs, kills=50, precision=precision, optim=optim)


def test_a_kill_at_any_moment_of_a_save_leaves_a_complete_checkpoint(runs):
    whole, copy = runs.finish("whole", steps=1), runs.folder / "copy"

    def save_until(call: int) -> int:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        return runs.start("save", ["save_killed", [str(copy), call]]).wait()

    calls = save_until(call=10**6)
    assert [path.name for path in ckpt.steps_on_disk(copy)] == ["step-00000002"] and calls >= 10
    reached = []
    for call in range(1, calls + 1):
        assert save_until(call) == -signal.SIGKILL
        for path in ckpt.steps_on_disk(copy):
            ckpt.load(path)  # half saved or half deleted, it has no such name
        found = ckpt.latest(copy, pytest.fail)
        reached.append(found.state["step"])
        if reached[-1] == 1:
            ckpt.save(copy, 2, found.weights, found.optimizer, {})  # and saving the same step again works
        ckpt.Keeper(copy, 1, pytest.fail).tidy(2)
        assert ckpt.latest(copy, pytest.fail).state["step"] == 2
        assert all(path.name.startswith("step-") for path in (copy / "checkpoints").iterdir())
    assert reached == sorted(reached) and set(reached) == {1, 2}


# ---- signals -------------------------------------------------------------------------------------------------------

# Where a run is stopped, one after the other: place, signal, how many times it has come there in its part of the run.
STOPS = (
    ("micro-batch", signal.SIGTERM, 3),  # between the two halves of the second step, which is dropped
    ("save", signal.SIGINT, 2),
    ("evaluation", signal.SIGTERM, 2),
    ("metrics", signal.SIGINT, 2),
    ("step", signal.SIGTERM, 2),
    ("pruning", signal.SIGTERM, 1),
)


@pytest.mark.parametrize(
    "precision, optimizer",
    [("float32", "adamw"), ("float32", "muon"), ("bfloat16", "muon"), ("bfloat16_stochastic", "adamw")],
)
def test_a_run_stopped_everywhere_equals_one_never_stopped(runs, precision, optimizer):
    changes = dict(precision=precision, optim=OptimConfig(optimizer=optimizer, lr=1e-2, warmup_steps=2), steps=24)
    whole = runs.finish("whole", ["note_batches", [str(runs.folder / "all")]], **changes)
    parts = ["note_batches", [str(runs.folder / "parts")]]
    reached = []
    for place in STOPS:
        run = runs.start("run", parts, ["stop", place], **changes)
        assert run.wait() == train.EXIT_INTERRUPTED, (place, run.said())
        assert run.complaints() == []
        reached.append(ckpt.steps_on_disk(runs.folder / "run")[-1].name)
    assert reached[0] == "step-00000001" and reached == sorted(reached) and reached[-1] < "step-00000024"
    assert_same_run(runs.finish("run", parts, **changes), whole)
    assert (runs.folder / "parts").read_text() == (runs.folder / "all").read_text(), "no sample is repeated or skipped"


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("place", ["measuring", "building", "warnings"])
def test_a_signal_before_the_first_step_is_one_line_and_leaves_nothing(runs, place, number, word):
    """Its folder is already made and held."""
    argv = ("--out_dir", str(runs.folder / "below" / "run"))
    changes = dict(precision="auto") if place == "measuring" else {}
    run = runs.start("run", ["stop", [place, number, 1]], argv=argv, **changes)
    assert run.wait() == 128 + number
    *before, line = run.said().splitlines()
    assert [words[:10] for words in before] == (["measuring "] if place == "measuring" else [])
    assert line == f"fastgpt: {word}; nothing was trained, and nothing written"
    assert not (runs.folder / "below").exists()


def test_a_second_signal_ends_the_process_at_once(runs):
    """In the midst of the save that the first one asked for; and nothing is corrupted."""
    whole = runs.finish("whole")
    run = runs.start("run", ["stop", ["step", signal.SIGINT, 3]], ["stop", ["save", signal.SIGINT, 2]])
    assert run.wait() == 128 + signal.SIGINT
    assert leftovers(runs.folder / "run") == [".saving-step-00000002"]
    assert_same_run(runs.finish("run"), whole)


@pytest.mark.parametrize("step", [7, 8])
def test_stopped_on_either_side_of_an_epochs_end(runs, step):
    whole = runs.finish("whole", ["note_batches", [str(runs.folder / "all")]])
    parts = ["note_batches", [str(runs.folder / "parts")]]
    assert runs.start("run", parts, ["stop", ["step", signal.SIGTERM, step + 1]]).wait() == train.EXIT_INTERRUPTED
    assert ckpt.latest(runs.folder / "run").state["step"] == step
    assert_same_run(runs.finish("run", parts), whole)
    assert (runs.folder / "parts").read_text() == (runs.folder / "all").read_text()


def test_killed_after_an_evaluation_that_was_made_up_for(runs):
    """Its line in metrics.jsonl is there once, however often it is made up for."""
    whole = runs.finish("whole")
    assert runs.start("run", ["stop", ["evaluation", signal.SIGTERM, 2]]).wait() == train.EXIT_INTERRUPTED
    for _ in range(2):  # the first step after the evaluation is the end
        assert runs.start("run", ["stop", ["micro-batch", signal.SIGKILL, 1]]).wait() == -signal.SIGKILL
    assert sum("val_loss" in row for row in read_metrics(runs.folder / "run" / "metrics.jsonl")) == 1
    assert_same_run(runs.finish("run"), whole)


# ---- disks ---------------------------------------------------------------------------------------------------------


def checkpoint_kib(run: Path) -> int:
    return sum(file.stat().st_size for file in ckpt.steps_on_disk(run)[-1].iterdir()) // 1024 + 1


def test_a_disk_that_is_full_for_a_while(runs):
    """Saves fail and lines of the metrics wait; when there is room again, nothing is missing."""
    whole = runs.finish("whole", steps=12)
    run = runs.start("run", ["small_files", [5, 8, 1200]], steps=12)
    assert run.wait() == 0
    warnings = run.complaints()
    assert sum("could not save a checkpoint" in line for line in warnings) == 1, warnings  # then not before it was said
    assert sum("metrics.jsonl (File too large); it is kept" in line for line in warnings) == 1, warnings
    assert len(warnings) == 2, warnings
    assert_same_run(runs.folder / "run", whole)
    assert leftovers(runs.folder / "run") == []


def test_a_disk_that_stays_full(runs):
    """Warned of at the start; two failed saves are survived, the third ends the run. What was saved is whole, and it
    goes on from there when there is room."""
    changes = dict(steps=12, checkpoint=CheckpointConfig(every=2, keep_last=1, keep_best=False))
    whole = runs.finish("whole", **changes)
    (runs.folder / "run").mkdir()
    kib = checkpoint_kib(whole)
    copy = runs.folder / "copy"
    run = runs.start("run", ["small_disk", [str(runs.folder / "run"), kib * 3 // 2 + 24, str(copy)]], **changes)
    assert run.wait() == 2
    short, first, second, refusal = run.complaints()
    assert short.startswith("fastgpt: warning: too little space at") and "lower --checkpoint.keep_last" in short
    for line, again in ((first, "at step 12"), (second, "in 1 s")):  # no step after the twelfth is promised
        assert line.startswith("fastgpt: warning: could not save a checkpoint in") and "No space left" in line
        assert line.endswith(f"; the older ones are kept, and it is tried again {again}")
    assert refusal.startswith("fastgpt: error: could not save a checkpoint in")
    assert refusal.endswith("3 times in a row; make room and resume, from step-00000002")
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step-00000002"]
    assert leftovers(copy) == []
    assert curve(copy) == curve(whole), "the rows up to the end are there"
    assert_same_run(runs.finish("copy", **changes), whole)


def test_enough_space_is_not_remarked_upon(runs):
    run = runs.start("run", steps=3)
    assert run.wait() == 0 and run.complaints() == []


def test_a_full_disk_at_the_start(runs):
    (runs.folder / "run").mkdir()
    run = runs.start("run", ["full_disk", [str(runs.folder / "run")]])
    assert run.wait() == 2
    short, refusal = run.complaints()
    assert "too little space" in short and "0 B are free" in short
    assert refusal == (
        f"fastgpt: error: cannot write to {runs.folder / 'run'}: No space left on device; make room there and resume"
    )
    assert leftovers(runs.folder / "run-copy") == [] and run.said().count("\n") == 2


@pytest.mark.parametrize("name", ["run", "run/below/it"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_built(runs, name):
    (runs.folder / "run").mkdir()
    place = runs.folder / "run"
    run = runs.start(
        "r", ["read_only_disk", [str(place)]], ["no_model", []], argv=("--out_dir", str(runs.folder / name))
    )
    assert run.wait() == 2
    assert len(run.complaints()) == 1 and run.said().count("\n") == 1
    assert f"cannot write to {runs.folder / name}: Read-only file system; give another --out_dir" in run.said()


def test_an_old_checkpoint_that_cannot_be_deleted(runs):
    changes = dict(steps=6, checkpoint=CheckpointConfig(every=2, keep_last=1, keep_best=False))
    whole = runs.finish("whole", **changes)
    run = runs.start("run", ["undeletable", []], **changes)
    assert run.wait() == 0
    assert len(run.complaints()) == 1 and "could not delete the old checkpoint" in run.said()
    assert "training goes on" in run.said()
    assert_same_run(runs.folder / "run", whole)


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_a_second_process_in_the_folder_is_refused_until_the_first_is_gone(runs):
    first = runs.start("run", ["stop", ["step", signal.SIGSTOP, 3]])  # it stands still, holding the folder
    metrics = runs.folder / "run" / "metrics.jsonl"
    try:
        until = time.monotonic() + 60
        while not (metrics.exists() and len(read_metrics(metrics)) >= 2) and time.monotonic() < until:
            time.sleep(0.01)
        before = metrics.read_bytes()
        second = runs.start("run")
        assert second.wait() == 2
        refusal = f"fastgpt: error: another run is training in {runs.folder / 'run'}; give another --out_dir"
        assert second.complaints() == [refusal]
        assert metrics.read_bytes() == before
    finally:
        first.kill()
    assert first.wait() == -signal.SIGKILL
    assert_same_run(runs.finish("run"), runs.finish("whole"))


if __name__ == "__main__":
    serve()

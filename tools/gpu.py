"""make gpu: what a GPU has to say about the kernels, in minutes.

    python tools/gpu.py [--out FILE.json] [--seconds 480] [--only STAGE ...] [--nanogpt PATH]

1. vectors     every function of csrc/ptx against what the emulator recorded for it (tests/ptx)
2. tests       those that need a GPU or run on one too (pytest -m gpu), beside each other where pytest-xdist is there
3. training    GPT-2's step and where its time goes, beside eager and compiled loops (benchmarks/train.py)
4. benchmarks  of the ops, beside PyTorch, torch.compile and Liger, the copy bandwidth first (benchmarks/bench_*.py)

The files that `make kernels` built are taken as they are: nothing is built, no toolkit is needed, and no package beside
torch, numpy and pytest; torch.compile needs triton. Each stage is a process of its own with its own limit; what hangs
or dies is named and the rest goes on. All results are in one JSON file, a table comes last, and the exit code is 1
where something disagreed, failed or could not be run. Without a GPU the same is shown from the emulator, without times.

Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("benchmarks", ""):
    sys.path.insert(0, str(ROOT / folder))

import harness  # noqa: E402 - found through the lines above

LOGS = ROOT / "build" / "gpu"
SECONDS = 480.0
# At most, of all the time; what is left is the benchmarks'.
SHARES = {"vectors": 0.1, "tests": 0.35, "training": 0.35}
STALL = {"vectors": 30.0, "tests": 100.0}  # seconds for one of them, after which it hangs
RESTARTS = 6
FINISHED = (0, 1, 5)  # of pytest: passed, failed, none left. Anything else: it gave up, or died
MOST_WORKERS = 10  # each has a context of its own on the GPU
TRAINS_WITH = ("tiktoken", "safetensors", "tomli_w")  # what benchmarks/train.py takes beside torch and numpy
TAIL = 40  # lines of a log that are kept where a stage failed

# What this machine has. Run by the interpreter that runs the stages.
PROBE = """
import importlib.metadata, importlib.util, json, sys
packages = ("torch", "numpy", "pytest", "xdist", "triton", *TRAINS_WITH)
found = {name: importlib.util.find_spec(name) is not None for name in packages}
if found["torch"]:
    import torch
    found |= {"version": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.is_available()}
    if found["gpu"]:
        found |= {"name": torch.cuda.get_device_name(0), "count": torch.cuda.device_count()}
        torch.zeros(1, device="cuda")
        sys.path.insert(0, ROOT)
        from fastgpt import native, ops
        native.select(torch.zeros(1, device="cuda"), "layer_norm")
        found |= {"libraries": native.libraries(), "ops": sorted(native.cuda_ops())}
        from fastgpt.native import loading
        found["nvcc"] = getattr(loading.library("cuda"), "info", {}).get("nvcc")
        import ctypes
        version = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        found["driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
print("PROBE" + json.dumps(found))
"""


class Unfit(Exception):
    """A stage cannot be run here; one line with the remedy."""


@dataclass
class Stage:
    """What came of one."""

    name: str
    state: str = "passed"
    """passed; failed: something is wrong; incomplete: out of time; skipped: it cannot be run here."""
    reason: str = ""
    seconds: float = 0.0
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: {"state": "passed", "failed", "skipped", "not run", ...}."""
    data: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    """The last lines, where it failed."""

    def count(self, state: str) -> int:
        return sum(result["state"] == state for result in self.results.values())


# ---- running -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A process whose words go to a file; at the end it and all that it started are ended."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: it is left behind
                process.wait(10)


def told(lines: Path) -> dict[str, dict[str, Any]]:
    """The last line about each name, of a file of lines of JSON; one that is cut off is passed over."""
    found: dict[str, dict[str, Any]] = {}
    if lines.exists():
        for line in lines.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if found.get(said["name"], {}).get("state") != "failed":  # a test may fail and then end badly as well
                    found[said.pop("name")] = said
    return found


def supervise(stage: Stage, command: list[str], deadline: float) -> int | None:
    """Runs what tells of each thing before and after it in $FASTGPT_LINES, and passes over what the file tells of;
    started again after one that hangs or dies, which failed. The last exit code; None where time ran out."""
    lines, log = LOGS / f"{stage.name}.jsonl", LOGS / f"{stage.name}.log"
    lines.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    code = None
    for _ in range(RESTARTS):
        before = len(told(lines))
        with started(command, log, FASTGPT_LINES=str(lines)) as process:
            stalled = waits(process, lines, deadline, STALL[stage.name])
            code = process.poll()
        out_of_time = code is None and not stalled
        if stalled:
            why = f"nothing was heard for {STALL[stage.name]:.0f} s: it hangs"
        else:
            why = "it was running when time ran out" if out_of_time else f"the process ended with code {code}"
        with lines.open("a") as file:
            begun = [name for name, said in told(lines).items() if said["state"] == "begun"]
            for name in begun:
                state = "not run" if out_of_time else "failed"
                file.write("\n" + json.dumps({"name": name, "state": state, "reason": why}) + "\n")
        stage.results = told(lines)
        stage.log = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
        if out_of_time or (code in FINISHED and not begun) or len(stage.results) == before:
            return -1 if stalled else code
    return code


def waits(process: subprocess.Popen, lines: Path, deadline: float, patience: float) -> bool:
    """Until the process ends or must end; True where it was silent for too long."""
    size, since = 0, time.monotonic()
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        now = lines.stat().st_size if lines.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > patience:
            return True
    return False


def conclude(stage: Stage, code: int | None, expected: list[str] | None = None) -> None:
    """Its state, from its results and the code."""
    for name in expected or []:
        stage.results.setdefault(name, {"state": "not run"})
    failures = stage.count("failed")
    if failures:
        stage.state, stage.reason = "failed", f"{failures} failed"
    elif code is None or stage.count("not run"):
        stage.state, stage.reason = "incomplete", "out of time"
    elif code not in (0, 5):
        stage.state, stage.reason = "failed", f"it ended with code {code}"
    elif not stage.count("passed"):
        stage.state, stage.reason = "failed", "nothing was run"
    if stage.state == "passed":
        stage.log = ""


# ---- the stages --------------------------------------------------------------------------------------------


def vectors(stage: Stage, here: dict[str, Any], deadline: float) -> None:
    if not here["numpy"]:
        raise Unfit("numpy is not installed: pip install numpy")
    command = [sys.executable, "-m", "tests.ptx.vectors"]
    if not here["gpu"]:
        command += ["--emulated"]
    listed = subprocess.run(
        [*command, "--list"], cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, deadline - time.monotonic())
    )
    if listed.returncode:
        raise Unfit((listed.stderr.strip().splitlines() or ["the vectors cannot be listed"])[-1])
    conclude(stage, supervise(stage, command, deadline), listed.stdout.split())
    stage.data["bitwise"] = sum(bool(said.get("bitwise")) for said in stage.results.values())


def tests(stage: Stage, here: dict[str, Any], deadline: float) -> None:
    if not here["pytest"]:
        raise Unfit("pytest is not installed: pip install pytest")
    # First the tests of the ops that have kernels, then those whose references run on the GPU.
    first = [*sorted((ROOT / "tests/ops").glob("test_*_gpu.py"))]
    first += [file for op in here.get("ops", []) if (file := ROOT / f"tests/ops/test_{op}.py").exists()]
    chosen = ["-m", "gpu and not slow", *map(str, first), "tests/ops", "tests/test_step.py", "tests/test_linear.py"]
    if not here["gpu"]:
        chosen = ["-m", "not slow", *map(str, sorted((ROOT / "tests/ops").glob("test_*_kernels.py")))]
    command = [sys.executable, "-m", "pytest", "-p", "tests.lines", "-p", "no:cacheprovider", "--tb=short"]
    workers = min(MOST_WORKERS, os.cpu_count() or 1) if here["gpu"] and here.get("xdist") else 0
    if workers > 1:  # what takes time is the processor; tests that need the GPU's whole memory share one worker
        command += ["-n", str(workers), "--dist", "loadgroup"]
    code = supervise(stage, [*command, *chosen], deadline)
    conclude(stage, code)


def training(stage: Stage, here: dict[str, Any], deadline: float) -> None:
    """The quick part first; with the compiled loops' minutes the rest of the time."""
    if not here["gpu"]:
        raise Unfit("without a GPU benchmarks/train.py measures the processor: run it by itself")
    if missing := [name for name in TRAINS_WITH if not here[name]]:
        raise Unfit(f"the trainer needs {', '.join(missing)}: pip install {' '.join(missing)}".replace("_", "-"))
    shape = ["--shape", "gpt2", "--batch_size", "32", "--steps", "10", "--rounds", "3"]
    peers = ["--compile"] if here["triton"] else []
    if here.get("nanogpt"):
        peers += ["--nanogpt", here["nanogpt"]]
    parts = {"profile": [*shape[:4], "--profile"], "eager": shape, "peers": [*shape, *peers]}
    if not peers:
        del parts["peers"]
    log = LOGS / "training.log"
    log.unlink(missing_ok=True)
    for name, arguments in parts.items():
        out = LOGS / f"training-{name}.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "benchmarks/train.py"), *arguments, "--out", str(out)]
        run_within(stage, name, command, log, deadline)
        if out.exists():
            stage.data[name] = json.loads(out.read_text())
    stage.log = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]) if log.exists() else ""
    conclude(stage, None if stage.count("not run") else 0)


def run_within(stage: Stage, name: str, command: list[str], log: Path, end: float) -> None:
    """A part of a stage, ended where its time ends."""
    began = time.monotonic()
    with started(command, log) as process:
        try:
            code = process.wait(max(1.0, end - began))
        except subprocess.TimeoutExpired:
            code = None
    state = "passed" if code == 0 else "not run" if code is None else "failed"
    reason = {None: f"ended after {time.monotonic() - began:.0f} s", 0: ""}.get(code, f"it ended with code {code}")
    stage.results[name] = {"state": state, "reason": reason}


def benchmarks(stage: Stage, here: dict[str, Any], deadline: float) -> None:
    files = [file for file in sorted((ROOT / "benchmarks").glob("bench_*.py")) if "operations" in file.read_text()]
    log = LOGS / "benchmarks.log"
    log.unlink(missing_ok=True)
    for number, file in enumerate(files):
        out = LOGS / f"{file.stem}.json"
        out.unlink(missing_ok=True)
        now = time.monotonic()
        limit = (deadline - now) / (len(files) - number)
        command = [sys.executable, str(file), "--seconds", f"{limit * 0.8 - 10:.0f}", "--out", str(out)]
        run_within(stage, file.stem, command, log, now + limit)
        if out.exists():
            stage.data[file.stem] = json.loads(out.read_text())
    stage.log = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]) if log.exists() else ""
    conclude(stage, None if stage.count("not run") else 0)


STAGES = {"vectors": vectors, "tests": tests, "training": training, "benchmarks": benchmarks}


def run(stage: Stage, here: dict[str, Any], deadline: float) -> None:
    """Whatever goes wrong in it is its result."""
    began = time.monotonic()
    try:
        STAGES[stage.name](stage, here, deadline)
    except Unfit as unfit:
        stage.state, stage.reason = ("failed" if here["gpu"] else "skipped"), str(unfit)
    except Exception as error:  # the other stages are worth having
        stage.state, stage.reason = "failed", f"{type(error).__name__}: {error}"
    stage.seconds = round(time.monotonic() - began, 1)


# ---- before and after ----------------------------------------------------------------------------------------


def probe() -> dict[str, Any]:
    """What there is. Raises Unfit where nothing can be run."""
    code = PROBE.replace("ROOT", repr(str(ROOT))).replace("TRAINS_WITH", repr(TRAINS_WITH))
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, cwd=ROOT)
    except subprocess.TimeoutExpired:
        raise Unfit("torch did not answer within 90 s: is the GPU in use, or gone?") from None
    said = next((line[5:] for line in done.stdout.splitlines() if line.startswith("PROBE")), None)
    if said is None:
        raise Unfit(f"torch does not run here: {(done.stderr.strip().splitlines() or ['no word of why'])[-1]}")
    here = json.loads(said)
    if not here["torch"]:
        raise Unfit(f"torch is not installed for {sys.executable}: pip install torch, or make gpu PYTHON=...")
    if tuple(int(part) for part in here["version"].split(".")[:2]) < (2, 11):
        raise Unfit(f"torch {here['version']} is too old, 2.11 is needed: pip install --upgrade torch")
    return here


def summary(stage: Stage) -> Iterator[str]:
    """For people."""
    counts = [f"{n} {state}" for state in ("passed", "failed", "skipped", "not run") if (n := stage.count(state))]
    why = f" ({stage.reason})" if stage.reason else ""
    yield f"{stage.name:11} {stage.state}{why}: {', '.join(counts) or 'nothing'}; {stage.seconds:.0f} s"
    if stage.name == "vectors" and stage.data.get("bitwise"):
        bounded = stage.count("passed") - stage.data["bitwise"]
        yield f"{'':11} {stage.data['bitwise']} to the bit, {bounded} within the bound of their roundings"
    failed = [(name, said) for name, said in stage.results.items() if said["state"] == "failed"]
    for name, said in failed[:20]:
        last = (said.get("reason") or "").strip().splitlines()
        errors = [line for line in last if line.startswith("E  ")]
        yield f"{'':11} FAILED {name}: {(errors or last or [''])[0 if errors else -1][:200]}"
    if len(failed) > 20:
        yield f"{'':11} and {len(failed) - 20} more"
    if stage.state == "failed" and not failed:
        yield from (f"{'':11} | {line}" for line in stage.log.splitlines()[-8:])
    for name, data in stage.data.items():
        yield from of_training(name, data)
        if name.startswith("bench_"):
            yield ""
            yield f"{name}:"
            yield from harness.count_table(data) if data.get("emulated") else harness.time_table(data)


def of_training(name: str, data: dict[str, Any]) -> Iterator[str]:
    """Lines of what benchmarks/train.py found, if it is that."""
    for shape, found in data.get("profile", {}).items() if isinstance(data, dict) else ():
        for loop, facts in found.items():
            groups = sorted(facts["milliseconds"].items(), key=lambda item: -item[1])
            yield f"{'':11} a step of {loop}, {shape}, profiled, ms: {', '.join(f'{g} {ms:.2f}' for g, ms in groups)}"
    for shape, found in data.get("shapes", {}).items() if isinstance(data, dict) else ():
        for loop, facts in found["loops"].items():
            mfu = f", MFU {facts['mfu']:.1%}" if facts.get("mfu") else ""
            peak = f", {facts['peak_mib']:,.0f} MiB" if facts["peak_mib"] else ""
            yield (
                f"{'':11} {shape}, {name}, {loop}: {facts['tokens_per_second']:,.0f} tokens/s, "
                f"{facts['ms_per_step']:.2f} ms{mfu}{peak}, {facts['seconds_to_first_step']:.1f} s to the first step"
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the results; otherwise benchmarks/results/gpu-<device>.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, for the training to be beside it too")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), help="some of the stages")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    LOGS.mkdir(parents=True, exist_ok=True)
    try:
        here = probe()
    except Unfit as unfit:
        print(f"fastgpt: error: {unfit}", file=sys.stderr)
        return 2
    here["nanogpt"] = str(arguments.nanogpt.resolve()) if arguments.nanogpt else None
    where = here.get("name", "no GPU")
    print(f"{where}, torch {here['version']}, Python {sys.version.split()[0]}", flush=True)
    if here["gpu"]:
        served = ", ".join(here["ops"]) or "none: " + "; ".join(row["reason"] for row in here["libraries"])
        print(f"kernels: {served}", flush=True)
        if here["nvcc"] and int(here["driver"].split(".")[0]) < int(here["nvcc"].split(".")[0]):
            print(f"The driver is for CUDA {here['driver']}, and the kernels were built with {here['nvcc']}: update "
                  "the driver, or build them with an nvcc that is no newer", flush=True)  # fmt: skip
    else:
        print("There is no GPU here: what follows is from the emulator, and nothing was timed.", flush=True)
    out = arguments.out
    if out is None and here["gpu"]:
        out = ROOT / "benchmarks" / "results" / f"gpu-{'-'.join(where.lower().split())}.json"
    elif out is None:
        out = LOGS / "emulated.json"
    result: dict[str, Any] = {"emulated": not here["gpu"], "probe": here, "machine": {}, "stages": {}}
    result["machine"] = machine(here["gpu"])
    stages = [Stage(name) for name in STAGES if name in arguments.only]
    code = 0
    try:
        for stage in stages:
            harness.show_progress(f"{stage.name} ...")
            end = began + arguments.seconds
            limit = min(end, time.monotonic() + SHARES.get(stage.name, 1.0) * arguments.seconds)
            run(stage, here, limit)
            harness.show_progress("")
            print(next(summary(stage)), flush=True)
            result["stages"][stage.name] = vars(stage)
            harness.write_result(out, result)
    except KeyboardInterrupt:
        code = 130
    print()
    for stage in stages:
        print("\n".join(summary(stage)))
    with contextlib.suppress(ValueError):
        out = out.resolve().relative_to(ROOT)
    print(f"\n{time.monotonic() - began:.0f} s; all of it is in {out}")
    return code or int(any(stage.state in ("failed", "incomplete") for stage in stages))


def machine(gpu: bool) -> dict[str, Any]:
    """With what it was measured; torch is asked in a process of its own, for a GPU here would be held."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import harness, json; "
    code += f"print('MACHINE' + json.dumps(harness.machine({'cuda' if gpu else 'cpu'!r}), default=str))"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, StopIteration, ValueError):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, cwd=ROOT)
        return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("MACHINE")))
    return {}


if __name__ == "__main__":
    sys.exit(main())

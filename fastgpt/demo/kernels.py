"""Some seconds of the kernel minute in the demo: benchmarks/kernel_minute.py of this checkout, in a process of its own.

It needs the library of the emulated kernels. Where `make kernels` has not built that, two folders of csrc are compiled
for it, once: `python -m fastgpt.demo.kernels FOLDER`. Whatever takes too long is ended, and the demo goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

from ..errors import UserError
from ..native import build, loading
from .screen import Screen

PROGRAM = build.CSRC.parent / "benchmarks" / "kernel_minute.py"  # an installed package has none
FOLDERS = ("norm", "swiglu")
BUILT = build.WORK.parent / "demo"  # where the library of these folders is
BUILD_SECONDS = 60.0
START_SECONDS = 3.0  # of the program, before its own clock runs
LAST_SECONDS = 5.0  # for a process to end when it is told to


def show(screen: Screen, seconds: float) -> None:
    """The kernels at work, in about so many seconds and never more; one line where they cannot be shown."""
    if not PROGRAM.is_file():
        return
    folder = next((folder for folder in (loading.FOLDER, BUILT) if is_there(folder)), None)
    if folder is None:
        with screen.busy(f"compiling {' and '.join(FOLDERS)} for the emulator, once; {BUILD_SECONDS:.0f} s at most"):
            why = compile_folders()
        if why:
            say(screen, f"not shown: {why}")
            return
        folder = BUILT
    screen.console.file.flush()
    command = [sys.executable, str(PROGRAM), "--library", str(folder)]
    command += ["--seconds", str(max(0.0, seconds - START_SECONDS))]
    if run(command, seconds) is None:
        say(screen, f"ended: they were to take {seconds:.0f} s; `make kernels` shows them without a limit")


def say(screen: Screen, text: str) -> None:
    """A section of one line; the program begins with an empty line too."""
    screen.print()
    screen.line("kernels", text)


def is_there(folder: Path) -> bool:
    """Whether a folder has a library of the emulated kernels that can be loaded."""
    import torch

    path = folder / loading.FILES["emulated"]
    try:
        loading.check_info(path.name, loading.read_info(path), "emulated", torch.__version__)
    except loading.Refused:
        return False
    return True


def compile_folders() -> str:
    """Makes the library in BUILT, in BUILD_SECONDS at most; why not, or nothing."""
    command = [sys.executable, "-m", "fastgpt.demo.kernels", str(BUILT)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    code = run(command, BUILD_SECONDS, cwd=build.CSRC.parent, **quiet)
    if code is None:
        return f"compiling them took longer than {BUILD_SECONDS:.0f} s; `make kernels` does it without a limit"
    if code:
        return loading.build_result("emulated", BUILT).get("reason", "they do not compile; `make kernels` says why")
    return ""


def run(command: list[str], seconds: float, **options: Any) -> Optional[int]:
    """The exit code of a command; None: it took longer, and was ended with everything that it had started."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # by an interrupt too
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LAST_SECONDS)


def main(folder: str) -> int:
    """Compiles FOLDERS into a library there; returns 2 where that cannot be."""
    try:
        result = build.build("emulated", out=Path(folder), folders=FOLDERS)
    except UserError as error:
        print(f"fastgpt: error: {error}", file=sys.stderr)
        return 2
    return 0 if result["status"] == "built" else 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

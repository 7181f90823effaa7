"""Makes .venv with everything that `make demo` or `make test` needs; does nothing when it is there already.

    tools/python.sh tools/environment.py demo|test

`demo` installs fastgpt, what draws its plot and, where a g++ is and no GPU, CUDA's headers (5 MB), with which it shows
the kernels; `test` also what the tests and the linter need. Versions come from constraints.txt, packages from
pyproject.toml, and where to download from is pip's own configuration. Needs only the standard library, and a Python
that can be without ensurepip (Debian's python3-venv).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NoReturn, Optional
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = {"demo": "plot", "test": "dev"}  # of pyproject.toml; dev includes plot
NEEDED_BY = {"demo": "`make demo` needs", "test": "kernels and tests need"}
BUILD_TOOLS = ["setuptools", "wheel", "ninja", "pybind11"]  # build-system.requires: the package is built in place
OLDEST_PIP = (24, 1)  # the first that reports its progress in a form that can be read
CUDA_HEADERS = "cuda-toolkit[cudart,cccl,crt]==13.0.*"  # 5 MB; of the CUDA that torch's own pin asks for
DISASSEMBLER = [
    "nvidia-cuda-cuobjdump>=13,<14",
    "nvidia-cuda-nvdisasm>=13,<14",
]  # of any CUDA
TERMINAL = sys.stdout.isatty()


def fail(message: str) -> NoReturn:
    print(f"fastgpt: error: {message}", file=sys.stderr)
    sys.exit(2)


def megabytes(size: float) -> str:
    return (
        f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 9.5e6 else f"{size / 1e6:.1f} MB"
    )


def torch_pin() -> str:
    """The version in constraints.txt, its only home."""
    return re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)  # type: ignore[union-attr]


def nvidia_gpu() -> bool:
    """True where an NVIDIA GPU answers."""
    program = shutil.which("nvidia-smi")
    if not program:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def cuda_tools(level: str) -> list[str]:
    """From the package index: what the emulator's library needs beside g++, where there is no CUDA toolkit; and for the
    tests, where there is one without a disassembler, that, for benchmarks/static.py."""
    sys.path.insert(0, str(ROOT))
    from fastgpt.errors import UserError
    from fastgpt.native import toolchain

    demo = level == "demo"  # which shows kernels where it can, and goes on where it cannot
    try:
        toolchain.require_platform()
        if demo:
            toolchain.find_compiler(toolchain.OLDEST_GXX_FOR_EMULATOR)
    except (toolchain.Missing, UserError):
        return []
    try:
        toolchain.find_nvcc()
    except toolchain.Missing:
        return [CUDA_HEADERS]
    except UserError as error:
        if not demo:
            fail(str(error))
    if demo:
        return []
    try:
        toolchain.find_cuobjdump()
    except toolchain.Missing:
        return DISASSEMBLER
    return []


# ---- the stamp: what was installed, so that the next call has nothing to do -------------------


def wanted(gpu: bool) -> str:
    """Changes whenever the environment has to be looked at again."""
    digest = hashlib.sha256(repr((str(ROOT), gpu)).encode())
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def installed(level: str, want: str) -> bool:
    """True if .venv holds `level` (test covers demo) and its interpreter still runs."""
    done = any((VENV / f"{name}.stamp").is_file() and (VENV / f"{name}.stamp").read_text() == want
               for name in (level, "test"))  # fmt: skip
    return done and runs()


def runs() -> bool:
    try:
        return subprocess.run([PYTHON, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


# ---- making .venv, with or without ensurepip -------------------------------------------------


def make_venv() -> None:
    if VENV.exists() and not runs():
        if not (VENV / "pyvenv.cfg").is_file():
            fail(f"{VENV} exists and is no virtual environment: move it away")
        shutil.rmtree(VENV)  # its interpreter has moved or gone
    if not VENV.exists():
        ways = (
            [sys.executable, "-m", "venv", str(VENV)],
            [sys.executable, "-m", "virtualenv", "-q", str(VENV)],
            ["virtualenv", "-q", "-p", sys.executable, str(VENV)],
        )
        for way in ways:
            if succeeds(way):
                break
            shutil.rmtree(VENV, ignore_errors=True)
        else:
            # Without ensurepip there is no pip inside, but the one outside can install it there.
            bare = succeeds([sys.executable, "-m", "venv", "--without-pip", str(VENV)])
            outside = [sys.executable, "-m", "pip", "-q", "--python", str(PYTHON), "install", "pip"]
            if not (bare and succeeds(outside)):
                shutil.rmtree(VENV, ignore_errors=True)
                fail(
                    f"{sys.executable} cannot make a virtual environment: install its venv package "
                    "(Debian, Ubuntu: apt install python3-venv), or pip install virtualenv, and run this again"
                )
    version = subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, text=True).stdout
    found = re.match(r"pip (\d+)\.(\d+)", version)
    if not found:
        shutil.rmtree(VENV)
        return make_venv()
    if (int(found[1]), int(found[2])) < OLDEST_PIP:
        succeeds([str(PYTHON), "-m", "pip", "-q", "install", "--upgrade", "pip"])  # an old one will do if this fails


def succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


# ---- what pip would download, and how large it is --------------------------------------------


def pip(*arguments: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def size_of(url: str) -> Optional[int]:
    """Bytes of the file behind a URL, None when the server does not say."""
    parts = urlsplit(url)
    try:
        if parts.scheme == "file":
            return os.path.getsize(unquote(parts.path))
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return None


def plan(requirements: list[str]) -> Optional[list[tuple[str, str, Optional[int]]]]:
    """(name, version, bytes) of each package that pip would download; None where pip cannot tell."""
    asked = subprocess.run(
        pip("install", "-q", "--dry-run", "--report", "-", *requirements), capture_output=True, text=True
    )
    if asked.returncode:
        return None
    try:
        items = json.loads(asked.stdout[asked.stdout.index("{") :])["install"]
    except ValueError:
        return None
    items = [item for item in items if "dir_info" not in item["download_info"]]  # not this project itself
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda item: size_of(item["download_info"]["url"]), items))
    return [
        (item["metadata"]["name"], item["metadata"]["version"], size) for item, size in zip(items, sizes, strict=True)
    ]


def announce(packages: list[tuple[str, str, Optional[int]]], gpu: bool) -> None:
    if not packages:
        return
    total = sum(size or 0 for _, _, size in packages)
    largest = sorted(packages, key=lambda package: -(package[2] or 0))[:4]
    names = ", ".join(f"{name} {version} ({megabytes(size)})" if size else f"{name} {version}"
                      for name, version, size in largest)  # fmt: skip
    unknown = sum(size is None for _, _, size in packages)
    sizes = f"{megabytes(total)}{f' and {unknown} of unknown size' if unknown else ''}"
    say(f"  {len(packages)} packages, {sizes}: {names}{', ...' if len(packages) > len(largest) else ''}")
    torch = next((version for name, version, _ in packages if name == "torch"), "")
    cuda = any(name.startswith("nvidia-cudnn") for name, _, _ in packages)  # which torch alone needs
    if cuda and not gpu:
        say(
            "  There is no NVIDIA GPU here, but pip's configured indexes have only the CUDA build of torch: it works,\n"
            "  and is large. For the small one press Ctrl-C, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels\n"
            "  (its 'Get Started' page names it), and run this again."
        )
    if gpu and torch.endswith("+cpu"):
        say("  There is an NVIDIA GPU here, but pip's configured indexes offer only the CPU build of torch.")
    free = shutil.disk_usage(ROOT).free
    if total * 4 > free:  # the download itself and what it unpacks to
        say(f"  The disk has {megabytes(free)} free, perhaps too little: wheels unpack to about 3 times their size.")


# ---- installing, with one live line ----------------------------------------------------------


def say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read our output has gone; the work goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def install(requirements: list[str]) -> None:
    """Runs pip; on a terminal one line says what it is doing. On an error pip's own words are shown."""
    raw = ["--progress-bar", "raw"] if progress_can_be_read() else []
    command = pip("install", *raw, *requirements)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    started, log, doing = time.monotonic(), [], "resolving versions"
    try:
        for line in process.stdout:  # type: ignore[union-attr]
            line = line.strip()
            progress = re.match(r"Progress (\d+) of (\d+)", line)
            if not progress:
                log.append(line)
            if found := re.match(r"(?:Downloading|Processing) (?:\S*/)?(\S+?)-\d\S*\.(?:whl|tar\.gz)", line):
                doing = f"fetching {found[1]}"
            elif line.startswith("Installing collected"):
                doing = "unpacking"
            elif line.startswith("Building "):
                doing = "building fastgpt, with its CUDA kernels where an nvcc is"
            if TERMINAL:
                share = f" {int(progress[1]) / max(1, int(progress[2])):4.0%}" if progress else ""
                text = f"  {doing}{share}  {time.monotonic() - started:.0f} s"
                print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        if TERMINAL:
            print("\r\033[K", end="", flush=True)
    if process.returncode:
        say("\n".join("  " + line for line in log[-15:]))
        fail("pip could not install the packages (its last words are above); mend that and run this again")


def progress_can_be_read() -> bool:
    help_text = subprocess.run(pip("install", "--help"), capture_output=True, text=True).stdout
    return "raw" in help_text


def main(level: str) -> None:
    gpu = nvidia_gpu()
    want = wanted(gpu)
    if installed(level, want):
        return
    started = time.monotonic()
    kind = "an NVIDIA GPU" if gpu else "no NVIDIA GPU"
    say(f"Setting up .venv with what {NEEDED_BY[level]}: Python {sys.version.split()[0]}, {kind}")
    make_venv()
    constraints = ["-c", str(ROOT / "constraints.txt")]
    install([*constraints, *BUILD_TOOLS])
    package = ["--no-build-isolation", *constraints, "-e", f"{ROOT}[{EXTRAS[level]}]"]
    package += cuda_tools(level) if level == "test" else []
    # With a GPU the exact version keeps pip from preferring a +cpu build, which counts as newer than the plain one.
    choices = [f"torch==={torch_pin()}", f"torch=={torch_pin()}"] if gpu else [f"torch=={torch_pin()}"]
    for torch in choices:
        packages = plan([torch, *package])
        if packages is not None:
            announce(packages, gpu)
            break
    if level == "demo" and not gpu:
        os.environ.setdefault("FASTGPT_CUDA", "0")  # kernels that nothing here could run
    elif level == "test" and not os.environ.get("FASTGPT_CUDA"):
        say("  fastgpt comes last, with its CUDA kernels where an nvcc is: that takes a minute or two on two cores")
    install([*constraints, torch])  # first and alone: the kernels are compiled against its headers
    install([torch, *package])
    if level == "demo" and not gpu and (tools := cuda_tools(level)):
        succeeds(pip("install", *constraints, *tools))  # or the demo leaves the kernels out
    (VENV / f"{level}.stamp").write_text(want)
    size = sum(file.stat().st_size for file in VENV.rglob("*") if file.is_file() and not file.is_symlink())
    say(f"  ready in {time.monotonic() - started:.0f} s; .venv holds {megabytes(size)}")


if __name__ == "__main__":
    if sys.argv[1:] not in (["demo"], ["test"]):
        fail(f"expected one of {', '.join(EXTRAS)}, got {' '.join(sys.argv[1:]) or 'nothing'}")
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        print("\nStopped; run the same command again to go on.", file=sys.stderr)
        sys.exit(130)

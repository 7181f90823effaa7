"""What each kernel takes of a multiprocessor, read from what ptxas says while it compiles; run by ninja.

    python resources.py compile OUT COMMAND...     runs nvcc, and writes its kernels to OUT as JSON
    python resources.py join OUT IN...             the header that `csrc/host/info.cpp` puts into the library

So a library tells its registers and shared memory where there is neither a GPU nor a toolkit. Standard library only,
and nothing of the package: this file is run by its path.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

_KERNEL = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_NUMBERS = {
    "registers": re.compile(r"Used (\d+) registers"),
    "shared_bytes": re.compile(r"(\d+) bytes smem"),
    "local_bytes": re.compile(r"(\d+) bytes stack frame"),
    "spilled_bytes": re.compile(r"(\d+) bytes spill stores"),
}


def parse(said: str) -> tuple[list[dict[str, Any]], str]:
    """The kernels in what ptxas said with -v, and what it said besides."""
    kernels: list[dict[str, Any]] = []
    others = []
    for line in said.splitlines(keepends=True):
        found = _KERNEL.search(line)
        if found:
            kernels.append({"name": found[1], "arch": found[2], **dict.fromkeys(_NUMBERS, 0)})
            continue
        of_kernel = line.startswith("ptxas info") or re.match(r"\s+\d+ bytes stack frame", line)
        if not of_kernel:
            others.append(line)
        elif kernels:
            numbers = {name: pattern.search(line) for name, pattern in _NUMBERS.items()}
            kernels[-1].update({name: int(number[1]) for name, number in numbers.items() if number})
    return kernels, "".join(others)


def demangled(names: list[str]) -> list[str]:
    """As they are written in C++, where the tool that knows (binutils' c++filt) is here."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    plain = done.stdout.splitlines()
    return plain if done.returncode == 0 and len(plain) == len(names) else names


def compile_and_note(out: Path, command: list[str]) -> int:
    """Run a compiler and write down its kernels; returns its exit code."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    kernels, others = parse(done.stderr)
    sys.stderr.write(others)
    serialised = [line for line in done.stderr.splitlines(keepends=True) if "Potential Performance Loss" in line]
    if serialised:  # a wgmma that waits where it should not: the code is slow, and ptxas only mentions it
        sys.stderr.write("".join(serialised))
        return 1
    if done.returncode == 0:
        for kernel, name in zip(kernels, demangled([kernel["name"] for kernel in kernels]), strict=True):
            plain = re.sub(r"^void |\(anonymous namespace\)::|fastgpt::", "", name)
            kernel["name"] = re.sub(r"\([^()]*\)$", "", plain)  # without its parameters
        out.write_text(json.dumps(kernels), encoding="utf-8")
    return done.returncode


def join(out: Path, parts: list[Path]) -> None:
    """One header of all parts; left alone where it says the same already."""
    kernels = [kernel for part in parts for kernel in json.loads(part.read_text(encoding="utf-8"))]
    kernels.sort(key=lambda kernel: (kernel["name"], kernel["arch"]))
    pieces = (f'R"json({piece})json"' for piece in _pieces(json.dumps(kernels)))
    text = f"#define FASTGPT_KERNELS {' '.join(pieces)}\n"
    if not out.is_file() or out.read_text(encoding="utf-8") != text:
        out.write_text(text, encoding="utf-8")


def _pieces(text: str, size: int = 8192) -> list[str]:
    """Compilers may refuse a literal of more than 64 KiB; pieces that follow each other are one."""
    return [text[start : start + size] for start in range(0, len(text), size)]


def main(arguments: list[str]) -> int:
    """See the top of the file."""
    task, out, *rest = arguments
    if task == "compile":
        return compile_and_note(Path(out), rest)
    join(Path(out), [Path(name) for name in rest])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

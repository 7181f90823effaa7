"""What the machine code of the CUDA kernels says of them: registers, shared and local memory, instructions by kind.

Read from `_ops.so` by cuobjdump, which is part of CUDA toolkits and comes from the package index too; no GPU is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastgpt.native import toolchain

# What the system keeps of each block's shared memory; for these architectures cuobjdump counts it with the block's own.
RESERVED_SHARED, OLDEST_ARCH_WITH_RESERVED_SHARED = 1024, 90

# Kinds of instructions, in the order in which a table shows them, and the opcodes (SASS) that are one. The first fits.
KINDS = {
    "LDG.128": r"LDG(?!STS)\S*\.128",
    "LDG": r"LDG(?!STS)|LD\b",
    "STG.128": r"STG\S*\.128",
    "STG.64": r"STG\S*\.64",
    "STG.16": r"STG\S*\.[US](?:16|8)\b",
    "STG": r"STG|ST\b",
    "LDS": r"LDS(?!M)",
    "STS": r"STS(?!M)",
    "LDL": r"LDL",
    "STL": r"STL",
    "ATOM": r"ATOM|RED\b(?!UX)",
    "SHFL": r"SHFL",
    "BAR": r"BAR",
    "LDGSTS": r"LDGSTS",
    "UTMALDG": r"UTMALDG",
    "UTMASTG": r"UTMASTG|UTMAREDG",
    "SYNCS": r"SYNCS",
    "LDSM": r"LDSM",
    "STSM": r"STSM",
    "HMMA": r"HMMA|IMMA|DMMA",
    "HGMMA": r"HGMMA|QGMMA",
    "MUFU": r"MUFU",
    "FP32": r"FFMA|FADD|FMUL|FMNMX|FSEL",
    "FP16": r"HFMA2|HADD2|HMUL2|HMNMX2",
    "FP64": r"DFMA|DADD|DMUL",
    "convert": r"F2F|F2I|I2F|F2FP|I2I",
}
_KIND = re.compile("|".join(f"(?P<k{i}>{pattern})" for i, pattern in enumerate(KINDS.values())))
_NAMES = list(KINDS)

_ARCH = re.compile(r"^arch = (\w+)")
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\S+?):?$")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)")


@dataclass
class Kernel:
    """One kernel's machine code for one architecture."""

    registers: int = 0
    """Of a thread."""
    shared_bytes: int = 0
    """Of a block: static; a launch may add dynamic ones."""
    local_bytes: int = 0
    """Of a thread: arrays that are no registers, and spills."""
    instructions: Counter[str] = field(default_factory=Counter)
    """By KINDS; those of none are "other"."""


def read(library: Path) -> dict[str, dict[str, Kernel]]:
    """Every kernel of a library by architecture (sm_90a) and plain name. Raises Missing without cuobjdump."""
    found: dict[str, dict[str, Kernel]] = {}
    for arch, name, line in _lines(library, "-res-usage"):
        if resources := _RESOURCES.search(line):
            registers, stack, shared, local = map(int, resources.groups())
            if shared and int(re.findall(r"\d+", arch)[0]) >= OLDEST_ARCH_WITH_RESERVED_SHARED:
                shared -= RESERVED_SHARED
            # the stack is local memory too
            found.setdefault(arch, {})[name] = Kernel(registers, shared, stack + local)
    for arch, name, line in _lines(library, "-sass"):
        if instruction := _INSTRUCTION.match(line):
            found[arch][name].instructions[kind_of(instruction[1])] += 1
    plain = _plain_names({name for kernels in found.values() for name in kernels})
    return {arch: {plain[name]: kernel for name, kernel in kernels.items()} for arch, kernels in sorted(found.items())}


def kind_of(opcode: str) -> str:
    """LDG.E.128.CONSTANT -> LDG.128"""
    found = _KIND.match(opcode)
    return _NAMES[int(found.lastgroup[1:])] if found else "other"


def plain_name(demangled: str) -> str:
    """A kernel's name as a reader knows it, without namespaces, result and parameters: `norm_kernel<float, Tile>`."""
    name = re.sub(r"\(anonymous namespace\)::|fastgpt::|_GLOBAL__N__\w+::", "", demangled)
    name = name.removeprefix("void ")
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def _plain_names(mangled: set[str]) -> dict[str, str]:
    """By c++filt, which comes with every g++."""
    names = sorted(mangled)
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(plain_name, done.stdout.splitlines()), strict=True))


def _lines(library: Path, option: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled kernel, line) of what cuobjdump prints inside kernels."""
    cuobjdump = toolchain.find_cuobjdump()
    environment = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [cuobjdump, option, library]
    arch = name = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:  # type: ignore[union-attr]
            if line.startswith("arch = "):
                arch, name = _ARCH.match(line)[1], ""  # type: ignore[index]
            elif function := _FUNCTION.match(line):
                name = function[1]
            elif name:
                yield arch, name, line
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)

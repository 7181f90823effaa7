"""`fastgpt doctor`: what this machine has, which implementation each op uses here and why, and what to mend."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .units import size

OLDEST_TORCH = (2, 11)
OLDEST_PYTHON = (3, 10)
REQUIRED = ("numpy", "safetensors", "tokenizers", "tiktoken", "tyro", "rich", "tomli_w")
OPTIONAL = {
    "pyarrow": "reads .parquet",
    "zstandard": "reads .jsonl.zst",
    "matplotlib": "draws the curves of `fastgpt plot`",
}
LITTLE_MEMORY = 2 << 30
LITTLE_DISK = 2 << 30


@dataclass(frozen=True)
class Problem:
    """Something that stands in the way, and how to mend it."""

    what: str
    remedy: str
    fatal: bool = False
    """fastgpt cannot train here before this is mended."""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch(problems: list[Problem]) -> tuple[Any, dict[str, Any]]:
    """The torch module (None where it cannot be used) and the facts about it."""
    version = _version("torch")
    if version is None:
        problems.append(Problem("torch is not installed", "pip install torch", fatal=True))
        return None, {"version": None}
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.append(
            Problem(f"torch {version} does not load: {reason}", "pip install --force-reinstall torch", True)
        )
        return None, {"version": version, "error": reason}
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        remedy = f"pip install --upgrade 'torch>={wanted}'"
        problems.append(Problem(f"torch {torch.__version__} is too old", remedy, fatal=True))
    return torch, {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "threads": torch.get_num_threads(),
    }


def _gpus(torch: Any, driver: str | None, problems: list[Problem]) -> list[dict[str, Any]]:
    if torch is None:
        return []
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
        return found
    if driver is not None and torch.version.cuda is None:
        remedy = "install a torch that is built for CUDA (pip install --force-reinstall torch, from the default index)"
        problems.append(Problem("an NVIDIA GPU is here, but this torch is built for CPUs only", remedy))
    elif driver is not None:
        what = f"torch is built for CUDA {torch.version.cuda}, but cannot use the NVIDIA driver {driver}"
        remedy = "update the driver, or install a torch built for an older CUDA; see also CUDA_VISIBLE_DEVICES"
        problems.append(Problem(what, remedy))
    return []


def _ops(torch: Any, problems: list[Problem]) -> list[dict[str, str]]:
    """Per op: {"op", "implementation", "reason"}."""
    if torch is None:
        return []
    try:
        from . import native

        rows = native.status()
    except Exception as error:  # doctor reports what is broken instead of breaking with it
        problems.append(Problem(f"the ops cannot be listed: {error}", "install fastgpt again", fatal=True))
        return []
    required = os.environ.get("FASTGPT_REQUIRE_KERNELS") == "1"
    if required and any(row["implementation"] == "reference" for row in rows):
        what = "FASTGPT_REQUIRE_KERNELS=1 is set, but some ops have no kernel here"
        problems.append(Problem(what, "unset it, or mend what is said beside these ops"))
    return rows


def _threads(torch: Any, others: float | None, problems: list[Problem]) -> None:
    if torch is None:
        return
    threads, cores, quota = torch.get_num_threads(), machine.cores(), machine.cpu_quota()
    if quota is not None and threads > max(1, round(quota)):
        what = f"torch uses {threads} threads, but the container grants {quota:g} cores"
        problems.append(Problem(what, f"export OMP_NUM_THREADS={max(1, round(quota))}"))
    elif "OMP_NUM_THREADS" in os.environ and threads * 2 < cores:
        what = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves most of the {cores} cores idle"
        problems.append(Problem(what, "unset OMP_NUM_THREADS"))
    if machine.crowded(threads, others):
        problems.append(Problem(machine.crowd(threads, others), machine.CROWD_REMEDY))


def examine(path: str | Path = ".") -> dict[str, Any]:
    """Everything that `fastgpt doctor` reports, as plain values for JSON; `path` is where space is looked for."""
    problems: list[Problem] = []
    load = machine.OtherLoad()
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        what = f"Python {platform.python_version()} is too old"
        problems.append(Problem(what, f"install Python {wanted} or newer", fatal=True))
    torch, torch_facts = _torch(problems)
    driver = machine.nvidia_driver()
    required = {name: _version(name) for name in REQUIRED}
    for name, version in required.items():
        if version is None:
            problems.append(Problem(f"{name} is not installed", f"pip install {name.replace('_', '-')}", fatal=True))
    total, available = machine.memory()
    free = machine.disk_free(path)
    if total and available < LITTLE_MEMORY:
        problems.append(Problem(f"only {size(available)} of memory are free", "end other programs"))
    if free < LITTLE_DISK:
        problems.append(Problem(f"only {size(free)} are free on the disk of {path}", "make room"))
    gpus = _gpus(torch, driver, problems)
    _threads(torch, load.cores(), problems)
    return {
        "fastgpt": importlib.import_module("fastgpt").__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch_facts,
        "packages": required,
        "optional_packages": {name: _version(name) for name in OPTIONAL},
        "cpu": {
            "name": machine.cpu_name(),
            "cores": machine.cores(),
            "quota": machine.cpu_quota(),
            "features": machine.cpu_features(),
        },
        "memory": {"total_bytes": total, "available_bytes": available},
        "disk": {"path": str(path), "free_bytes": free},
        "gpu": {"driver": driver, "devices": gpus},
        "ops": _ops(torch, problems),
        "problems": [vars(problem) for problem in problems],
    }


def report(facts: dict[str, Any]) -> str:
    """`examine()`'s facts as lines for people."""
    torch, cpu, gpu = facts["torch"], facts["cpu"], facts["gpu"]
    rows = [("fastgpt", facts["fastgpt"]), ("Python", f"{facts['python']} on {facts['system']}")]
    if "threads" in torch:
        build = f"for CUDA {torch['cuda_build']}" if torch["cuda_build"] else "for CPUs"
        abi = "C++11 ABI" if torch["cxx11_abi"] else "old C++ ABI"
        dnn = "oneDNN" if torch["onednn"] else "no oneDNN"
        rows.append(("torch", f"{torch['version']}, built {build}, {abi}, {torch['vector_instructions']}, {dnn}"))
    else:
        rows.append(("torch", torch["version"] or "missing"))
    quota = "" if cpu["quota"] is None else f", of which the container grants {cpu['quota']:g}"
    threads = f", {torch['threads']} threads" if "threads" in torch else ""
    rows.append(("CPU", f"{cpu['name']}, {cpu['cores']} cores{quota}{threads}"))
    features = [f"{name} ({machine.CPU_FEATURES[name]})" for name in cpu["features"]]
    rows.append(("", ", ".join(features) or "no vector instructions that are known here"))
    memory = facts["memory"]
    if memory["total_bytes"]:
        free, total = size(memory["available_bytes"]), size(memory["total_bytes"])
        rows.append(("memory", f"{free} free of {total}"))
    rows.append(("disk", f"{size(facts['disk']['free_bytes'])} free at {facts['disk']['path']}"))
    devices = [f"{d['name']}, compute capability {d['capability']}, {size(d['memory_bytes'])}" for d in gpu["devices"]]
    rows.append(("GPU", devices[0] if devices else "none that torch can use"))
    rows += [("", device) for device in devices[1:]]
    if gpu["driver"]:
        rows.append(("driver", gpu["driver"]))
    missing = [f"{name} ({OPTIONAL[name]})" for name, version in facts["optional_packages"].items() if version is None]
    if missing:
        rows.append(("optional", f"not installed: {', '.join(missing)}"))
    lines = [f"{name:9} {value}" for name, value in rows]

    if facts["ops"]:
        width = max(len(row["op"]) for row in facts["ops"])
        kind = max(len(row["implementation"]) for row in facts["ops"])
        lines += ["", "Which implementation each op uses here:"]
        lines += [
            f"  {row['op']:{width}}  {row['implementation']:{kind}}  {row['reason']}".rstrip() for row in facts["ops"]
        ]
    lines.append("")
    for problem in facts["problems"]:
        lines.append(f"{'error' if problem['fatal'] else 'problem'}: {problem['what']}")
        lines.append(f"   mend: {problem['remedy']}")
    if not facts["problems"]:
        lines.append("No problems found.")
    return "\n".join(lines)

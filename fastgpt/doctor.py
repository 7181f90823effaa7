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
TOOL_PATIENCE = 5.0  # seconds for a compiler to say what it is
SLOWER = 1.1  # times torch's own time, from which on a kernel is a problem


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


def _libraries(torch: Any, gpu: bool, problems: list[Problem]) -> list[dict[str, Any]]:
    """The compiled libraries: see `native.libraries`. One that is there and refused is always a problem."""
    if torch is None:
        return []
    from . import native

    if gpu:
        native.status()  # looks at whether the kernels are for these GPUs
    rows = native.libraries()
    for row in rows:
        needed = gpu and row["library"] == native.loading.FILES["cuda"]
        if row["state"] == "refused" or (row["state"] == "not built" and needed):
            problems.append(Problem(row["reason"], row["remedy"]))
    return rows


def _toolchain(gpu: bool, problems: list[Problem]) -> dict[str, Any]:
    """What kernels would be built with here: {"nvcc", "compiler", "headers", "archs"}, each in words, and "missing":
    the same names, with what is wrong. A problem only where somebody asked for it: by a GPU, or by a variable."""
    from .errors import UserError
    from .native import toolchain

    found: dict[str, Any] = {"missing": {}}
    before, toolchain.PATIENCE = toolchain.PATIENCE, TOOL_PATIENCE

    def look(name: str, find: Any) -> Any:
        try:
            return find()
        except (toolchain.Missing, UserError) as error:
            found["missing"][name] = str(error)
            if isinstance(error, UserError):
                what, _, remedy = str(error).rpartition("; ")
                problems.append(Problem(f"no kernels can be built: {what}", remedy))
            elif gpu and name == "nvcc":
                what = str(error).removesuffix(f": {toolchain.NVCC_REMEDY}")
                problems.append(Problem(f"no kernels can be built for the GPU: {what}", toolchain.NVCC_REMEDY))
        return None

    try:
        if look("platform", toolchain.require_platform) is None and found["missing"]:
            return found
        if nvcc := look("nvcc", toolchain.find_nvcc):
            found["nvcc"] = f"{toolchain.dotted(nvcc.version)}, {nvcc.path}"
            if archs := look("archs", lambda: toolchain.choose_archs(nvcc)):
                found["archs"] = f"{', '.join(map(str, archs[0]))} ({archs[1]})"
        if compiler := look("compiler", toolchain.find_compiler):
            found["compiler"] = f"{toolchain.dotted(compiler.version)}, {compiler.path}"
        named_in_vain = "nvcc" in found["missing"] and "FASTGPT_NVCC" in os.environ  # and said so already
        if not named_in_vain and (headers := look("headers", toolchain.find_cuda_headers)):
            found["headers"] = str(headers)
    finally:
        toolchain.PATIENCE = before
    return found


def _ops(torch: Any, problems: list[Problem]) -> list[dict[str, Any]]:
    """Per op: {"op", "implementation", "reason", "errors": {dtype: {"ours", "torchs", "emulated"}}}, each error a share
    of the largest value; "microseconds": {"ours", "torchs"} and "path" where kernels serve it, "emulated_path" where
    the emulator does."""
    if torch is None:
        return []
    try:
        from . import native

        rows: list[dict[str, Any]] = [dict(row) for row in native.status()]
    except Exception as error:  # doctor reports what is broken instead of breaking with it
        problems.append(Problem(f"the ops cannot be listed: {error}", "install fastgpt again", fatal=True))
        return []
    required = os.environ.get("FASTGPT_REQUIRE_KERNELS") == "1"
    if required and any(row["implementation"] == "reference" for row in rows):
        what = "FASTGPT_REQUIRE_KERNELS=1 is set, but some ops have no kernel here"
        problems.append(Problem(what, "unset it, or mend what is said beside these ops"))
    for row in rows:
        row["errors"] = {}
        try:
            _try_op(row, "cuda" if torch.cuda.is_available() else "cpu", problems)
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            problems.append(Problem(f"{row['op']} does not run here: {why}", REBUILD))
    return rows


REBUILD = "build the kernels again (make kernels, or install fastgpt again); if it stays, this is a bug to report"


def _try_op(row: dict[str, Any], device: str, problems: list[Problem]) -> None:
    """Run an op on a small input, compare it with float64 and, where kernels serve it, time it."""
    from . import accuracy, native

    op = row["op"]
    emulator = native.loading.library("emulated")
    for dtype in accuracy.DTYPES:
        name = str(dtype).removeprefix("torch.")
        found = {"here": accuracy.errors(op, dtype, device)}
        if op in emulator.ops:
            with native.emulated(only=[op]):
                found["emulated"] = accuracy.errors(op, dtype, "cpu")
            if dtype.itemsize == 2:  # what models train in
                row["emulated_path"] = _last_path("emulated")
        row["errors"][name] = {"ours": found["here"].ours, "torchs": found["here"].torchs}
        if "emulated" in found:
            row["errors"][name]["emulated"] = found["emulated"].ours
        for where, errors in found.items():
            if not errors.within:
                emulated = " (on the emulator)" if where == "emulated" else ""
                what = f"{op} in {name}{emulated} is off by {errors.ours:.1e}, torch's own by {errors.torchs:.1e}"
                problems.append(Problem(what, REBUILD))
    if row["implementation"] != "reference":
        ours, torchs = accuracy.microseconds(op, device)
        row["path"] = _last_path("cuda")
        row["microseconds"] = {"ours": ours, "torchs": torchs}
        if ours > SLOWER * torchs:
            what = f"{op} takes {ours:.0f} us where torch's own takes {torchs:.0f}"
            problems.append(Problem(what, "close other programs on the GPU and try again; if it stays, report it"))


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


def _last_path(kind: str) -> dict[str, str]:
    """The kernel path that the last call took, and why: {"path", "reason"}."""
    from . import native

    said = native.loading.library(kind).json("fastgpt_last_path")
    return {"path": said["path"], "reason": said["reason"]}


def _looked_at(part: str, look: Any, otherwise: Any, problems: list[Problem]) -> Any:
    """What `look` finds; where it breaks, that is a problem too, and the rest is looked at all the same."""
    try:
        return look()
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.append(Problem(f"{part} cannot be looked at: {why}", "install fastgpt again"))
        return otherwise


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
    gpu = bool(gpus)
    libraries = _looked_at("the compiled libraries", lambda: _libraries(torch, gpu, problems), [], problems)
    tools = _looked_at("the compilers", lambda: _toolchain(gpu, problems), {"missing": {}}, problems)
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
        "libraries": libraries,
        "toolchain": tools,
        "ops": _ops(torch, problems),
        "problems": [vars(problem) for problem in problems],
    }


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns, two spaces between and before; the last one is as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] + [0]
    return ["  " + "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _about(head: list[str], library: dict[str, Any]) -> list[list[str]]:
    """Rows that begin with `head`: what a library was built from and for, what it has, or why it is in its state."""
    built = library["built"]
    if not built:
        reason = library["reason"].removeprefix(f"{library['library']} is not built").lstrip(";: ")  # the state says so
        return [[*head, "; ".join(part for part in (reason, library["remedy"]) if part)]]
    by = [built["compiler"]] if "compiler" in built else []
    if "nvcc" in built:
        archs = f"{', '.join(built['archs'])} ({built['archs_from']})"
        by.insert(0, f"nvcc {built['nvcc']} for {archs}")
    return [
        [*head, f"built by {', '.join(by)}, for torch {built['torch_target']} and newer"],
        ["", "", library["reason"]],
    ]


def _why(op: dict[str, Any]) -> str:
    """Why this implementation, and which of its paths."""
    said = op["reason"]
    for name, of in (("path", ""), ("emulated_path", "on the emulator: ")):
        if name in op:
            said += f"; {of}path {op[name]['path']} ({op[name]['reason']})"
    return said


def _errors(ops: list[dict[str, Any]]) -> list[str]:
    """A table: what serves here, torch's own function and the emulated kernels, against float64."""
    dtypes = list(dict.fromkeys(dtype for row in ops for dtype in row["errors"]))
    emulated = any("emulated" in errors for row in ops for errors in row["errors"].values())
    kinds = {"ours": "here", "torchs": "torch's own", **({"emulated": "emulated kernels"} if emulated else {})}
    rows = [["", *(f"{dtype}: {kind}" if kind == "here" else kind for dtype in dtypes for kind in kinds.values())]]
    for row in ops:
        cells = [row["errors"].get(dtype, {}).get(kind) for dtype in dtypes for kind in kinds]
        rows.append([row["op"], *("" if cell is None else f"{cell:.1e}" for cell in cells)])
    return [
        "Largest error against float64, of outputs and gradients, as a share of the largest value:",
        *_aligned(rows),
    ]


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

    if facts["libraries"]:
        lines += ["", "Compiled kernels:"]
        lines += _aligned(
            [cells for row in facts["libraries"] for cells in _about([row["library"], row["state"]], row)]
        )
        tools = facts["toolchain"]
        names = {"nvcc": "nvcc", "compiler": "g++", "headers": "CUDA headers"}
        rows = [[shown, tools.get(name) or tools["missing"].get(name, "")] for name, shown in names.items()]
        if "archs" in tools:
            rows.insert(1, ["for", f"{tools['archs']} would be built now"])
        rows = [row for row in rows if row[1]] or [["none", "; ".join(tools["missing"].values())]]
        lines += ["", "What kernels are built with here:", *_aligned(rows)]
    if facts["ops"]:
        lines += ["", "Which implementation each op uses here:"]
        lines += _aligned([[row["op"], row["implementation"], _why(row)] for row in facts["ops"]])
        lines += ["", *_errors(facts["ops"])]
        timed = [row for row in facts["ops"] if "microseconds" in row]
        if timed:
            lines += ["", "Microseconds of a forward, on bfloat16 rows:"]
            header = ["", "kernel", "torch's own"]
            lines += _aligned(
                [header, *([r["op"], *(f"{r['microseconds'][k]:.1f}" for k in ("ours", "torchs"))] for r in timed)]
            )
    lines.append("")
    for problem in facts["problems"]:
        lines.append(f"{'error' if problem['fatal'] else 'problem'}: {problem['what']}")
        lines.append(f"   mend: {problem['remedy']}")
    if not facts["problems"]:
        lines.append("No problems found.")
    return "\n".join(lines)

"""Builds the kernels: `python -m fastgpt.native.build`, which is `make kernels`; setup.py calls it too.

Two libraries come from one set of sources, `csrc/<op>/*.cu` and `*.cpp`, which are found by themselves:

    _ops.so            .cu by nvcc, .cpp by g++
    _ops_emulated.so   .cu by g++, as C++ with hooks at every memory access, .cpp by g++; and csrc/emulator

and for this Python alone `fastgpt._C`, a typed view of both, from csrc/python.
ninja does what is left to do, so one file touched costs one compilation. Beside each library is a JSON file that says
what was built, or why not. Standard library and ninja only: torch's headers are found without importing torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import toolchain
from .loading import FILES, FOLDER, INFO_VERSION, MODULE_FOLDER, build_result, file_of, result_file
from .schemas import schema_digest
from .toolchain import Missing, dotted

CSRC = FOLDER.parent.parent / "csrc"
WORK = CSRC.parent / "build" / "native"
TORCH_TARGET = (2, 11)  # the oldest torch whose stable ABI the libraries keep to

_NO_OPS = ("host", "emulator", "python")  # folders of csrc with sources that every library of its kind needs
_COMMON = ["-fPIC", "-fvisibility=hidden", "-Wall"]
_NVCC = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", ",".join(_COMMON), "-Xptxas", "--warn-on-spills,-Werror"]
_TARGET = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000ULL"
_BINDING = ["-O3", "-std=c++20", _TARGET, *_COMMON]
# Every access of a kernel to memory calls a function of csrc/emulator; debug information names its source line.
_KERNEL = ["-x", "c++", "-std=c++17", "-O1", "-g", "-fno-tree-sra", "-fno-omit-frame-pointer", "-fno-strict-aliasing"]
_KERNEL += ["-fno-builtin-memcpy", "-fno-builtin-memset"]  # which would be expanded after the hooks are placed
_KERNEL += ["-fsanitize=thread,bounds,alignment", "--param", "tsan-instrument-func-entry-exit=0", *_COMMON]
_KERNEL += ["-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-unused-function"]
_EMULATOR = ["-O2", "-g1", "-std=c++20", *_COMMON]
_EMULATED = ["-DFASTGPT_EMULATED", "-fno-gnu-unique"]  # unique symbols would be shared with the other library
# libstdc++ first, for torch's libraries happen to export some of its symbols too. libtorch.so is needed for a weak
# symbol alone, that of the current CUDA stream, which the linker does not count.
_LIBRARIES = ["-lstdc++", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
_MODULE = ["-O2", "-std=c++17", *_COMMON]
_RESOURCES = [sys.executable, FOLDER / "resources.py"]
_CUDA_LIBRARIES = ["-ldl", "-lrt", "-lpthread"]


# ---- what is to be compiled, and how -------------------------------------------------------------------


def sources(csrc: Path, kind: str, folders: Collection[str] | None = None) -> list[tuple[str, str]]:
    """(rule, path from the parent of `csrc` on) of every file of a library; of its ops only those in `folders`."""
    found = []
    for path in sorted(csrc.glob("*/*")):
        if folders is not None and path.parent.name not in (*folders, *_NO_OPS):
            continue
        of_emulator, of_module = path.parent.name == "emulator", path.parent.name == "python"
        if path.suffix not in (".cu", ".cpp") or (of_emulator and kind != "emulated"):
            continue
        if of_module != (kind == "python"):
            continue
        if of_module:
            rule = "module"
        elif path.suffix == ".cu":
            rule = "kernel" if kind == "emulated" else "nvcc"
        else:
            rule = "emulator" if of_emulator else "binding"
        found.append((rule, path.relative_to(csrc.parent).as_posix()))
    return found


def plan(kind: str, csrc: Path, work: Path, folders: Collection[str] | None = None) -> tuple[str, dict[str, Any]]:
    """The ninja file of a library, to be run in the parent of `csrc`, and its build info. Raises Missing."""
    toolchain.require_platform()
    if kind == "python":
        return _plan_module(csrc, work)
    emulated = kind == "emulated"
    gxx = toolchain.find_compiler(toolchain.OLDEST_GXX_FOR_EMULATOR if emulated else toolchain.OLDEST_GXX)
    torch = toolchain.find_torch()
    info: dict[str, Any] = {
        "version": INFO_VERSION,
        "kind": kind,
        "schema_digest": schema_digest(),
        "torch_target": dotted(TORCH_TARGET),
        "torch_headers": dotted(torch.version),
        "compiler": f"g++ {dotted(gxx.version)}",
    }
    # Paths without this machine's folders. Headers outside the project are not tracked: versions are in the command.
    local = [f"-I{csrc.name}", f"-ffile-prefix-map={csrc.parent}=.", f"-DFASTGPT_GXX={dotted(gxx.version)}"]
    local += _EMULATED if emulated else []
    headers = ["-isystem", torch.folder / "include", f"-DFASTGPT_TORCH={dotted(torch.version)}", f"-I{work}"]
    rules = {"binding": [gxx.path, *_BINDING, *local, *headers]}
    libraries = [f"-L{torch.folder / 'lib'}", *_LIBRARIES]
    if emulated:
        headers = ["-isystem", toolchain.find_cuda_headers()]
        rules["kernel"] = [gxx.path, *_KERNEL, *local, *headers]
        rules["emulator"] = [gxx.path, *_EMULATOR, *local, *headers]
    else:
        nvcc = toolchain.find_nvcc()
        archs, source = toolchain.choose_archs(nvcc)
        info |= {"nvcc": dotted(nvcc.version), "archs": [str(arch) for arch in archs], "archs_from": source}
        version = f"-DFASTGPT_NVCC={info['nvcc']}"
        code = [flag for arch in archs for flag in arch.flags()]
        compiler = [nvcc.path, *_NVCC, "-Xptxas", "-v", *code, "-ccbin", gxx.path, f"-I{csrc.name}", version]
        rules["nvcc"] = [*_RESOURCES, "compile", "$out.kernels", *compiler]
        libraries += [nvcc.runtime, *_CUDA_LIBRARIES]
    link = [
        gxx.path,
        "-shared",
        "$in",
        "-o",
        "$out",
        f"-Wl,-soname,{FILES[kind]}",
        "-Wl,--exclude-libs,ALL,-z,defs",
        *libraries,
    ]
    return _ninja_file(kind, sources(csrc, kind, folders), rules, link, work), info


def _plan_module(csrc: Path, work: Path) -> tuple[str, dict[str, Any]]:
    files = sources(csrc, "python")
    if not files:
        raise Missing("its sources are not here")
    gxx, python = toolchain.find_compiler(), toolchain.find_python_headers()
    info = {"version": INFO_VERSION, "kind": "python", "compiler": f"g++ {dotted(gxx.version)}"}
    info |= {"python": dotted(sys.version_info[:2]), "pybind11": python.pybind11_version}
    command = [gxx.path, *_MODULE, f"-I{csrc.name}", f"-ffile-prefix-map={csrc.parent}=."]
    command += ["-isystem", python.include, "-isystem", python.pybind11]
    command += [f"-DFASTGPT_GXX={dotted(gxx.version)}", f"-DFASTGPT_PYBIND11={python.pybind11_version}"]
    link = [gxx.path, "-shared", "$in", "-o", "$out", "-ldl"]
    return _ninja_file("python", files, {"module": command}, link, work), info


def _ninja_file(
    kind: str, files: list[tuple[str, str]], rules: dict[str, list[str | Path]], link: list[str | Path], work: Path
) -> str:
    lines = ["ninja_required_version = 1.5", f"builddir = {_path(work)}"]
    for name, command in rules.items():
        lines += [
            f"rule {name}",
            f"  command = {_shell([*command, '-MMD', '-MF', '$out.d', '-c', '$in', '-o', '$out'])}",
        ]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = $in"]
    lines += ["rule link", f"  command = {_shell(link)}", f"  description = {file_of(kind)}"]
    objects, noted, kernels = [], [], work / "fastgpt_kernels.h"
    for rule, source in files:
        objects.append(work / f"{source}.o")
        also = needs = ""
        if rule == "nvcc":
            noted.append(f"{objects[-1]}.kernels")
            also = f" | {_path(noted[-1])}"
        elif source.endswith("host/info.cpp") and kind == "cuda":
            needs = f" | {_path(kernels)}"
        lines.append(f"build {_path(objects[-1])}{also}: {rule} {_path(source)}{needs}")
    if kind == "cuda":
        join = _shell([*_RESOURCES, "join", "$out", "$in"])
        lines += ["rule kernels", f"  command = {join}", "  restat = 1", "  description = registers and shared memory"]
        lines.append(f"build {_path(kernels)}: kernels {' '.join(map(_path, noted))}")
    lines.append(f"build {_path(work / file_of(kind))}: link {' '.join(map(_path, objects))}")
    return "\n".join([*lines, ""])


def _path(name: str | Path) -> str:
    """A path as a ninja file wants it."""
    return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(command: list[str | Path]) -> str:
    """A command for ninja's shell; $in and $out are ninja's own."""
    words = (str(word) for word in command)
    return " ".join(
        word if word.startswith(("$in", "$out")) else shlex.quote(word).replace("$", "$$") for word in words
    )


# ---- building ------------------------------------------------------------------------------------------


def build(
    kind: str,
    csrc: Path = CSRC,
    out: Path = FOLDER,
    work: Path = WORK,
    *,
    folders: Collection[str] | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Build a library ("cuda" or "emulated") or the module ("python", into MODULE_FOLDER) into `out`, with ninja in
    `work`; returns what it writes beside it. `folders`: those of `csrc` whose ops it has; all of them where not given.

    "status" is "built", or "missing" with a "reason" where something that it needs is not here: then a library that is
    there stays. Raises UserError where the sources do not compile or the environment asks for what cannot be.
    """
    started = time.monotonic()
    work = work.absolute() / kind
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(work):
        said = build_result(kind, out)
        try:
            ninja_file, info = plan(kind, csrc.absolute(), work, folders)
            result = {"status": "built", **info, "jobs": toolchain.jobs()}
            _write(work / "build.ninja", ninja_file)
            _write(work / "fastgpt_build_info.h", f'#define FASTGPT_BUILD_INFO R"json({json.dumps(info)})json"\n')
            _run_ninja(csrc.absolute().parent, work, result["jobs"], verbose)
            if not _install(work / file_of(kind), out / file_of(kind)) and said.get("status") == "built":
                return said
        except Missing as missing:
            kept = "; the one built before stays" if (out / file_of(kind)).exists() else ""
            result = {"status": "missing", "kind": kind, "reason": f"{missing}{kept}"}
        result["seconds"] = round(time.monotonic() - started, 1)
        _write(out / result_file(kind), json.dumps(result, indent=1) + "\n")
    return result


def build_as_wished(csrc: Path, out: Path, work: Path, *, in_place: bool, verbose: bool = False) -> dict[str, Any]:
    """The CUDA kernels as FASTGPT_CUDA wishes: 1, or an error; 0, none; auto, the default, where they can be built.

    Raises UserError. Outside the source tree nothing is left of an earlier build.
    """
    wish = os.environ.get("FASTGPT_CUDA") or "auto"
    if wish not in ("0", "1", "auto"):
        raise UserError(f"FASTGPT_CUDA={wish}, expected 0 (no kernels), 1 (kernels or an error) or auto")
    if wish == "0" or not in_place:
        (out / FILES["cuda"]).unlink(missing_ok=True)
        (out / result_file("cuda")).unlink(missing_ok=True)
    if wish == "0":
        result = {"status": "missing", "kind": "cuda", "reason": "FASTGPT_CUDA=0 asked for none"}
        out.mkdir(parents=True, exist_ok=True)
        _write(out / result_file("cuda"), json.dumps(result, indent=1) + "\n")
        return result
    result = build("cuda", csrc, out, work, verbose=verbose)
    if wish == "1" and result["status"] != "built":
        raise UserError(f"FASTGPT_CUDA=1 asks for CUDA kernels: {result['reason']}")
    return result


@contextlib.contextmanager
def _alone_in(work: Path) -> Iterator[None]:
    """One build at a time in a folder."""
    if os.name != "posix":
        yield
        return
    import fcntl

    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    """Write a file under a temporary name first; a file that says the same already is left as it is."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _install(built: Path, target: Path) -> bool:
    """Put a library in its place, whole at every moment; whether it is another one than before."""
    new, old = built.stat(), target.stat() if target.exists() else None
    if old is not None and (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
        return False
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copy2(built, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _run_ninja(folder: Path, work: Path, jobs: int, verbose: bool) -> None:
    quiet = ["-v"] if verbose else [] if sys.stderr.isatty() else ["--quiet"]
    command = [toolchain.find_ninja(), "-f", str(work / "build.ninja"), f"-j{jobs}", *quiet]
    done = subprocess.run(command, cwd=folder, stdout=2)  # not in the midst of what `main` prints
    if done.returncode:
        raise UserError(
            "the kernels could not be compiled (the compiler's words are above); "
            "FASTGPT_CUDA=0 installs fastgpt without them"
        )


def describe(result: dict[str, Any]) -> str:
    """A result of `build` in one line."""
    file = file_of(result["kind"])
    if result["status"] != "built":
        return f"{file} is not built: {result['reason']}"
    if "python" in result:
        return f"{file} is built, by {result['compiler']}, for Python {result['python']}"
    by = f"nvcc {result['nvcc']} for {', '.join(result['archs'])}, {result['compiler']}" if "nvcc" in result else ""
    return f"{file} is built, by {by or result['compiler']}, for torch {result['torch_target']} and newer"


def main(argv: list[str]) -> int:
    """`python -m fastgpt.native.build`; returns 2 where nothing can be built."""
    parser = argparse.ArgumentParser(prog="python -m fastgpt.native.build", description="Builds the kernels in place.")
    parser.add_argument("kinds", nargs="*", choices=[*FILES, "python", []], help="which; all that can be built")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the commands")
    arguments = parser.parse_args(argv)
    try:
        if not CSRC.is_dir():
            raise UserError("the kernels' sources are not installed; build in a checkout of fastgpt, then install it")
        results = []
        for kind in arguments.kinds or [*FILES, "python"]:
            if kind == "cuda":
                results.append(build_as_wished(CSRC, FOLDER, WORK, in_place=True, verbose=arguments.verbose))
            else:
                out = MODULE_FOLDER if kind == "python" else FOLDER
                results.append(build(kind, out=out, verbose=arguments.verbose))
    except UserError as error:
        print(f"fastgpt: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(describe, results)))
    return 0 if any(result["status"] == "built" for result in results) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

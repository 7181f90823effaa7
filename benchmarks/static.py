"""What can be known of the kernels without a GPU, and that it has not become worse.

    python benchmarks/static.py              # the tables, and what differs from the baseline: exit code 1
    python benchmarks/static.py --accept     # what was found becomes the baseline, benchmarks/results/static.json
    python benchmarks/static.py --only swiglu

Traffic, counted by the emulator for every call in benchmarks/cases: bytes over the least that the call has to move,
32-byte sectors over the fewest that could hold those bytes, bank conflicts, FLOPs of matrix products over the fewest.
Machine code, for every kernel and architecture of `_ops.so`: registers, shared and local memory (spills are there),
blocks that fit on a multiprocessor at a time, and instructions by kind. That part is compared where the same nvcc
compiled for the same architectures, and else skipped.

Counts are those of the instructions, before any cache. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import machine_code
import torch
from cases import Case, every_case
from occupancy import CHIPS, occupancy

from fastgpt import native, ops  # noqa: F401 - the ops declare the entries
from fastgpt.errors import UserError
from fastgpt.files import write_atomically
from fastgpt.native import build, loading, toolchain

BASELINE = Path(__file__).parent / "results" / "static.json"
ACCEPT = "python benchmarks/static.py --accept"

# Fields of the baseline, and whether it is worse when they grow (1) or shrink (-1).
TRAFFIC = {"launches": 1, "bytes": 1, "sectors": 1, "bank_conflicts": 1, "flops": 1}
MACHINE_CODE = {"registers": 1, "shared_bytes": 1, "local_bytes": 1, "warps": -1}
# Of the instructions, whose number changes with every edit, only what says that something is done in another way.
NEVER_MORE = ("LDL", "STL")
# On a vector path a store of a few bytes is one of a statistic, or a vector that the compiler took apart.
NEVER_MORE_ON_VECTORS = ("STG.64", "STG", "STG.16")
NEVER_NONE = ("LDG.128", "STG.128", "LDGSTS", "UTMALDG", "UTMASTG", "LDSM", "STSM", "HMMA", "HGMMA")


class Skipped(Exception):
    """A part cannot be looked at on this machine; the message says why, and how to mend it."""


# ---- traffic ---------------------------------------------------------------------------------------------


def traffic(case: Case, *, checked: bool = False) -> dict[str, Any]:
    """What the emulator counts in one call; "shapes": by kernel, the threads and dynamic shared memory of a block.

    checked: slower, and raises RuntimeError for what the emulator finds wrong.
    """
    arguments = case.arguments("cpu")
    with native.emulated(case.chip, profile=True, checked=checked):
        native.counters(), native.launches()
        getattr(torch.ops.fastgpt_emulated, case.entry)(*arguments)
        path = loading.library("emulated").json("fastgpt_last_path")["path"]
        lines, launched = native.counters(), native.launches()

    def total(field: str, space: str) -> int:
        return sum(line.get(field, 0) for line in lines if line["space"] == space)

    return {
        "path": path,
        "launches": sum(launch["launches"] for launch in launched),
        "least_bytes": case.least_bytes,
        "bytes": total("bytes", "global"),
        "sectors": total("sectors", "global"),
        "ideal_sectors": total("ideal_sectors", "global"),
        "bank_conflicts": total("bank_conflicts", "shared"),
        "least_flops": case.least_flops,
        "flops": total("flops", "matrix"),
        "shapes": {
            machine_code.plain_name(launch["kernel"]): [launch["threads"], launch["shared_bytes"]]
            for launch in launched
        },
    }


def over(found: dict[str, Any], field: str, least: str) -> float:
    """bytes / least_bytes and the like; 1 where there is nothing to do and nothing is done."""
    if found[least] == 0:
        return 1.0 if found[field] == 0 else math.inf
    return found[field] / found[least]


def missed(case: Case, found: dict[str, Any]) -> list[str]:
    """What of its own promises the case does not keep, whatever the baseline says."""
    said = []
    if found["path"] != case.path:
        said.append(f"{case.name}: takes the path {found['path']}, expected {case.path}")
    bytes_, sectors = over(found, "bytes", "least_bytes"), over(found, "sectors", "ideal_sectors")
    if case.most is not None and bytes_ > case.most:
        said.append(f"{case.name}: moves {bytes_:.3f} times the least bytes, at most {case.most:.3f} are allowed")
    if case.most_sectors is not None and sectors > case.most_sectors:
        limit = f"at most {case.most_sectors:.3f} are allowed"
        said.append(f"{case.name}: moves {sectors:.3f} times the fewest sectors, {limit}")
    return said


# ---- machine code -----------------------------------------------------------------------------------------


def machine_code_of(shapes: dict[str, list[int]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By architecture and kernel; `shapes` is what `traffic` saw of all cases. Raises Skipped."""
    library = loading.FOLDER / loading.FILES["cuda"]
    if not library.is_file():
        raise Skipped(loading.build_result("cuda", loading.FOLDER).get("reason", f"{library.name} is not built"))
    try:
        found = machine_code.read(library)
    except toolchain.Missing as missing:
        raise Skipped(str(missing)) from None
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for arch, kernels in found.items():
        for name, kernel in kernels.items():
            row: dict[str, Any] = {
                "registers": kernel.registers,
                "shared_bytes": kernel.shared_bytes,
                "local_bytes": kernel.local_bytes,
                "instructions": {kind: kernel.instructions[kind] for kind in (*machine_code.KINDS, "other")},
            }
            if arch in CHIPS and name in shapes:
                threads, dynamic = shapes[name]
                full = occupancy(CHIPS[arch], threads, kernel.registers, kernel.shared_bytes + dynamic)
                row |= {"threads": threads, "dynamic_shared_bytes": dynamic, "warps": full.warps, "limit": full.limit}
            rows.setdefault(arch, {})[name] = row
    return rows


def compiled_by() -> dict[str, Any]:
    """What decides how the machine code looks, besides the sources."""
    info = loading.read_info(loading.FOLDER / loading.FILES["cuda"])
    return {"nvcc": info["nvcc"], "archs": info["archs"]}


# ---- all of it ---------------------------------------------------------------------------------------------


def measure(cases: Iterable[Case], *, with_machine_code: bool = True) -> dict[str, Any]:
    """{"traffic": by case, "machine_code": by architecture and kernel, "compiled_by", "skipped": why the latter two
    are not there}. Raises UserError where the emulated kernels cannot be built."""
    for kind in loading.FILES if with_machine_code else ["emulated"]:
        result = build.build(kind)
        if kind == "emulated" and result["status"] != "built":
            raise UserError(build.describe(result))
    rows = {case.name: traffic(case) for case in cases}
    found: dict[str, Any] = {"traffic": rows}
    try:
        if not with_machine_code:
            raise Skipped("it was not asked for")
        shapes = {name: shape for row in rows.values() for name, shape in row["shapes"].items()}
        found |= {"machine_code": machine_code_of(shapes), "compiled_by": compiled_by()}
    except Skipped as why:
        found["skipped"] = str(why)
    return found


def unreached(found: dict[str, Any]) -> list[str]:
    """A line for each kernel that no case has launched."""
    reached = {name for row in found["traffic"].values() for name in row["shapes"]}
    compiled = {name for kernels in found.get("machine_code", {}).values() for name in kernels}
    return [f"{name}: no case in benchmarks/cases reaches it" for name in sorted(compiled - reached)]


def on_vectors(found: dict[str, Any]) -> set[str]:
    """The kernels that calls on a vector path alone have launched."""
    reached: dict[bool, set[str]] = {True: set(), False: set()}
    for row in found["traffic"].values():
        reached[row["path"] == "vector"].update(row["shapes"])
    return reached[True] - reached[False]


def differences(found: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """A line for each number that is not the baseline's, worse ones first."""
    said: list[tuple[bool, str]] = []

    def compare(name: str, now: dict, before: dict | None, fields: dict[str, int]) -> None:
        if before is None:
            said.append((False, f"{name}: is new"))
            return
        for field, sign in fields.items():
            a, b = before.get(field), now.get(field)
            if a != b:
                worse = a is None or b is None or (b - a) * sign > 0
                said.append((worse, f"{name}: {field.replace('_', ' ')} {_number(a)} -> {_number(b)}{_verdict(worse)}"))

    for name, row in found["traffic"].items():
        compare(name, row, baseline["traffic"].get(name), TRAFFIC)
    said += [(True, f"{name}: has gone") for name in baseline["traffic"].keys() - found["traffic"].keys()]
    if "machine_code" in found:
        vectors = on_vectors(found)
        for arch, kernels in found["machine_code"].items():
            before = baseline["machine_code"].get(arch, {})
            for name, row in kernels.items():
                compare(f"{arch} {name}", row, before.get(name), MACHINE_CODE)
                held = NEVER_MORE + (NEVER_MORE_ON_VECTORS if name in vectors else ())
                for kind, count in before.get(name, {"instructions": {}})["instructions"].items():
                    now = row["instructions"].get(kind, 0)
                    if (kind in held and now > count) or (kind in NEVER_NONE and count and not now):
                        said.append((True, f"{arch} {name}: {kind} {count} -> {now}{_verdict(True)}"))
            said += [(True, f"{arch} {name}: has gone") for name in before.keys() - kernels.keys()]
    return [text for _, text in sorted(said, key=lambda line: (not line[0], line[1]))]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,}"


def _verdict(worse: bool) -> str:
    return " (worse)" if worse else " (better: accept it, and it will be held)"


def comparable(found: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """`found` without the machine code where other tools than the baseline's made it, and why."""
    if "machine_code" in found and found["compiled_by"] != baseline.get("compiled_by"):
        here, there = found["compiled_by"], baseline.get("compiled_by") or {"nvcc": "none", "archs": []}
        why = (
            f"it is of nvcc {here['nvcc']} for {', '.join(here['archs'])}, and the baseline of nvcc {there['nvcc']} "
            f"for {', '.join(there['archs'])}"
        )
        return {"traffic": found["traffic"], "skipped": why}
    return found


def read_baseline() -> dict[str, Any]:
    """What was accepted last; empty at first."""
    if not BASELINE.is_file():
        return {"traffic": {}, "machine_code": {}}
    return json.loads(BASELINE.read_text(encoding="utf-8"))


def accept(found: dict[str, Any]) -> None:
    """Make it the baseline; machine code that could not be looked at stays what it was."""
    kept = {key: value for key, value in read_baseline().items() if key in ("machine_code", "compiled_by")}
    result = {"traffic": found["traffic"], **kept}
    result |= {key: found[key] for key in ("machine_code", "compiled_by") if key in found}
    write_atomically(BASELINE, _one_line_each(result) + "\n")


def _one_line_each(result: dict[str, Any]) -> str:
    """JSON with a line for each row, so that a difference can be read."""

    def lines(value: Any, depth: int, indent: str) -> str:
        if depth == 0 or not isinstance(value, dict):
            return json.dumps(value)
        inner = (f"{indent} {json.dumps(key)}: {lines(v, depth - 1, indent + ' ')}" for key, v in value.items())
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"

    depths = {"traffic": 1, "machine_code": 2}
    inner = (f' "{key}": {lines(value, depths.get(key, 0), " ")}' for key, value in result.items())
    return "{\n" + ",\n".join(inner) + "\n}"


# ---- tables -------------------------------------------------------------------------------------------------


def table(rows: list[list[str]], left: int) -> list[str]:
    """Columns under their names (the first row), `left` of them to the left, two spaces between."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    return ["  ".join(p(cell, w) for p, cell, w in zip(pad, row, widths, strict=True)).rstrip() for row in rows]


def traffic_table(found: dict[str, dict[str, Any]], cases: Iterable[Case]) -> list[str]:
    """A row for each case; columns where nothing happens anywhere are left out."""
    rows = [["call", "path", "launches", "MB", "/ least", "sectors / fewest", "bank conflicts", "FLOPs / fewest"]]
    for case in cases:
        row = found[case.name]
        flops = f"{over(row, 'flops', 'least_flops'):.3f}" if row["flops"] or row["least_flops"] else ""
        rows.append(
            [
                case.name,
                row["path"],
                str(row["launches"]),
                f"{row['bytes'] / 1e6:.2f}",
                f"{over(row, 'bytes', 'least_bytes'):.3f}",
                f"{over(row, 'sectors', 'ideal_sectors'):.3f}",
                str(row["bank_conflicts"] or ""),
                flops,
            ]
        )
    kept = [i for i in range(len(rows[0])) if i < 6 or any(row[i] for row in rows[1:])]
    return table([[row[i] for i in kept] for row in rows], left=2)


def machine_code_table(kernels: dict[str, dict[str, Any]], chip: str) -> list[str]:
    """A row for each kernel of an architecture; kinds of instructions that none of them has are left out."""
    kinds = [kind for kind in machine_code.KINDS if any(row["instructions"][kind] for row in kernels.values())]
    rows = [["kernel", "threads", "registers", "shared", "local", "warps", "limited by", *kinds, "other"]]
    for name, row in sorted(kernels.items()):
        warps = f"{row['warps']}/{CHIPS[chip].warps}" if "warps" in row else "?"
        shared = row["shared_bytes"] + row.get("dynamic_shared_bytes", 0)
        numbers = [row.get("threads", "?"), row["registers"], shared or "", row["local_bytes"] or "", warps]
        counts = [row["instructions"][kind] or "" for kind in (*kinds, "other")]
        rows.append([name, *map(str, numbers), row.get("limit", "?"), *map(str, counts)])
    return table(rows, left=1)


def report(found: dict[str, Any], cases: list[Case]) -> str:
    """Everything that was found, for people."""
    lines = ["What moves, counted by the emulator (before any cache):", ""]
    lines += traffic_table(found["traffic"], cases)
    for arch, kernels in found.get("machine_code", {}).items():
        nvcc = found["compiled_by"]["nvcc"]
        lines += [
            "",
            f"Machine code for {arch}, by nvcc {nvcc} (bytes; warps that a multiprocessor holds at a time):",
            "",
        ]
        lines += machine_code_table(kernels, arch) if arch in CHIPS else [f"no limits of {arch} are known here"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What can be known of the kernels without a GPU.")
    parser.add_argument("--accept", action="store_true", help="make what is found the baseline")
    parser.add_argument("--only", default="", metavar="WORD", help="calls whose name has this word, not compared")
    arguments = parser.parse_args(argv)
    if arguments.accept and arguments.only:
        parser.error("--accept takes all calls; leave --only out")
    cases = [case for case in every_case() if arguments.only in case.name]
    if not cases:
        parser.error(f"no call has {arguments.only!r} in its name")
    try:
        found = measure(cases, with_machine_code=not arguments.only)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(found, cases))
    if arguments.only:
        return 0
    baseline = read_baseline()
    compared = comparable(found, baseline)
    wrong = [text for case in cases for text in missed(case, found["traffic"][case.name])]
    wrong += unreached(found)
    print()
    if why := (found if arguments.accept else compared).get("skipped"):
        print(f"skipped: the machine code: {why}")
    if arguments.accept:
        accept(found)
        print(f"accepted: {BASELINE.relative_to(Path(__file__).parents[1])}")
    else:
        changed = differences(compared, baseline)
        wrong += [*changed, f"If this is meant to be so: {ACCEPT}"] if changed else []
        print("" if wrong else "As in the baseline.")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

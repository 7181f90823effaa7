"""The kernel minute: the CUDA kernels at work on this CPU, and what is seen when one barrier is taken out of them.

    python benchmarks/kernel_minute.py [--seconds 60] [--library FOLDER] [--unless-gpu]

`make kernels` ends with it where there is no GPU, `make demo` shows some seconds of it. Every op that the emulator's
library serves runs its kernels, the same sources that nvcc compiles, with every access to memory checked: its error
and torch's own against float64 (fastgpt/accuracy.py), gradcheck in float64, and what its calls in benchmarks/cases move
over the least possible. The exit code is 1 where a kernel is wrong, or where a barrier that is missing goes unnoticed;
where there is no library, one line says so. It checks correctness, and takes no time of anything.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import static
import torch
from cases import every_case
from rich.syntax import Syntax
from rich.text import Text

from fastgpt import accuracy, native
from fastgpt.demo.screen import HEAD, MARGIN, MUTED, OURS, Screen
from fastgpt.machine import cpu_name, nvidia_driver
from fastgpt.native import build, loading
from fastgpt.native.schemas import read_pages

ROOT = build.CSRC.parent
SECONDS = 60.0
LAST_SECONDS = 2.0  # of them, kept for the barrier
RIGHT, WRONG = "green", "bold red"


# ---- one op ----------------------------------------------------------------------------------------------


@dataclass
class Examined:
    """What was seen of an op; of one that is wrong, as far as it came."""

    op: str
    errors: dict[torch.dtype, accuracy.Errors] = field(default_factory=dict)
    gradients: str = ""
    """ok, or - for an op that has none."""
    traffic: list[dict[str, Any]] = field(default_factory=list)
    """As `static.traffic` counts it, for one call of each entry."""
    launched: list[dict[str, Any]] = field(default_factory=list)
    """As `native.launches` gives them, of everything but these calls."""
    wrong: str = ""
    """One line, or nothing."""

    @property
    def kernels(self) -> list[str]:
        """The names of those that ran, without template arguments, in the order of their first launch."""
        names = [name for row in self.traffic for name in row["shapes"]]
        names += [static.machine_code.plain_name(launch["kernel"]) for launch in self.launched]
        return list(dict.fromkeys(name.partition("<")[0] for name in names))

    def over(self, what: str, least: str) -> float:
        """Of the entry for which it is largest."""
        return max(static.over(row, what, least) for row in self.traffic)


def examine(op: str, disabled_site: int | None = None) -> Examined:
    """Runs an op's kernels on the inputs of fastgpt/accuracy.py and on the first case of each of its entries."""
    found = Examined(op)
    try:
        with native.emulated(profile=True, only=[op], disabled_site=disabled_site):
            native.launches(), native.counters(), findings()
            for dtype in accuracy.DTYPES:
                errors = found.errors[dtype] = accuracy.errors(op, dtype)
                if not errors.within:
                    name = str(dtype).removeprefix("torch.")
                    off = f"off by {errors.ours:.1e} in {name}, torch's own by {errors.torchs:.1e}"
                    found.wrong = found.wrong or off
            found.gradients = "ok" if check_gradients(op) else "-"
            found.launched = native.launches()
        for entry in read_pages().get(op, ()):
            case = next(case for case in every_case() if case.entry == entry)
            found.traffic.append(static.traffic(case, checked=True))
            found.wrong = found.wrong or "; ".join(static.missed(case, found.traffic[-1]))
    except Exception as error:  # of the emulator, of gradcheck; whatever it is, the other ops are looked at too
        said = findings()
        found.wrong = told(said[0]) if said else (str(error).splitlines() or [type(error).__name__])[0]
    return found


def findings() -> list[native.Finding]:
    """What the emulator has found since the last call, data races first: they say what is missing."""
    return sorted(native.findings(), key=lambda finding: finding.kind != "data race")


def told(finding: native.Finding) -> str:
    """A finding in one line."""
    kernel = static.machine_code.plain_name(finding.kernel)
    return f"{finding.kind}: {finding.message}; in {kernel}, at {finding.file}:{finding.line}"


def check_gradients(op: str) -> bool:
    """gradcheck in float64 along random directions; False where the op has no gradient. Raises RuntimeError."""
    trial = accuracy.TRIALS[op]
    if not trial.differentiable:
        return False
    inputs = [x.requires_grad_(x.is_floating_point()) for x in trial.inputs(1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.autograd.gradcheck(trial.ours, inputs, fast_mode=True)


# ---- a barrier that is missing -----------------------------------------------------------------------------


def barriers(op: str) -> list[native.Site]:
    """Every __syncthreads that a small call of an op meets, those in a kernel itself before those in helpers; none of
    an op that is wrong already."""
    with native.emulated(only=[op]):
        try:
            accuracy.errors(op, torch.bfloat16)
        except RuntimeError:
            return []
        met = [site for site in native.sites(met_inside=True) if site.kind == "__syncthreads"]
    return sorted(met, key=lambda site: (len(site.inlined), site.file, site.line))


def findings_without(op: str, site: native.Site) -> list[native.Finding]:
    """What the emulator says of the same call with a site switched off."""
    findings()
    try:
        with native.emulated(only=[op], disabled_site=site.id):
            accuracy.errors(op, torch.bfloat16)
    except RuntimeError:  # which has the same in words
        pass
    return findings()


_RACE = re.compile(r"(\w+) of .* with the (\w+) by thread [(\d,)]+.* \(([^()]+):(\d+)\)")


def marks(site: native.Site, finding: native.Finding) -> dict[int, str]:
    """What is to be said of lines of the site's file: the barrier, and both accesses of a race."""
    found = {site.line: "taken out"}
    race = _RACE.fullmatch(finding.message)
    if race and race[3] == site.file:
        found.setdefault(int(race[4]), race[2])
    if finding.file == site.file:
        found.setdefault(finding.line, race[1] if race else "here")
    return found


def excerpt(marked: Sequence[int], lines: int) -> list[int]:
    """The numbers of the marked lines of a file of so many, and of those beside them."""
    return sorted({n for line in marked for n in range(line - 1, line + 2) if 1 <= n <= lines})


# ---- on the screen -------------------------------------------------------------------------------------------

# Of a table that fits 80 columns: two lines of a title, and the width.
COLUMNS = (
    ("", "op", 20),
    ("", "ours", 7),
    ("error in", "torch's", 8),
    ("bf16", "ratio", 6),
    ("fp32", "ratio", 6),
    ("fp64", "grads", 6),
    ("bytes", "/least", 7),
    ("sectors", "/fewest", 8),
    ("bank", "confl.", 7),
    ("", "bugs", 5),
)
LEGEND = (
    "ours, torch's: the largest error against fp64 over outputs and gradients, a share of the largest value there; the "
    "rule allows a ratio of 2, and rounding. grads: torch.autograd.gradcheck in fp64. bytes, 32-byte sectors: over the "
    "fewest that the call needs; attention's tiles read the same keys, so there it depends on the length. bugs: "
    "whatever is wrong with an access to memory or with the synchronisation; every access of every thread was seen."
)


def row(screen: Screen, cells: Sequence[tuple[str, str]]) -> None:
    """(text, style) for each column; the first to the left."""
    more = max(0, (screen.console.width - sum(width for *_, width in COLUMNS)) // (len(COLUMNS) - 1))
    parts = [
        (f"{text:<{width}}" if n == 0 else f"{text:>{width + more}}", style)
        for n, ((text, style), (*_, width)) in enumerate(zip(cells, COLUMNS, strict=True))
    ]
    line = Text.assemble(*parts)
    line.rstrip()
    screen.console.print(line, no_wrap=True, overflow="crop", crop=True)


def show_head(screen: Screen) -> None:
    for titles in zip(*(column[:2] for column in COLUMNS), strict=True):
        row(screen, [(title, MUTED) for title in titles])


def show(screen: Screen, found: Examined) -> None:
    """A row of the table; the kernels that ran, and what is wrong, under it."""
    bf16, fp32 = (found.errors.get(dtype) for dtype in accuracy.DTYPES)
    traffic = found.traffic
    row(
        screen,
        [
            (found.op, OURS),
            (short(bf16.ours) if bf16 else "", ""),
            (short(bf16.torchs) if bf16 else "", ""),
            ratio(bf16),
            ratio(fp32),
            (found.gradients, RIGHT if found.gradients == "ok" else MUTED),
            (f"{found.over('bytes', 'least_bytes'):.2f}" if traffic else "", ""),
            (f"{found.over('sectors', 'ideal_sectors'):.2f}" if traffic else "", ""),
            (str(sum(counted["bank_conflicts"] for counted in traffic)) if traffic else "", ""),
            ("✗", WRONG) if found.wrong else ("0", RIGHT),
        ],
    )
    note = "" if traffic or found.wrong else f"; counted with {loading.SERVED_BY[found.op]}"
    for text, style in ((braced(found.kernels) + note, MUTED), (found.wrong, WRONG)):
        for line in Text(text).wrap(screen.console, screen.console.width - 2) if text else ():
            screen.console.print(Text.assemble("  ", (line.plain.rstrip(), style)), no_wrap=True)


def short(error: float) -> str:
    """0.0035 -> 3.5e-3."""
    return re.sub(r"e([+-])0", r"e\1", f"{error:.1e}") if error else "0"


def ratio(errors: accuracy.Errors | None) -> tuple[str, str]:
    """Ours over torch's own error, and its style."""
    if errors is None:
        return "", ""
    text = f"{errors.ours / errors.torchs:.2f}" if errors.torchs else "exact" if not errors.ours else "inf"
    return text, RIGHT if errors.within else WRONG


def braced(names: Sequence[str]) -> str:
    """norm_forward_kernel, norm_backward_kernel -> norm_{forward, backward}_kernel."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in same)
    prefix = prefix[: prefix.rfind("_") + 1]
    if len(names) < 2 or not prefix or not all(name.endswith("_kernel") for name in names):
        return ", ".join(names)
    return f"{prefix}{{{', '.join(name[len(prefix) :].removesuffix('_kernel') for name in names)}}}_kernel"


def show_source(screen: Screen, file: str, marked: dict[int, str]) -> None:
    """The marked lines of a source and those around them, highlighted, the marks in the margin."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    numbers = excerpt(list(marked), len(lines))
    code = textwrap.dedent("\n".join(lines[n - 1] for n in numbers))
    highlighted = Text(code)
    if screen.live_output:
        highlighted = Syntax(code, "cuda", theme="ansi_dark", background_color="default").highlight(code)
        highlighted.rstrip()
    digits = len(str(numbers[-1]))
    for n, text, before in zip(numbers, highlighted.split("\n"), [numbers[0] - 1, *numbers], strict=False):
        if n != before + 1:
            screen.console.print(Text(" " * (MARGIN + digits) + " ⋮", style=MUTED))
        mark = marked.get(n, "")
        style = WRONG if mark == "taken out" else HEAD
        if mark == "taken out":
            text = Text(text.plain, style=f"{WRONG} strike")
        line = Text.assemble((f"{mark:<{MARGIN}}", style), (f"{n:>{digits}} │ ", MUTED), text)
        line.truncate(screen.console.width, overflow="ellipsis")
        screen.console.print(line, no_wrap=True)


def take_out_a_barrier(screen: Screen, ops: Sequence[str]) -> bool:
    """Shows what the emulator says of the first op that has a barrier when that is missing; False: nothing."""
    op, site = next(((op, sites[0]) for op in ops if (sites := barriers(op))), ("", None))
    if site is None:
        screen.line("barrier", "none of these kernels has a __syncthreads to take out")
        return True
    found = findings_without(op, site)
    screen.line(
        "barrier",
        f"And if one were forgotten? Without the __syncthreads at {site.file}:{site.line}, switched off for this call, "
        f"{op} on the same inputs gives:",
    )
    screen.print()
    if not found:
        show_source(screen, site.file, {site.line: "taken out"})
        screen.print()
        screen.line("", Text("nothing. The emulator does not notice that it is missing.", style=WRONG))
        return False
    worst = found[0]
    show_source(screen, site.file, marks(site, worst))
    screen.print()
    screen.line("", Text.assemble((worst.kind, WRONG), told(worst).removeprefix(worst.kind)))
    screen.print()
    screen.line("", "The tests do this to every barrier and index test of the kernels, and fail if nothing notices.")
    return True


def tell(screen: Screen, seconds: float) -> int:
    """The whole of it in about so many seconds; returns the exit code."""
    began = time.monotonic()
    library = loading.library("emulated")
    if isinstance(library, loading.Refused):
        screen.line("kernels", f"not shown: {library}")
        return 0
    label = (" checks correctness, not speed ", "reverse")
    screen.line("kernels", Text.assemble(label, " the CUDA kernels, without a GPU"))
    how = f"compiled by {library.info['compiler']} from the sources that nvcc compiles, and run on this CPU"
    screen.line("", Text(f"{how} ({cpu_name()}) by an emulator of GPU threads", style=MUTED))
    screen.print()
    show_head(screen)
    ops, examined = [op for op in native.OPS if op in library.ops], []
    longest = 0.0  # as long as which the next op may take
    for op in ops:
        start = time.monotonic()
        if examined and start - began + longest > seconds - LAST_SECONDS:
            break
        with screen.busy(op):
            examined.append(examine(op))
        longest = max(longest, time.monotonic() - start)
        show(screen, examined[-1])
    if late := ops[len(examined) :]:
        screen.print(Text(f"out of time for {', '.join(late)}; `make kernels` shows all", style=MUTED))
    screen.print()
    screen.line("", Text(LEGEND, style=MUTED))
    screen.print()
    wrong = [found.op for found in examined if found.wrong]
    if not take_out_a_barrier(screen, [op for op in ops if op not in wrong]):
        wrong.append("the emulator")
    screen.print()
    kernels = {name for found in examined for name in found.kernels}
    launches = sum(launch["launches"] for found in examined for launch in [*found.launched, *found.traffic])
    verdict = (f"wrong: {', '.join(wrong)}", WRONG) if wrong else ("right", RIGHT)
    ran = f"; {len(kernels)} kernels of {len(examined)} ops in {launches:,} launches on a CPU"
    screen.line("verdict", Text.assemble(verdict, ran, f", {time.monotonic() - began:.0f} s"))
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """Runs it with command-line arguments; returns the exit code."""
    parser = argparse.ArgumentParser(description="The CUDA kernels at work on this CPU, under the emulator's checks.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no further op is begun after these")
    parser.add_argument("--library", type=Path, default=loading.FOLDER, help="the folder of another library's file")
    parser.add_argument("--unless-gpu", action="store_true", help="do nothing where there is an NVIDIA GPU")
    arguments = parser.parse_args(argv)
    if arguments.unless_gpu and nvidia_driver() is not None:
        return 0
    loading.library("emulated", arguments.library)
    screen = Screen()
    screen.print()
    return tell(screen, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())

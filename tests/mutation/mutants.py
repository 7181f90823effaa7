"""Runs scenarios with one site switched off, or made wrong, after another.

Every mutant runs in a process of its own, forked from this one: whatever it does to its memory ends with it, and one
that runs on for ever has a limit of processor time. It runs the scenarios that meet its site, the quickest first, until
something is noticed: a finding of the emulator, a result that is not bitwise that of the unchanged kernels, a crash, no
end. The first child of all (`control`) switches nothing off: it must notice nothing, or no verdict would mean anything.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

from torch import Tensor

from fastgpt import native
from tests.mutation.scan import Call, Sources
from tests.ops import kernels

SURVIVED = "survived"
MOST_TIMES = 20  # the processor time of the unchanged kernels that a mutant may take, and at least LEAST_SECONDS
LEAST_SECONDS = 4.0
STUCK_SECONDS = 300  # of wall time: only a mutant that waits, without working, gets there


@dataclass(frozen=True)
class Scenario:
    """One small call of kernels, on a chip: what comes out of it is compared bit by bit."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    chip: str = "sm_90a"


@dataclass(frozen=True)
class Mutant:
    """A site, what is done to it, and what names both whatever the site's line is."""

    site: native.Site
    alteration: str | None
    """How the call is made wrong; None: it is switched off."""
    key: tuple[str, ...]
    """The alteration, if there is one; the call and those through which it was inlined: file, function and code of
    each, innermost first."""

    @property
    def places(self) -> tuple[str, ...]:
        return (f"{self.site.file}:{self.site.line}", *self.site.inlined)

    @property
    def order(self) -> str:
        """Sorts mutants in an order that has nothing to do with where they are, and stays."""
        return hashlib.sha256(repr((self.site.kind, self.key)).encode()).hexdigest()

    def text(self) -> str:
        places = " <- ".join(self.places)
        what = f", {self.alteration}," if self.alteration else ""
        return f"{self.site.kind}{what} at {places}\n" + "".join(f'    "{line}",\n' for line in self.key)


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant | None
    """None: nothing was done to any site."""
    outcome: str
    """SURVIVED, or by what it was noticed."""
    detail: str
    ran: tuple[str, ...]
    """Names of the scenarios, the last of which noticed it."""
    seconds: float

    def text(self) -> str:
        head = self.mutant.text() if self.mutant else "every site as it is\n"
        return f"{head}  {self.outcome}{': ' if self.detail else ''}{self.detail}; ran: {', '.join(self.ran)}"


def emulated(scenario: Scenario, mutant: Mutant | None) -> AbstractContextManager[None]:
    if mutant is None:
        return native.emulated(chip=scenario.chip)
    if mutant.alteration is None:
        return native.emulated(chip=scenario.chip, disabled_site=mutant.site.id)
    return native.emulated(chip=scenario.chip, altered_site=(mutant.site.id, mutant.alteration))


def met_sites() -> list[native.Site]:
    return native.sites(met_inside=True)


@dataclass
class Mutation:
    """Scenarios, what they give unchanged, and the sites that each meets."""

    scenarios: Sequence[Scenario]
    sources: Sources
    inside: Callable[[Scenario, Mutant | None], AbstractContextManager[None]] = emulated
    met: Callable[[], list[native.Site]] = met_sites
    results: dict[str, list[Tensor]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reached_by: dict[native.Site, list[Scenario]] = field(default_factory=dict)
    """Quickest first."""

    def __post_init__(self) -> None:
        names = [scenario.name for scenario in self.scenarios]
        assert len(set(names)) == len(names), "two scenarios have the same name"
        for scenario in self.scenarios:
            began = time.process_time()
            with self.inside(scenario, None):
                self.results[scenario.name] = [result.detach().clone() for result in scenario.run()]
                self.seconds[scenario.name] = time.process_time() - began
                met = self.met()
            for site in met:
                self.reached_by.setdefault(site, []).append(scenario)
        for scenarios in self.reached_by.values():
            scenarios.sort(key=lambda scenario: self.seconds[scenario.name])

    @cached_property
    def mutants(self) -> list[Mutant]:
        """In the order of Mutant.order."""
        made = []
        for site in self.reached_by:
            key = tuple(map(self.sources.key, (f"{site.file}:{site.line}", *site.inlined)))
            made.append(Mutant(site, None, key))
            made += [Mutant(site, alteration, (alteration, *key)) for alteration in site.alterations]
        return sorted(made, key=lambda mutant: mutant.order)

    @cached_property
    def control(self) -> Verdict:
        """Nothing done to any site: the same results, in a child too."""
        return self._verdict(None, list(self.scenarios))

    def verdict(self, mutant: Mutant) -> Verdict:
        """Whether anything notices what is done to the mutant's site."""
        assert self.control.outcome == SURVIVED, self.control.text()
        return self._verdict(mutant, self.reached_by[mutant.site])

    def verdicts(self, mutants: Iterable[Mutant]) -> list[Verdict]:
        return [self.verdict(mutant) for mutant in mutants]

    @cached_property
    def unreached(self) -> list[Call]:
        """Lines with a barrier or an index test in them, or inlined into them, that no scenario meets."""
        met = {place for mutant in self.mutants for place in mutant.places}
        return [call for call in self.sources.calls if call.place not in met and not call.of_lambda]

    def _verdict(self, mutant: Mutant | None, scenarios: list[Scenario]) -> Verdict:
        unchanged = sum(self.seconds[scenario.name] for scenario in scenarios)
        said, status, seconds = _in_child(
            lambda say: self._run(mutant, scenarios, say),
            max(LEAST_SECONDS, MOST_TIMES * unchanged),
        )
        ran = tuple(line["ran"] for line in said if "ran" in line)
        [noticed] = [line for line in said if "outcome" in line] or [{"outcome": SURVIVED, "detail": ""}]
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            assert number != signal.SIGALRM, f"a child waited for {STUCK_SECONDS} s, in {ran[-1:]}"
            noticed = {
                "outcome": "no end" if number == signal.SIGPROF else "crash",
                "detail": signal.Signals(number).name,
            }
        elif os.WEXITSTATUS(status):
            noticed = {"outcome": "crash", "detail": f"exit status {os.WEXITSTATUS(status)}"}
        return Verdict(mutant, noticed["outcome"], noticed["detail"], ran, seconds)

    def _run(self, mutant: Mutant | None, scenarios: list[Scenario], say: Callable[..., None]) -> None:
        for scenario in scenarios:
            say(ran=scenario.name)
            try:
                with self.inside(scenario, mutant):
                    results = [result.detach() for result in scenario.run()]
            except RuntimeError as error:  # which is what a launch with findings raises
                say(outcome="finding", detail=str(error).split("\n")[0])
                return
            expected = self.results[scenario.name]
            for i, (got, wanted) in enumerate(zip(results, expected, strict=True)):
                if not kernels.same([got], [wanted]):
                    say(outcome="another result", detail=f"tensor {i} of {len(expected)}")
                    return


def _in_child(work: Callable[[Callable[..., None]], None], seconds: float) -> tuple[list[dict[str, Any]], int, float]:
    """What work(say) says in a forked process, how it ended (see os.waitpid), and the processor time it took.

    A child that takes longer than `seconds` of it ends with SIGPROF.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_child(work, writer, seconds)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as said:
        lines = [json.loads(line) for line in said]
    _, status, usage = os.wait4(child, 0)
    return lines, status, usage.ru_utime + usage.ru_stime


def _be_child(work: Callable[[Callable[..., None]], None], writer: int, seconds: float) -> NoReturn:
    """Never returns into the tests, whatever happens."""
    try:
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        faulthandler.disable()  # a crash is what is asked for here, and nobody wants to see where
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(STUCK_SECONDS)
        work(lambda **line: os.write(writer, json.dumps(line).encode() + b"\n") and None)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

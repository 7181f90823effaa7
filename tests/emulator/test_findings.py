"""For every kind of finding a faulty kernel, reported where it is wrong, and its correct twin, which is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import Emulator

HERE = Path(__file__).parent
SOURCE = HERE / "twins.cu"
# The kinds are listed here too, so that a twin that vanishes is missed.
TWINS = dict(re.findall(r'^TWINS\((\w+), "([^"]+)"\)', SOURCE.read_text(), re.MULTILINE))
LINES = {
    name: number
    for number, line in enumerate(SOURCE.read_text().splitlines(), 1)
    for name in re.findall(r"// HERE (\w+)$", line)
}


def test_every_twin_is_compiled(emulator: Emulator) -> None:
    listed = dict(line.split(" ", 2)[1:] for line in emulator.text("emulator_tests").splitlines() if line[0] == "t")
    assert listed == TWINS
    assert len(TWINS) > 45


@pytest.mark.parametrize("name", TWINS)
def test_fault_is_found_where_it_is(emulator: Emulator, name: str) -> None:
    message = emulator.text("emulator_run_twin", name, 1)
    findings = emulator.findings()
    assert findings, "nothing was found"
    at_fault = [f for f in findings if f["kind"] == TWINS[name]]
    assert at_fault, message
    if name in LINES:
        places = [(f["file"], f["line"]) for f in at_fault]
        assert ("tests/emulator/twins.cu", LINES[name]) in places, message
    for finding in at_fault:
        assert finding["kernel"].startswith(("uses_shared", "needs_hopper", name)), finding["kernel"]
        assert finding["message"] in message
        assert finding["block"] is not None and len(finding["thread"]) == 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_correct_twins_are_silent(emulator: Emulator, seed: int) -> None:
    emulator.configure(seed=seed)
    wrong = {name: message for name in TWINS if (message := emulator.text("emulator_run_twin", name, 0))}
    assert not wrong
    assert emulator.findings() == []


def test_inlined_helpers_are_named(emulator: Emulator) -> None:
    """The line of the access comes first, then the lines that called it, up to the kernel."""
    emulator.text("emulator_run_twin", "inlined_helper", 1)
    finding = next(f for f in emulator.findings() if f["line"] == LINES["inlined_helper"])
    lines = SOURCE.read_text().splitlines()
    called_from = [lines[int(place.split(":")[1]) - 1] for place in finding["inlined"]]
    assert "inner(values, i)" in called_from[0]
    assert "outer(shared.first, threadIdx.x)" in called_from[1]


def test_a_race_names_both_sides(emulator: Emulator) -> None:
    message = emulator.text("emulator_run_twin", "global_race", 1)
    earlier = next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if "y[i] = i;" in line)
    assert "of 'y'" in message
    assert re.search(
        rf"by thread \(\d+,0,0\) is not ordered with .* by thread \(\d+,0,0\) \(.*twins.cu:{earlier}\)", message
    )


def test_a_race_between_blocks_names_both(emulator: Emulator) -> None:
    assert "with the write by block (0,0,0)" in emulator.text("emulator_run_twin", "same_element_of_two_blocks", 1)
    [finding] = emulator.findings()
    assert finding["block"] == [1, 0, 0]


def test_deadlock_says_who_waits_for_what(emulator: Emulator) -> None:
    message = emulator.text("emulator_run_twin", "wrong_bytes", 1)
    assert "64 threads wait in mbarrier.try_wait" in message
    assert "0 of 1 arrivals and 16 bytes are missing" in message
    message = emulator.text("emulator_run_twin", "nobody_arrives", 1)
    assert "32 threads wait in bar.sync" in message
    assert "32 of 64 threads are here" in message
    message = emulator.text("emulator_run_twin", "lanes_missing", 1)
    assert "lanes 0xffff0000 are not here" in message


def test_out_of_bounds_says_by_how_much(emulator: Emulator) -> None:
    assert "4 bytes past the end of 'x' (16384 bytes)" in emulator.text("emulator_run_twin", "past_the_end", 1)
    assert "4 bytes before 'x'" in emulator.text("emulator_run_twin", "before_the_begin", 1)


def test_after_a_finding_the_next_launch_is_clean(emulator: Emulator) -> None:
    assert emulator.text("emulator_run_twin", "nobody_arrives", 1)
    assert emulator.text("emulator_run_twin", "nobody_arrives", 0) == ""
    assert len(emulator.findings()) == 1
    assert emulator.findings() == []


def test_unchecked_runs_report_nothing_that_only_checks_find(emulator: Emulator) -> None:
    emulator.configure(checked=False)
    assert emulator.text("emulator_run_twin", "shared_race", 1) == ""
    assert "deadlock" in emulator.text("emulator_run_twin", "nobody_arrives", 1)
    emulator.findings()

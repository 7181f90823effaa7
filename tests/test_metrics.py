"""metrics.jsonl: what is written comes back, and damage is found, set aside, and stops neither a resume nor a plot."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.errors import UserError
from fastgpt.metrics import MetricsLog, read_metrics
from fastgpt.plot import Run

ROWS = [
    {"step": 0, "seconds": 0.0, "val_loss": 5.5, "val_bits_per_byte": 3.25, "val_tokens": 64},
    *({"step": step, "seconds": step / 2, "loss": 5.0 - step / 4, "lr": 1e-3} for step in range(1, 5)),
    {"step": 5, "skipped": True, "samples": [32, 40]},
]


def write(path, rows=ROWS, step=-1):
    """Rows through a log that resumes at `step`; returns what it warned of."""
    warnings = []
    log = MetricsLog(path, step, warnings.append)
    for row in rows:
        log.write(row)
    log.close()
    return warnings


@pytest.fixture
def path(tmp_path):
    assert write(tmp_path / "metrics.jsonl") == []
    return tmp_path / "metrics.jsonl"


def test_what_was_written_comes_back_and_a_resume_drops_what_follows_its_step(path):
    assert read_metrics(path) == ROWS
    again = {"step": 3, "seconds": 9.0, "loss": 1.0}
    assert write(path, [again], step=2) == []
    assert read_metrics(path) == [*ROWS[:3], again]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_number_that_is_not_finite_comes_back_as_nan(path):
    write(path, [{"step": 6, "seconds": 3.0, "loss": math.inf}], step=5)
    assert path.read_text().splitlines()[-1] == '{"step": 6, "seconds": 3.0, "loss": null}'
    assert math.isnan(read_metrics(path)[-1]["loss"])
    assert len(Run.read(path.parent).train_loss) == 4
    before = path.read_bytes()
    write(path, [], step=6)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_last_line_cut_short_is_no_damage(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    expected = ROWS if cut == 1 else ROWS[:-1]  # without its line break alone, a line is whole
    assert read_metrics(path) == expected
    assert write(path, [{"step": 6}], step=5) == []
    assert read_metrics(path) == [*expected, {"step": 6}]


BAD = {
    "no UTF-8": b"\xff",
    "no JSON": b"#",
    "empty": b"",
    "zeros": bytes(40),
    "a list": b"[]",
    "a number": b"7",
    "nested too deep": b"[" * 100_000,
    "no step": b'{"stfp": 3, "seconds": 1.0, "loss": 2.0}',
    "a step that is no number": b'{"step": "3"}',
    "a step that is a fraction": b'{"step": 3.0}',
    "a step that is null": b'{"step": null}',
    "a loss that is no number": b'{"step": 3, "seconds": 1.0, "loss": "2"}',
    "a loss too large": b'{"step": 3, "seconds": 1.0, "loss": 1' + b"0" * 400 + b"}",
    "a loss without its time": b'{"step": 3, "loss": 2.0}',
    "a loss at no time": b'{"step": 3, "seconds": null, "loss": 2.0}',
    "a validation without its bits": b'{"step": 3, "seconds": 1.0, "val_loss": 2.0}',
    "what cannot be written again": b'{"step": 3, "samples": [NaN]}',
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("places", [(0,), (3,), (6,), (1, 4)])
def test_damaged_lines_are_left_out_and_the_file_set_aside(path, bad, places):
    lines = path.read_bytes().splitlines(keepends=True)
    for place in reversed(places):
        lines.insert(place, BAD[bad] + b"\n")
    damaged = b"".join(lines)
    path.write_bytes(damaged)
    count = "1 line is" if len(places) == 1 else "2 lines are"
    for read in (read_metrics, lambda path: Run.read(path.parent)):
        with pytest.raises(UserError) as caught:
            read(path)
        assert f"{path}: {count} damaged, the first is line {places[0] + 1}; " in str(caught.value)
        assert "\n" not in str(caught.value)
    aside = path.with_name("damaged-metrics-step-5.jsonl")
    assert write(path, [{"step": 6}], step=5) == [
        f"{path}: {count} damaged and left out; the file as it was is {aside.name}"
    ]
    assert aside.read_bytes() == damaged
    assert read_metrics(path) == [*ROWS, {"step": 6}] and len(Run.read(path.parent).train_loss) == 4
    assert write(path, [], step=6) == []


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_costs_only_the_lines_it_is_in(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "metrics.jsonl"
    write(path)
    content = bytearray(path.read_bytes())
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "zero", "garbage", "cut"]))
    first = last = bit // 8
    if kind == "flip":
        content[first] ^= 1 << bit % 8
    elif kind == "cut":
        last = len(content)
        del content[first:]
    else:
        size = len(content[first : first + 64])
        last = first + size - 1
        content[first : last + 1] = (
            data.draw(st.binary(min_size=size, max_size=size)) if kind == "garbage" else bytes(size)
        )
    path.write_bytes(content)
    try:
        Run.read(path.parent)
    except UserError as error:
        assert "\n" not in str(error)
    # a line break that is gone takes the next line along
    starts = [0, *ends[:-1]]
    untouched = [row for row, start, end in zip(ROWS, starts, ends, strict=True) if last + 1 < start or end <= first]
    warnings = write(path, [], step=5)
    rows = read_metrics(path)
    assert len(warnings) <= 1
    assert [row for row in rows if row in untouched] == untouched
    assert bool(warnings) == path.with_name("damaged-metrics-step-5.jsonl").exists()
    assert all(type(row["step"]) is int for row in rows)
    json.loads("[" + ",".join(path.read_text().splitlines()) + "]")


def test_a_disk_too_full_to_set_it_aside_loses_nothing(path, monkeypatch):
    path.write_bytes(b"\xff\n" + path.read_bytes())
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, [], step=5)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]

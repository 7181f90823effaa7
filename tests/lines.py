"""For pytest -p tests.lines: a line of JSON in the file $FASTGPT_LINES before each test, and one after it.

So much is known when the process is ended, or dies. What the file tells of is not run again; after an error that a
GPU's context does not survive the session ends, for every other test would fail. tools/gpu.py reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

LOST = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address|illegal instruction|"
    r"launch timed out|uncorrectable|device is unavailable|CUDA error: (?!out of memory)"
)
FILE = Path(os.environ.get("FASTGPT_LINES", os.devnull))
sharing_out = False


def pytest_configure(config: pytest.Config) -> None:
    global sharing_out
    sharing_out = bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")


def say(**facts: Any) -> None:
    """Add a line to the file. Where pytest-xdist shares the tests out each worker does, and not the process they
    report to, which hears of everything later."""
    if sharing_out:
        return
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def told(file: Path) -> set[str]:
    """The names that a file of lines tells of; a line that was cut off is none."""
    found = set()
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.add(json.loads(line)["name"])
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = told(FILE)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    say(name=nodeid, state="begun")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    outcome = yield
    report = outcome.get_result()
    if report.when == "setup" and report.outcome == "passed":
        return
    if report.when == "teardown" and report.outcome == "passed":
        return
    text = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or "")
    say(name=item.nodeid, state=report.outcome, seconds=round(report.duration, 2), reason=text[-2000:])
    if report.outcome == "failed" and LOST.search(text):
        item.session.shouldstop = "the GPU's context is lost"

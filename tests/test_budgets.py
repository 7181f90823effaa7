"""A whole run of the tests fails where an area overruns its budget, and no other run does."""

from pathlib import Path

import pytest

from tests import conftest

pytest_plugins = "pytester"

TESTS = """
import time
import pytest

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_quick():
    pass

def test_busy():
    work(0.1)

@pytest.mark.slow
def test_slow():
    work(0.6)
"""
CHILD = """
import subprocess, sys

def test_child():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.1: pass"], check=True)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """tests/ops/test_a.py and tests/test_b.py, a tenth of a second each, under this folder's conftest."""
    pytester.makeini("[pytest]\nmarkers = slow: long")
    tests = pytester.mkdir("tests")
    (tests / "ops").mkdir()
    (tests / "ops" / "test_a.py").write_text(TESTS)
    (tests / "test_b.py").write_text(CHILD)
    (tests / "conftest.py").write_text(Path(conftest.__file__).read_text())
    return pytester


def budget(suite: pytest.Pytester, ops: float, others: float, slowness: float = 1.0) -> None:
    with (suite.path / "tests" / "conftest.py").open("a") as file:
        file.write(f'\n\nBUDGETS = {{"ops": ({ops}, ("ops/",)), "others": ({others}, ("",))}}\n')
        file.write(f"def slowness():\n    return {slowness}\n")


@pytest.mark.parametrize(
    "ops, others, failed, workers",
    [(0.5, 60, [], 0), (0.05, 60, ["ops"], 0), (0.5, 0.05, ["others"], 0), (0.05, 0.05, ["ops", "others"], 2)],
)
def test_a_whole_run_is_held_to_the_budgets(
    suite: pytest.Pytester, ops: float, others: float, failed: list[str], workers: int
) -> None:
    budget(suite, ops, others)
    result = suite.runpytest_inprocess("tests", "-m", "not slow", f"-n{workers}")
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK)
    said = [line for line in result.outlines if "overran" in line]
    assert said == [f"FAILED: the tests of {name} overran their budget" for name in failed]
    result.stdout.fnmatch_lines(["processor seconds of budget, *: ops */*, others */*"])


def test_a_slow_machine_may_take_longer(suite: pytest.Pytester) -> None:
    assert 0.1 < conftest.slowness() < 20
    budget(suite, 0.05, 0.5, slowness=10)
    assert suite.runpytest_inprocess("tests", "-m", "not slow").ret == pytest.ExitCode.OK


def test_slow_tests_do_not_count(suite: pytest.Pytester) -> None:
    budget(suite, 0.5, 60)
    assert suite.runpytest_inprocess("tests").ret == pytest.ExitCode.OK


@pytest.mark.parametrize(
    "arguments",
    [
        ["tests/ops"],
        ["tests", "-k", "busy"],
        ["tests", "-k", "busy", "-n", "2"],
        ["tests", "--deselect=tests/test_b.py"],
    ],
)
def test_a_part_of_the_tests_is_not_held_to_them(suite: pytest.Pytester, arguments: list[str]) -> None:
    budget(suite, 0.05, 0.05)
    result = suite.runpytest_inprocess(*arguments)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*of budget*")


def test_the_budgets_fit_the_whole() -> None:
    """`make test` is to take ten minutes of two processors at most, and budgets are twice what is taken."""
    assert sum(seconds for seconds, _ in conftest.BUDGETS.values()) / 2 <= 2 * 600
    assert conftest.area("ops/test_contract.py") == "ops" and conftest.area("test_budgets.py") == "others"

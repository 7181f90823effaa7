"""benchmarks/kernel_minute.py: what it shows is so; a wrong kernel, or a barrier that nothing misses, is a failure."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import kernel_minute as minute  # noqa: E402 - found through the line above

from fastgpt import accuracy, native  # noqa: E402
from fastgpt.demo import kernels  # noqa: E402
from fastgpt.demo.screen import Screen  # noqa: E402
from fastgpt.native import build, loading  # noqa: E402
from tests.native_cases import built  # noqa: E402


@pytest.fixture
def two_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that there is: one op without a barrier, and one that has some."""
    built("emulated")
    monkeypatch.setattr(native, "OPS", ("swiglu", "layer_norm"))


Tell = Callable[..., tuple[int, str]]


@pytest.fixture
def tell(two_ops: None, capsys: pytest.CaptureFixture[str]) -> Tell:
    """The exit code of the command, and what it prints, as one line of words."""

    def tell(*arguments: str) -> tuple[int, str]:
        code = minute.main(list(arguments))
        return code, " ".join(capsys.readouterr().out.split())

    return tell


def test_what_is_shown_is_so(tell: Tell) -> None:
    code, text = tell()
    assert code == 0
    for words in (
        "checks correctness, not speed",
        "on this CPU",
        "swiglu_{forward, backward}_kernel",
        "right; ",
    ):
        assert words in text
    for op in native.OPS:
        found = re.search(rf"{op} (\S+) (\S+) (\S+) (\S+) ok (\S+) (\S+) (\d+) 0 ", text)
        assert found, text
        errors = accuracy_of(op)
        assert float(found[1]) == pytest.approx(errors.ours, rel=0.02)
        assert float(found[3]) == pytest.approx(errors.ours / errors.torchs, abs=0.006)
        assert 1 <= float(found[5]) < 1.1 and float(found[6]) >= 1


def accuracy_of(op: str) -> accuracy.Errors:
    with native.emulated(only=[op]):
        return accuracy.errors(op, torch.bfloat16)


def test_the_missing_barrier_is_shown_where_it_was(tell: Tell) -> None:
    _, text = tell()
    (file, line), shown = re.search(r"__syncthreads at (\S+?):(\d+)", text).groups(), text  # type: ignore[union-attr]
    source = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert "__syncthreads();" in source[int(line) - 1]
    assert f"taken out {line} │ __syncthreads();" in shown
    words = r"data race: .* not ordered with the (\w+) by thread .*\((\S+):(\d+)\); in (\w+)<\w+>, at (\S+):(\d+)"
    race = re.search(words, text)
    assert race, text
    for access, at in ((race[1], race[3]), ({"read": "write", "write": "read"}[race[1]], race[6])):
        assert f"{access} {at} │ {source[int(at) - 1].strip()}" in shown
    assert race[2] == race[5] == file


def test_a_broken_kernel_fails(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    examine, [site, *_] = minute.examine, minute.barriers("layer_norm")
    monkeypatch.setattr(minute, "examine", lambda op: examine(op, disabled_site=site.id))
    code, text = tell()
    assert code == 1
    assert "verdict wrong: layer_norm;" in text and re.search(rf"✗ data race: .*, at {site.file}:\d+ ", text)
    assert "none of these kernels has a __syncthreads" in text  # swiglu's, which are right


def test_a_wrong_result_fails(two_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = accuracy.TRIALS["swiglu"]
    monkeypatch.setitem(accuracy.TRIALS, "swiglu", dataclasses.replace(trial, ours=lambda x: trial.ours(x) * 1.1))
    assert re.match("off by .* in bfloat16, torch's own by", minute.examine("swiglu").wrong)


def test_a_wrong_gradient_fails_gradcheck(two_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the errors in less exact dtypes do not show."""
    trial = accuracy.TRIALS["swiglu"]
    wrong = dataclasses.replace(trial, ours=lambda x: trial.ours(x) + (x.sum() - x.detach().sum()) * 1e-4)
    monkeypatch.setitem(accuracy.TRIALS, "swiglu", wrong)
    with native.emulated(only=["swiglu"]), pytest.raises(RuntimeError, match="Jacobian"):
        minute.check_gradients("swiglu")


def test_too_much_traffic_fails(two_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [dataclasses.replace(case, least_bytes=case.least_bytes // 2) for case in minute.every_case()]
    monkeypatch.setattr(minute, "every_case", lambda: cases)
    assert "times the least bytes" in minute.examine("swiglu").wrong


def test_a_barrier_that_nothing_misses_fails(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minute, "findings_without", lambda op, site: [])
    code, text = tell()
    assert code == 1 and "The emulator does not notice that it is missing" in text and "wrong: the emulator;" in text


def test_no_op_is_begun_when_the_time_is_up(tell: Tell) -> None:
    """The first one always is, and the barrier is shown all the same."""
    code, text = tell("--seconds", "0")
    assert code == 0
    assert "out of time for layer_norm;" in text and "of 1 ops" in text and "data race" in text


def test_without_the_library_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "_libraries", {})
    assert minute.main(["--library", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        "\nkernels    not shown: _ops_emulated.so is not built: build it with `make kernels`\n"
    )


def test_nothing_is_shown_where_a_gpu_is_to_be_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minute, "nvidia_driver", lambda: "580.65")
    assert minute.main(["--unless-gpu"]) == 0
    assert capsys.readouterr().out == ""


def test_a_broken_op_has_no_barrier_to_show(two_ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(op: str, dtype: torch.dtype) -> accuracy.Errors:
        raise RuntimeError("data race: ...")

    assert minute.barriers("layer_norm")
    monkeypatch.setattr(accuracy, "errors", errors)
    assert minute.barriers("layer_norm") == []


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["norm_forward_kernel", "norm_backward_kernel"], "norm_{forward, backward}_kernel"),
        (["norm_forward_kernel"], "norm_forward_kernel"),
        (["a_kernel", "b_kernel"], "a_kernel, b_kernel"),
        (["copy_all", "copy_kernel"], "copy_all, copy_kernel"),
        ([], ""),
    ],
)
def test_names_with_the_same_beginning_are_written_short(names: list[str], text: str) -> None:
    assert minute.braced(names) == text


def test_lines_far_apart_are_shown_with_a_gap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.cu").write_text("".join(f"  line {n};\n" for n in range(1, 21)))
    monkeypatch.setattr(minute, "ROOT", tmp_path)
    out = io.StringIO()
    minute.show_source(Screen(out), "x.cu", {1: "taken out", 20: "read"})
    shown = [line.strip() for line in out.getvalue().splitlines()]
    assert shown == ["taken out   1 │ line 1;", "2 │ line 2;", "⋮", "19 │ line 19;", "read       20 │ line 20;"]


# ---- in the demo -----------------------------------------------------------------------------------------


@pytest.fixture
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No library of `make kernels`; where the demo keeps its own."""
    monkeypatch.setattr(kernels.loading, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(kernels, "BUILT", tmp_path / "built")
    yield tmp_path / "built"


def shown(seconds: float = 15.0) -> str:
    out = io.StringIO()
    kernels.show(Screen(out), seconds)
    return out.getvalue()


def test_the_demo_compiles_two_folders_once_and_shows_their_ops(
    own_folders: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    built("emulated")  # whose objects serve
    assert shown(60.0) == ""
    text = capfd.readouterr().out
    assert text.count("_kernel\n") >= 3 and "data race" in text and "verdict    right;" in text
    assert re.findall(r"^(\w+) .* ok ", text, re.M) == ["swiglu", "layer_norm", "rms_norm"]
    monkeypatch.setattr(kernels, "compile_folders", lambda: pytest.fail("compiled again"))
    monkeypatch.setattr(kernels, "PROGRAM", own_folders / "program.py")
    kernels.PROGRAM.write_text("import sys; print(*sys.argv[1:])")
    assert shown(10.0) == ""
    assert capfd.readouterr().out == f"--library {own_folders} --seconds 7.0\n"


def test_without_a_compiler_the_demo_goes_on_with_one_line(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    text = " ".join(shown().split())
    assert re.fullmatch(r"kernels not shown: no g\+\+ 12 or newer was found; install one \(.*\)", text)


def test_a_compilation_without_end_is_ended(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BUILD_SECONDS", 0.01)
    assert "compiling them took longer than 0 s" in " ".join(shown().split())
    assert not own_folders.exists() or not list(own_folders.glob("*.so"))


def test_an_installed_package_shows_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "PROGRAM", tmp_path / "missing.py")
    monkeypatch.setattr(kernels, "run", lambda *arguments, **options: pytest.fail("something is run"))
    assert shown() == ""


def test_what_takes_too_long_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, own_folders: Path, tmp_path: Path
) -> None:
    child, program = tmp_path / "child", tmp_path / "program.py"
    program.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "time.sleep(100)\n"
    )
    monkeypatch.setattr(kernels, "PROGRAM", program)
    monkeypatch.setattr(kernels, "is_there", lambda folder: True)
    began = time.monotonic()
    assert "ended: they were to take 2 s" in shown(2.0)
    assert time.monotonic() - began < 2 + kernels.LAST_SECONDS
    deadline = time.monotonic() + 10
    while runs(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(int(child.read_text()))


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_only_the_folders_that_are_named_are_compiled() -> None:
    every = build.sources(build.CSRC, "emulated")
    some = build.sources(build.CSRC, "emulated", ["norm"])
    folders = {name.split("/")[1] for _, name in some}
    assert folders == {"norm", "host", "emulator"}
    assert some == [entry for entry in every if entry[1].split("/")[1] in folders]

"""What `make demo`, `make test` and `.ci/run` rest on: pins for everything, a remedy in every refusal."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """tools/environment.py as a module, its .venv in a folder of the test's own."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    return module


def named(requirements: str) -> set[str]:
    return {
        re.split(r"[\s<>=!;\[]", line)[0].lower().replace("_", "-") for line in re.findall(r'"([^"]+)"', requirements)
    }


def test_every_dependency_is_pinned(environment):
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = re.match(r"([\w.-]+)==([\w.]+)", line).groups()
            pinned[name.replace("_", "-")] = version
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:requires|dependencies|data|plot|dev) = \[(.*?)\]$", project, re.S | re.M)
    assert len(lists) == 5
    asked = set().union(*map(named, lists))
    assert asked <= set(pinned), asked - set(pinned)
    assert set(environment.BUILD_TOOLS) <= set(pinned)
    assert environment.torch_pin() == pinned["torch"] == "2.13.0"


def test_a_second_call_has_nothing_to_do(environment, monkeypatch):
    monkeypatch.setattr(environment, "make_venv", lambda: pytest.fail("it installs again"))
    monkeypatch.setattr(environment, "nvidia_gpu", lambda: False)
    monkeypatch.setattr(environment, "runs", lambda: True)
    environment.VENV.mkdir()
    (environment.VENV / "test.stamp").write_text(environment.wanted(gpu=False))
    environment.main("test")
    environment.main("demo")  # test covers demo
    (environment.VENV / "test.stamp").rename(environment.VENV / "demo.stamp")
    environment.main("demo")
    with pytest.raises(pytest.fail.Exception, match="installs again"):
        environment.main("test")


def test_a_changed_pin_or_a_new_gpu_installs_again(environment, monkeypatch, tmp_path):
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    before = environment.wanted(gpu=False)
    assert environment.wanted(gpu=True) != before
    (tmp_path / "constraints.txt").write_text("torch==9\n")
    assert environment.wanted(gpu=False) != before


def test_no_way_to_make_a_venv_is_one_line_with_the_remedy(environment, monkeypatch, capsys):
    monkeypatch.setattr(environment, "succeeds", lambda command: False)
    with pytest.raises(SystemExit) as caught:
        environment.make_venv()
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert "apt install python3-venv" in errors and errors.count("\n") == 1
    assert not environment.VENV.exists()


def test_without_ensurepip_pip_comes_from_outside(environment, monkeypatch):
    """Debian without python3-venv: `venv` fails unless it is told to leave pip out."""
    really = environment.succeeds

    def succeeds(command):
        if "virtualenv" in " ".join(command) or (command[1:3] == ["-m", "venv"] and "--without-pip" not in command):
            return False
        if "--python" in command:  # the network's part, played by the pip at hand
            site = next((environment.VENV / "lib").glob("python*/site-packages"))
            (site / "pip.pth").write_text(str(Path(importlib.util.find_spec("pip").origin).parent.parent))
            return True
        return "--upgrade" in command or really(command)

    monkeypatch.setattr(environment, "succeeds", succeeds)
    environment.make_venv()
    done = subprocess.run([environment.PYTHON, "-m", "pip", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("pip ")


def test_a_folder_that_is_no_venv_is_left_alone(environment, capsys):
    environment.VENV.mkdir()
    (environment.VENV / "precious").write_text("")
    with pytest.raises(SystemExit):
        environment.make_venv()
    assert (environment.VENV / "precious").exists()
    assert "no virtual environment" in capsys.readouterr().err


def test_sizes_are_said_and_the_large_build_is_warned_of(environment, capsys, tmp_path):
    (tmp_path / "a file.whl").write_bytes(b"0" * 1234)
    assert environment.size_of((tmp_path / "a file.whl").as_uri()) == 1234
    assert environment.size_of((tmp_path / "missing.whl").as_uri()) is None
    cpu = [("torch", "2.13.0+cpu", 192_000_000), ("numpy", "2.4.6", None)]
    environment.announce(cpu, gpu=False)
    assert capsys.readouterr().out == (
        "  2 packages, 192 MB and 1 of unknown size: torch 2.13.0+cpu (192 MB), numpy 2.4.6\n"
    )
    environment.announce([("torch", "2.13.0", 527_000_000), ("nvidia-cudnn-cu13", "9", 423_000_000)], gpu=False)
    assert "only the CUDA build" in capsys.readouterr().out
    environment.announce([("nvidia-cuda-nvdisasm", "13", 5_200_000), ("pytest", "9", 400_000)], gpu=False)
    assert "only the CUDA build" not in capsys.readouterr().out  # tools that the tests take
    environment.announce(cpu, gpu=True)
    assert "only the CPU build" in capsys.readouterr().out


def test_an_old_python_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = [ROOT / "tools" / "python.sh", "-c", "print('hello')"]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "Python 3.10 or newer" in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.stdout == "hello\n"


def test_make_alone_lists_the_commands():
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for name in ("demo", "test", "test-all", "lint", "bench"):
        assert f"make {name}" in done.stdout


def test_make_kernels_fails_where_a_kernel_is_wrong():
    done = subprocess.run(["make", "--no-print-directory", "-n", "kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == ".venv/bin/python benchmarks/kernel_minute.py --unless-gpu"


def test_ci_lints_and_tests():
    script = ROOT / ".ci" / "run"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    commands = [line.split(" <")[0] for line in script.read_text().splitlines() if line.startswith("make")]
    assert commands == ["make lint", "make test"]

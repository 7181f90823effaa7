"""`answer(file, function)`: the learner's function, for the exercises' tests."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--answers",
        default=str(Path(__file__).parent),
        help="the folder whose files are checked (docs/guide/exercises)",
    )


@functools.cache
def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def answer(request: pytest.FixtureRequest) -> Callable[[str, str], Callable[..., Any]]:
    def find(file: str, function: str) -> Callable[..., Any]:
        path = Path(request.config.getoption("--answers")) / f"{file}.py"
        written = getattr(_module(path), function, None)
        if written is None:
            pytest.fail(f"{path.name} defines no {function}: put it back, its test calls it", pytrace=False)

        @functools.wraps(written)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = written(*args, **kwargs)
            if result is None:
                pytest.fail(f"{function} returns nothing yet: write it in {path}, as its docstring says", pytrace=False)
            return result

        return call

    return find

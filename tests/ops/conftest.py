"""Where the op tests run: a test that takes `device` runs once for every entry of `rule.DEVICES`."""

import pytest

from tests.rule import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on a GPU is marked so, for `make gpu`."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        if any("cuda" in (value if isinstance(value, tuple) else (value,)) for value in parameters if _words(value)):
            item.add_marker(pytest.mark.gpu)


def _words(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(word, str) for word in value))

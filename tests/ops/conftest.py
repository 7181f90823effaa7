"""Where the op tests run: a test that takes `device` runs once for every entry of `rule.DEVICES`."""

import pytest

from tests.rule import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param

from __future__ import annotations

import pytest

from tests.helpers.zoo import Net


@pytest.fixture
def model() -> Net:
    return Net()

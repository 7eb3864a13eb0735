"""Fixtures of the tests of the data."""

import pytest
from helpers import png


@pytest.fixture
def pictures(tmp_path):
    """A folder with the images `0.png` to `3.png`."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path

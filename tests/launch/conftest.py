"""One prepared federation for all tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))

from worlds import tiny_config

from fedsim.federation.setup import Setup, prepare


@pytest.fixture(scope="session")
def setup() -> Setup:
    """Seven clients with 1 to 6 recordings each."""
    return prepare(tiny_config())

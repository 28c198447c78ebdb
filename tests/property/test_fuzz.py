"""The laws of tests/fuzz for a few mutations of each kind; `make fuzz` tries millions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import Target, targets


@pytest.fixture(scope="module")
def readers() -> Iterator[list[Target]]:
    """All that reads what others wrote."""
    with tempfile.TemporaryDirectory() as folder:
        yield targets(Path(folder))


@hypothesis_settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(random=st.randoms(use_true_random=False), at=st.integers(0, 10**6))
def test_whatever_the_bytes_a_reader_tells_the_truth_about_them_or_refuses_them(
    readers: list[Target], random: Random, at: int
) -> None:
    target = readers[at % len(readers)]
    target.check(mutated(random, target.seeds))

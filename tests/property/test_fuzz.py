"""The laws of tests/fuzz for a few mutations of each kind; `make fuzz` tries millions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import Target, targets


@pytest.fixture(scope="module")
def reader() -> Iterator[Callable[[int], Target]]:
    """Each of those that read what others wrote."""
    with tempfile.TemporaryDirectory() as folder:
        readers = targets(Path(folder))
        yield lambda number: readers[number % len(readers)]


@hypothesis_settings(
    max_examples=600,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**64 - 1), number=st.integers(0, 10**6))
def test_whatever_the_bytes_a_reader_tells_the_truth_about_them_or_refuses_them(
    reader: Callable[[int], Target], seed: int, number: int
) -> None:
    target = reader(number)
    target.check(mutated(Random(seed), target.seeds))  # noqa: S311  # repeatable, not secret

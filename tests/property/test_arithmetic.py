"""What models and readers calculate with, on both warehouses: exact, or NULL, and never an error."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any, TypeAlias

import duckdb
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from faletl.warehouse.duckdb import MACROS
from faletl.warehouse.postgres import FUNCTIONS
from tests.servers import shared_postgres

Engine: TypeAlias = duckdb.DuckDBPyConnection | psycopg.Connection[Any]

MOST = 10**38 - 1
"""The largest amount of a sum, in trillionths."""

SIZES = st.integers(0, 38).flatmap(lambda size: st.integers(0, 10**size - 1))
EDGES = st.sampled_from([0, 1, 10**12, 10**27 - 1, 10**27, 8 * 10**31 - 1, 8 * 10**31, 4 * 10**28, MOST])
ATOMS = st.builds(lambda sign, size: sign * size, st.sampled_from([1, -1]), SIZES | EDGES)
LINES = st.lists(st.tuples(ATOMS, ATOMS, ATOMS.map(abs).filter(bool)), min_size=1, max_size=60)


def amount(atoms: int) -> Decimal:
    """So many trillionths."""
    with localcontext(prec=80):
        return Decimal(atoms).scaleb(-12)


def rounded(exact: Fraction) -> Decimal:
    """To 12 decimals, half away from zero."""
    atoms = abs(exact) * 10**12
    whole = (2 * atoms.numerator + atoms.denominator) // (2 * atoms.denominator)
    return amount(whole if exact >= 0 else -whole)


@pytest.fixture(params=["duckdb", "postgres"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A database with the functions of a warehouse."""
    if request.param == "duckdb":
        with duckdb.connect() as connection:
            for macro in MACROS:
                connection.execute(macro)
            yield connection
        return
    url = shared_postgres().new_database(f"test_{secrets.token_hex(6)}")
    with psycopg.connect(url, autocommit=True) as session:
        for function in FUNCTIONS:
            session.execute(function.encode())
        yield session


def rows_of(engine: Engine, query: str) -> list[tuple[Any, ...]]:
    """What a query finds."""
    if isinstance(engine, psycopg.Connection):
        return engine.execute(query.encode()).fetchall()
    return engine.execute(query).fetchall()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES)
@example(
    [
        (10**27 - 1, 10**27 - 1, 10**27 - 2),
        (10**27 - 1, 1, 1),
        (MOST, MOST, MOST),
        (1, -1, 2 * 10**12),
        (0, MOST, 1),
        (0, 0, MOST),
    ]
)
def test_quotients_and_products_are_exact_or_null_on_each_warehouse(
    engine: Engine, lines: list[tuple[int, int, int]]
) -> None:
    rows = ", ".join(
        f"({number}, {', '.join(f'cast({amount(one):f} as decimal(38,12))' for one in line)})"
        for number, line in enumerate(lines)
    )
    found = rows_of(
        engine,
        "select quotient(a, b), quotient(a, 0), proportion(a, b, whole), times(a, b) "
        f"from (values {rows}) as given (number, a, b, whole) order by number",
    )
    for (a, b, whole), (quotient, by_zero, proportion, product) in zip(lines, found, strict=True):
        x, y, of = (Fraction(one, 10**12) for one in (a, b, whole))
        assert by_zero is None
        is_small = abs(x) < 10**24
        agrees(quotient, x / y if y else None, is_sure=abs(y) < 8 * 10**19, most=10**26 - 1)
        agrees(proportion, x * y / of, is_sure=is_small and of < 4 * 10**16, most=10**25 - 10**24)
        agrees(product, x * y, is_sure=is_small, most=10**25 - 10**24)


def agrees(found: Decimal | None, exact: Fraction | None, *, is_sure: bool, most: int) -> None:
    """A result is exact; it is NULL only where there is none, or it or an operand is too large."""
    if found is None:
        assert exact is None or not is_sure or abs(exact) >= most
    else:
        assert exact is not None
        assert found == rounded(exact)


COUNTED = {
    "30 frames": ("frames", 30),
    "1,000 tokens": ("tokens", 1000),
    "1000 characters ": ("characters", 1000),
    "1m tokens": ("tokens", 1_000_000),
    "1M Tokens": ("tokens", 1_000_000),
    "10k characters": ("characters", 10_000),
    " 5  Seconds": ("seconds", 5),
    "1 image": ("image", 1),
    "12,345,678 units": ("units", 12_345_678),
}
UNCOUNTED = (
    "2k images", "0 frames", "007 frames", "1", "", "5", "5 ", "frames", "1.5 frames", "1,00 frames",
    "30frames", "1234567890 frames", "minute of video ", "720p seconds", "-5 seconds",
)  # fmt: skip


def test_a_number_in_front_of_a_unit_is_found_on_each_warehouse(engine: Engine) -> None:
    for unit, found in [*COUNTED.items(), *((unit, (None, None)) for unit in UNCOUNTED)]:
        assert rows_of(engine, f"select unit_name('{unit}'), unit_count('{unit}')") == [found], unit
    assert rows_of(engine, "select unit_name(null), unit_count(null)") == [(None, None)]

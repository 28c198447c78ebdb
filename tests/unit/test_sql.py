"""The SQL of the models: its form, its documentation, its translation, its arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import duckdb
import pytest
import sqlglot
from hypothesis import example, given
from hypothesis import strategies as st
from sqlglot import exp

from faletl.files import sql_folder
from faletl.models.catalogue import (
    LONGEST_SPAN,
    Check,
    Model,
    checks,
    column_comments,
    models,
    tables_read,
    translate,
)
from faletl.models.days import Span, is_by_day, lookups, restricted, spans
from faletl.warehouse.duckdb import MACROS
from faletl.warehouse.tables import METADATA, SCHEMAS
from tests.truth import quotient

every_model = pytest.mark.parametrize("model", models(), ids=lambda model: model.table)
every_check = pytest.mark.parametrize("check", checks(), ids=lambda check: check.name)
LAYERS = ("raw", "staging", "marts", "reports", "ops")


@every_model
def test_a_model_is_one_bare_select_with_its_grain(model: Model) -> None:
    lines = model.sql.splitlines()
    assert lines[0].startswith("-- ")
    assert lines[0].endswith(".")
    assert lines[1].startswith("-- grain: ")
    statements = [s for s in sqlglot.parse(model.sql, read="duckdb") if s is not None]
    assert len(statements) == 1
    assert isinstance(statements[0], exp.Select)
    assert set(model.grain) <= set(column_comments()[model.table])


@every_model
def test_a_model_reads_only_earlier_layers_or_earlier_models(model: Model) -> None:
    order = [other.table for other in models()]
    for table in sqlglot.parse_one(model.sql, read="duckdb").find_all(exp.Table):
        if not table.db:
            continue
        name = f"{table.db}.{table.name}"
        assert table.db in LAYERS
        if name in order:
            assert order.index(name) < order.index(model.table), name
        else:
            assert name in METADATA.tables, name
        if model.layer != "staging":
            assert table.db != "raw", f"{model.table} reads {name} past staging"


@every_model
def test_every_column_of_a_model_is_documented(model: Model) -> None:
    assert all(text.strip() for text in column_comments()[model.table].values())
    assert model.layer in SCHEMAS


@every_model
def test_a_table_of_spend_says_what_it_covers(model: Model) -> None:
    has_spend = any(
        name.startswith(("cost_total", "spend_", "burn_")) for name in column_comments()[model.table]
    )
    if has_spend and model.layer in ("marts", "reports"):
        assert "Model APIs only" in model.comment


@every_model
def test_a_model_translates_to_postgresql(model: Model) -> None:
    assert sqlglot.parse_one(translate(model.sql, "postgres"), read="postgres")


@every_check
def test_a_check_translates_to_postgresql(check: Check) -> None:
    assert sqlglot.parse_one(translate(check.sql, "postgres"), read="postgres")


def test_no_sql_divides_or_averages_into_a_double() -> None:
    for path in Path(sql_folder()).rglob("*.sql"):
        code = re.sub(r"--[^\n]*|/[*].*?[*]/", "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"\bavg\s*\(|\bdouble\b|\bfloat\b|\breal\b|[^-'/]/[^-'/]", code), path


def test_every_written_table_and_column_is_commented() -> None:
    for table in METADATA.tables.values():
        assert table.comment, table
        assert all(column.comment for column in table.columns), table


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    """A database that knows what a warehouse knows."""
    with duckdb.connect() as connection:
        for macro in MACROS:
            connection.execute(macro)
        yield connection


small = st.decimals(-(10**4), 10**4, places=12)
amounts = small | st.decimals(-(10**19), 10**19, places=12)


@given(numerator=amounts, denominator=amounts | st.sampled_from([Decimal(0), Decimal("1e-12")]))
@example(numerator=Decimal("99999999999999999999999999.999999999999"), denominator=Decimal(3))
@example(numerator=Decimal("0.000000000001"), denominator=Decimal(2))
def test_quotients_are_exact_to_twelve_decimals(
    numerator: Decimal, denominator: Decimal, database: duckdb.DuckDBPyConnection
) -> None:
    expected = quotient(numerator, denominator)
    if expected is not None and abs(expected) >= 10**25:
        return  # beyond what the type holds
    found = database.execute(
        f"select q, typeof(q) from (select quotient({numerator:f}::decimal(38,12), "
        f"{denominator:f}::decimal(38,12)) as q)"
    ).fetchall()
    assert found[0][0] == expected
    assert expected is None or found[0][1] == "DECIMAL(38,12)"


@given(
    amount=st.decimals(-(10**9), 10**9, places=12),
    part=st.decimals(-(10**13), 10**13, places=12),
    whole=st.decimals(Decimal("1e-12"), 10**13, places=12),
)
@example(amount=Decimal("0.000000000001"), part=Decimal(1), whole=Decimal(2))
@example(amount=Decimal("-0.000000000001"), part=Decimal(1), whole=Decimal(2))
@example(amount=Decimal("2.1"), part=Decimal(-6), whole=Decimal(7))
def test_proportions_are_exact_to_twelve_decimals(
    amount: Decimal, part: Decimal, whole: Decimal, database: duckdb.DuckDBPyConnection
) -> None:
    exact = Fraction(amount) * Fraction(part) / Fraction(whole)
    expected = quotient(Decimal(exact.numerator), Decimal(exact.denominator))
    if expected is None or abs(expected) >= 10**13:
        return  # beyond what the numbers on the way hold
    found = database.execute(
        f"select p, typeof(p) from (select proportion({amount:f}::decimal(38,12), "
        f"{part:f}::decimal(38,12), {whole:f}::decimal(38,12)) as p)"
    ).fetchall()
    assert found == [(expected, "DECIMAL(38,12)")]


def test_what_is_built_day_by_day_is_what_has_the_size_of_hours_or_charges() -> None:
    assert {m.table for m in models() if is_by_day(m) and not m.is_view} == {
        "staging.int_usage_daily",
        "staging.int_billing_events_daily",
        "staging.int_requests_daily",
        "staging.int_charges_daily",
        "staging.int_charges_large",
        "marts.fct_usage",
        "marts.fct_billing_event",
        "marts.fct_requests",
        "marts.fct_latency",
        "reports.rpt_reconciliation",
        "reports.rpt_billing_rules",
    }


@pytest.mark.parametrize("select", [*models(), *checks()], ids=lambda one: one.name)
def test_the_tables_of_a_select_are_those_that_a_parser_finds(select: Model | Check) -> None:
    tables = sqlglot.parse_one(select.sql, read="duckdb").find_all(exp.Table)
    assert tables_read(select.sql) == {f"{one.db}.{one.name}" for one in tables if one.db} != set()


def test_reports_of_days_are_built_by_day_while_what_they_look_up_says_the_same() -> None:
    looking = {model.table: lookups(model) for model in models() if lookups(model)}
    assert {table: set(found) for table, found in looking.items()} == {
        "reports.rpt_spend_daily": {"marts.dim_endpoint", "marts.dim_price", "marts.dim_unit"},
        "reports.rpt_spend_by_credential": {"marts.dim_credential", "marts.dim_endpoint"},
    }
    for found in looking.values():
        for table, columns in found.items():
            if columns is None:  # by a star
                assert table == "marts.dim_price"
            else:  # a dimension of which each build says another thing would be of no use
                assert "endpoint_id" in columns
                assert not {"first_seen_at", "last_seen_at"} & columns


@every_model
def test_a_select_cut_to_days_reads_only_rows_of_these_days(model: Model) -> None:
    cut = restricted(model.sql, Span(date(2026, 11, 21), date(2026, 11, 23)))
    by_day = {m.table for m in models() if m.day} | {f"raw.{n}" for n in ("usage", "billing_events")}
    for select in sqlglot.parse_one(cut, read="duckdb").find_all(exp.Select):
        for table in select.find_all(exp.Table):
            if f"{table.db}.{table.name}" in by_day and table.parent_select is select:
                assert "2026-11-21" in select.args["where"].sql()
                assert "2026-11-23" in select.args["where"].sql()


def test_what_takes_memory_for_each_request_is_built_a_day_at_a_time() -> None:
    each = {model.table for model in models() if model.longest_span == 1}
    assert each == {m.table for m in models() if "count(distinct request_id)" in m.sql} != set()


@given(
    st.sets(st.dates(date(2026, 1, 1), date(2026, 12, 31)), max_size=80), st.integers(1, LONGEST_SPAN)
)
def test_spans_cover_the_days_and_no_others(days: set[date], longest: int) -> None:
    found = list(spans(days, longest))
    covered = [s.first + timedelta(n) for s in found for n in range((s.end - s.first).days)]
    assert covered == sorted(days)
    assert all((s.end - s.first).days <= longest for s in found)

"""Expectations: what the rows of a window must be, as one Great Expectations suite per resource.

What follows from the catalogue (columns, types, required fields, signs, keys) is derived from it; the
rest is what the rows mean. `critical` refuses the window, `warning` and `info` are kept in
ops.validations. An expectation is known by its description, which is the same for every window.

Importing this module imports Great Expectations, which takes seconds: import it inside functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import great_expectations.expectations as gxe
from great_expectations import ExpectationSuite
from great_expectations.expectations.expectation import Expectation
from great_expectations.expectations.metadata_types import FailureSeverity

from faletl.errors import SettingsError
from faletl.money import DECIMAL_TYPE, HALF_NANO, plain
from faletl.resources import RESOURCES, Kind, Resource
from faletl.warehouse.tables import RAW
from faletl.windows import HOUR, Window, instant

CRITICAL, WARNING, INFO = FailureSeverity.CRITICAL, FailureSeverity.WARNING, FailureSeverity.INFO

PRICE_BAND = 3
"""A price of so many times, or one so-many-th, of all of its own before is a warning."""

PRICED = ("usage", "prices")
"""Whose prices are compared with their own before; charges are proven by usage, at its prices."""

PRICE_HISTORY_DAYS = 90
"""How far back a price's own history goes."""

VOLUME_BAND = 10
"""So many times more, or fewer, rows than usual are a warning."""

VOLUME_HISTORY = 8
"""Usual is the median of so many weeks' same weekdays, or of so many snapshots before."""

LEAST_USUAL = 20
"""With fewer usual rows, any number is normal."""

FRESH_HOURS = 6
"""On a day with as many rows as usual, the last one is not longer than this before the day's end."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a window beside its rows.

    `expected_rows` is how many it must hold: those that were landed, less those that were set aside,
    outside the window, or seen twice. `control_total` is fal's own sum of the cost. `prices` is a CSV
    file of endpoint_id, unit, low and high before the window, `units` one of known units; `usual_rows`
    the median of comparable windows; None where there are not enough.
    """

    resource: Resource
    window: Window
    expected_rows: int
    control_total: Decimal | None
    is_settled: bool
    units: Path
    prices: Path | None = None
    usual_rows: int | None = None


def suite_of(facts: Facts, own: Sequence[Expectation] = ()) -> ExpectationSuite:
    """The suite of the resource for that window, with the user's own expectations behind ours.

    Raises:
        SettingsError: one of the user's is described as one of ours.
    """
    ours = [*_of_catalogue(facts), *_of_meaning(facts)]
    if twice := {str(one.description) for one in ours} & {str(one.description) for one in own}:
        raise SettingsError(
            f"FALETL_EXPECTATIONS: {facts.resource.name}.json describes an expectation as one of "
            f"faletl's own is: {min(twice)!a}"
        )
    return ExpectationSuite(name=facts.resource.name, expectations=[*ours, *own])


def key_columns(resource: Resource) -> list[str]:
    """The columns by which a row is told to a person: where it was landed, and what it is about."""
    telling = ("request_id", "endpoint_id", "timeframe", resource.time)
    return ["_page", "_row", *(c.name for c in resource.columns if c.name in telling)]


# --- What follows from the catalogue --------------------------------------------------------------

_TYPES = {
    Kind.AMOUNT: DECIMAL_TYPE.upper(),
    Kind.SECONDS: DECIMAL_TYPE.upper(),
    Kind.WHOLE: "BIGINT",
    Kind.INSTANT: "TIMESTAMP WITH TIME ZONE",
    Kind.TEXT: "VARCHAR",
    Kind.LIST: "VARCHAR",
}


def _of_catalogue(facts: Facts) -> Iterator[Expectation]:
    resource, table = facts.resource, RAW[facts.resource.name]
    names = ", ".join(f"('{column.name}')" for column in table.columns)
    types = ", ".join(f"('{column.name}', '{_TYPES[column.kind]}')" for column in resource.columns)
    yield _no_rows(
        "columns are those of the raw table, with the types of the catalogue",
        CRITICAL,
        f"""
        select coalesce(held.column_name, known.column_name) as column_name, held.column_type
        from (describe select * from {{batch}}) as held
        full join (values {names}) as known (column_name) on held.column_name = known.column_name
        left join (values {types}) as typed (column_name, column_type)
            on held.column_name = typed.column_name
        where held.column_name is null or known.column_name is null
            or held.column_type <> typed.column_type
        """,
    )
    required = [f'"{column.name}" is null' for column in resource.columns if column.required]
    yield _all_rows("required fields are told", CRITICAL, " or ".join(required))
    kinds = (Kind.AMOUNT, Kind.WHOLE, Kind.SECONDS)
    if numbers := [c for c in resource.columns if c.kind in kinds and not c.is_level]:
        odd = [f'"{column.name}" < 0' for column in numbers]
        odd += [f'"{c.name}" > {c.at_most}' for c in numbers if c.at_most is not None]
        yield _all_rows(
            "numbers are not negative, nor more than they can be", CRITICAL, " or ".join(odd)
        )
    grain = [name for name in table.info["grain"] if name != "_account"]
    if grain:
        yield _unique(grain, CRITICAL)
    elif resource.key:  # fal may send a line in two parts; facts add them up
        yield _unique(list(resource.key), INFO)
    if resource.time is not None:
        start, end = instant(facts.window.start), instant(facts.window.end)
        yield _all_rows(
            f"{resource.time} lies in the window",
            CRITICAL,
            f"\"{resource.time}\" < timestamptz '{start}' or \"{resource.time}\" >= timestamptz '{end}'",
        )
    for description, odd_rows in resource.expected.items():
        yield _all_rows(description, WARNING, odd_rows)


def _unique(columns: list[str], severity: FailureSeverity) -> Expectation:
    names = ", ".join(f'"{name}"' for name in columns)
    return _no_rows(
        f"{', '.join(columns)}: each only once",
        severity,
        f"select {names}, count(*) as copies from {{batch}} group by {names} having count(*) > 1",
    )


# --- What rows mean -------------------------------------------------------------------------------


_CSV = "header = true, auto_detect = false, delim = ',', quote = '\"', escape = '\"'"


def _of_meaning(facts: Facts) -> Iterator[Expectation]:
    resource = facts.resource
    names = {column.name for column in resource.columns}
    yield gxe.ExpectTableRowCountToEqual(
        value=facts.expected_rows, severity=CRITICAL, description="no row is lost and none is added"
    )
    if facts.control_total is not None:
        yield _total(facts, facts.control_total)
    if resource.identity:
        yield _all_rows("no charge comes twice with all the same fields", INFO, "_ordinal > 1")
    if "unit" in names:
        known = (
            f"select unit from read_csv('{facts.units}', {_CSV}, columns = {{{{'unit': 'varchar'}}}})"
        )
        yield _no_rows(
            "unit is in the table of units",
            WARNING,
            f"""
            select * from {{batch}} where unit in (
                select unit from (select distinct unit from {{batch}})
                where lower(trim(unit)) not in ({known} where unit is not null)
                    and (unit_name(unit) is null or unit_name(unit) not in ({known}))
            )
            """,
        )
    if facts.prices is not None:
        yield _no_rows(
            f"unit_price is within {PRICE_BAND} times of its own last {PRICE_HISTORY_DAYS} days",
            WARNING,
            f"""
            select rows.* from {{batch}} as rows
            inner join read_csv('{facts.prices}', {_CSV}, columns = {{{{
                'endpoint_id': 'varchar', 'unit': 'varchar',
                'low': '{DECIMAL_TYPE}', 'high': '{DECIMAL_TYPE}'
            }}}}) as before using (endpoint_id, unit)
            where rows.unit_price * {PRICE_BAND} < before.low
                or rows.unit_price > before.high * {PRICE_BAND}
            """,
        )
    if facts.usual_rows is not None:
        yield gxe.ExpectTableRowCountToBeBetween(
            min_value=facts.usual_rows // VOLUME_BAND,
            max_value=facts.usual_rows * VOLUME_BAND,
            severity=WARNING,
            description=f"rows are within {VOLUME_BAND} times of what is usual",
        )
        if resource.time is not None:
            yield gxe.ExpectColumnMaxToBeBetween(
                column=resource.time,
                min_value=facts.window.end - FRESH_HOURS * HOUR,
                severity=INFO,
                description=f"the last row is of the window's last {FRESH_HOURS} hours",
            )


def _total(facts: Facts, total: Decimal) -> Expectation:
    """Of usage it is the sum of these very rows; of charges that of another ledger, which may lag.

    Half a nano-dollar is allowed for each row, and for each line of fal's total: at most one per row.
    """
    proof = facts.resource.proof
    is_other = proof is not None and proof.two_walks_suffice
    severity = WARNING if facts.window.is_provisional else CRITICAL
    if is_other:
        severity = WARNING if facts.is_settled else INFO
    told = plain(total)
    return _no_rows(
        "cost_total adds up to fal's own total",
        severity,
        f"select sum(cost_total) as held, {told} as told from {{batch}} "
        f"having abs(coalesce(sum(cost_total), 0) - {told}) > {HALF_NANO} * 2 * greatest(count(*), 1)",
    )


def _all_rows(description: str, severity: FailureSeverity, odd: str) -> Expectation:
    """That no row is odd."""
    return _no_rows(description, severity, f"select * from {{batch}} where {odd}")


def _no_rows(description: str, severity: FailureSeverity, sql: str) -> Expectation:
    """That the select finds no rows."""
    return ExpectNoRows(unexpected_rows_query=sql, severity=severity, description=description)


class ExpectNoRows(gxe.UnexpectedRowsExpectation):
    """Like its parent, which fetches the rows after it has counted them, though none are asked for."""

    metric_dependencies = ("unexpected_rows_query.row_count",)

    def _validate(self, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super()._validate({"unexpected_rows_query.table": [], **metrics}, *args, **kwargs)


def with_rows(expectation: Expectation) -> Expectation:
    """The same expectation, which also tells the rows that it did not expect."""
    if not isinstance(expectation, ExpectNoRows):
        return expectation
    return gxe.UnexpectedRowsExpectation(
        unexpected_rows_query=expectation.unexpected_rows_query, severity=expectation.severity
    )


# --- The user's own -------------------------------------------------------------------------------


def own_expectations(folder: Path | None) -> dict[str, list[Expectation]]:
    """The user's expectations per resource: suites of Great Expectations as JSON, `<resource>.json`.

    Raises:
        SettingsError: a file is none, or is of no resource of ours.
    """
    found: dict[str, list[Expectation]] = {}
    if folder is None:
        return found
    if not folder.is_dir():
        raise SettingsError(f"FALETL_EXPECTATIONS: {folder} is no folder")
    for path in sorted(folder.glob("*.json")):
        if path.stem not in RESOURCES:
            raise SettingsError(
                f"FALETL_EXPECTATIONS: {path} is named for none of {', '.join(RESOURCES)}"
            )
        found[path.stem] = _own_of(path)
    return found


def _own_of(path: Path) -> list[Expectation]:
    wrong = f"FALETL_EXPECTATIONS: {path}"
    try:
        given = list(json.loads(path.read_text("utf-8-sig"))["expectations"])
        suite = ExpectationSuite(name=path.stem, expectations=given)
    except Exception as error:  # noqa: BLE001  # whatever Great Expectations makes of a wrong file
        told = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(f"{wrong} is no suite: {told[:200]}") from None
    if len(suite.expectations) < len(given):  # it leaves them out with no more than a log line
        raise SettingsError(f"{wrong} has an expectation of a type or severity that there is not")
    for expectation in suite.expectations:
        expectation.description = expectation.description or _described(expectation)
        if not expectation.description.isprintable():
            raise SettingsError(f"{wrong} has a description that cannot be printed")
    names = [str(expectation.description) for expectation in suite.expectations]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SettingsError(f"{wrong} has two expectations with one description: {min(twice)!a}")
    return list(suite.expectations)


def _described(expectation: Expectation) -> str:
    kwargs = expectation.configuration.kwargs
    told = ", ".join(f"{name}={value}" for name, value in sorted(kwargs.items()) if value is not None)
    return f"{expectation.expectation_type} ({told})"

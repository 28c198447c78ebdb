"""Expectations on the rows of a window: one Great Expectations suite per resource.

Expectations on columns, types, required fields, signs and keys are derived from the catalogue; others
are about the meaning of rows. `critical` refuses the window; `warning` and `info` are only recorded in
ops.validations. The description identifies an expectation, and is the same for every window.

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
"""Warn of a price above 3 × the highest, or below a third of the lowest, price before."""

PRICED = ("usage", "prices")
"""Resources whose prices are compared with their history; charges are proven by usage instead."""

PRICE_HISTORY_DAYS = 90
"""Days of history that a price is compared with."""

VOLUME_BAND = 10
"""Warn of more than 10 × the usual number of rows, or less than a tenth of it."""

VOLUME_HISTORY = 8
"""The usual number is the median of this many same weekdays, or snapshots, before."""

MIN_USUAL_ROWS = 20
"""If fewer rows than this are usual, any number is accepted."""

FRESH_HOURS = 6
"""On a day with enough rows, the last row is expected within this many hours before its end."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a window other than its rows.

    `expected_rows` is the number of landed rows, less those that are quarantined, outside the window, or
    repeated. `control_total` is fal's own sum of the cost. `prices` is a CSV file of endpoint_id, unit,
    low and high before the window; `units` is a CSV file of known units. `usual_rows` is the median of
    comparable windows, None if there are too few.
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
    """Return the suite of the resource for that window: our expectations, then the user's.

    Raises:
        SettingsError: one of the user's expectations has the description of one of ours.
    """
    ours = [*_of_catalogue(facts), *_of_meaning(facts)]
    if duplicates := {str(expectation.description) for expectation in ours} & {
        str(expectation.description) for expectation in own
    }:
        raise SettingsError(
            f"FALETL_EXPECTATIONS: {facts.resource.name}.json has an expectation with the description "
            f"of one of faletl's own: {min(duplicates)!a}; change its description"
        )
    return ExpectationSuite(name=facts.resource.name, expectations=[*ours, *own])


def key_columns(resource: Resource) -> list[str]:
    """Return the columns that identify a row to a person: its landed page, and what it is about."""
    identifying = ("request_id", "endpoint_id", "timeframe", resource.time)
    return ["_page", "_row", *(c.name for c in resource.columns if c.name in identifying)]


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
        select coalesce(staged.column_name, known.column_name) as column_name, staged.column_type
        from (describe select * from {{batch}}) as staged
        full join (values {names}) as known (column_name) on staged.column_name = known.column_name
        left join (values {types}) as typed (column_name, column_type)
            on staged.column_name = typed.column_name
        where staged.column_name is null or known.column_name is null
            or staged.column_type <> typed.column_type
        """,
    )
    required = [f'"{column.name}" is null' for column in resource.columns if column.required]
    yield _all_rows("required fields are present", CRITICAL, " or ".join(required))
    kinds = (Kind.AMOUNT, Kind.WHOLE, Kind.SECONDS)
    if numbers := [c for c in resource.columns if c.kind in kinds and not c.is_level]:
        odd = [f'"{column.name}" < 0' for column in numbers]
        odd += [f'"{c.name}" > {c.at_most}' for c in numbers if c.at_most is not None]
        yield _all_rows("numbers are within their valid range", CRITICAL, " or ".join(odd))
    grain = [name for name in table.info["grain"] if name != "_account"]
    if grain:
        yield _unique(grain, CRITICAL)
    elif resource.key:  # fal may send a line in two parts; facts add them up
        yield _unique(list(resource.key), INFO)
    if resource.time is not None:
        start, end = instant(facts.window.start), instant(facts.window.end)
        yield _all_rows(
            f"{resource.time} is in the window",
            CRITICAL,
            f"\"{resource.time}\" < timestamptz '{start}' or \"{resource.time}\" >= timestamptz '{end}'",
        )
    for description, odd_rows in resource.expected.items():
        yield _all_rows(description, WARNING, odd_rows)


def _unique(columns: list[str], severity: FailureSeverity) -> Expectation:
    names = ", ".join(f'"{name}"' for name in columns)
    return _no_rows(
        f"{', '.join(columns)}: unique",
        severity,
        f"select {names}, count(*) as copies from {{batch}} group by {names} having count(*) > 1",
    )


# --- What rows mean -------------------------------------------------------------------------------


_CSV = "header = true, auto_detect = false, delim = ',', quote = '\"', escape = '\"'"


def _of_meaning(facts: Facts) -> Iterator[Expectation]:
    resource = facts.resource
    names = {column.name for column in resource.columns}
    yield gxe.ExpectTableRowCountToEqual(
        value=facts.expected_rows, severity=CRITICAL, description="no row is lost and no row is added"
    )
    if facts.control_total is not None:
        yield _total(facts, facts.control_total)
    if resource.identity:
        yield _all_rows("no charge is repeated with all fields equal", INFO, "_ordinal > 1")
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
            f"unit_price is within a factor of {PRICE_BAND} of its own last {PRICE_HISTORY_DAYS} days",
            WARNING,
            f"""
            select rows.* from {{batch}} as rows
            inner join read_csv('{facts.prices}', {_CSV}, columns = {{{{
                'endpoint_id': 'varchar', 'unit': 'varchar',
                'low': '{DECIMAL_TYPE}', 'high': '{DECIMAL_TYPE}'
            }}}}) as history using (endpoint_id, unit)
            where rows.unit_price * {PRICE_BAND} < history.low
                or rows.unit_price > history.high * {PRICE_BAND}
            """,
        )
    if facts.usual_rows is not None:
        yield gxe.ExpectTableRowCountToBeBetween(
            min_value=facts.usual_rows // VOLUME_BAND,
            max_value=facts.usual_rows * VOLUME_BAND,
            severity=WARNING,
            description=f"the row count is within a factor of {VOLUME_BAND} of the usual",
        )
        if resource.time is not None:
            yield gxe.ExpectColumnMaxToBeBetween(
                column=resource.time,
                min_value=facts.window.end - FRESH_HOURS * HOUR,
                severity=INFO,
                description=f"the last row is in the window's last {FRESH_HOURS} hours",
            )


def _total(facts: Facts, total: Decimal) -> Expectation:
    """Expect that the cost adds up to fal's total.

    For usage, the total is of these rows; for charges, it is of another ledger, which may lag. Half a
    nano-dollar is allowed for each row, and for each line of fal's total (at most one line per row).
    """
    proof = facts.resource.proof
    is_other_ledger = proof is not None and proof.two_walks_suffice
    severity = WARNING if facts.window.is_provisional else CRITICAL
    if is_other_ledger:
        severity = WARNING if facts.is_settled else INFO
    total_text = plain(total)
    return _no_rows(
        "cost_total adds up to fal's own total",
        severity,
        f"select sum(cost_total) as actual, {total_text} as expected from {{batch}} "
        f"having abs(coalesce(sum(cost_total), 0) - {total_text}) "
        f"> {HALF_NANO} * 2 * greatest(count(*), 1)",
    )


def _all_rows(description: str, severity: FailureSeverity, condition: str) -> Expectation:
    """Expect that no row meets the condition."""
    return _no_rows(description, severity, f"select * from {{batch}} where {condition}")


def _no_rows(description: str, severity: FailureSeverity, sql: str) -> Expectation:
    """Expect that the select returns no rows."""
    return ExpectNoRows(unexpected_rows_query=sql, severity=severity, description=description)


class ExpectNoRows(gxe.UnexpectedRowsExpectation):
    """An UnexpectedRowsExpectation that only counts; its parent would fetch the rows as well."""

    metric_dependencies = ("unexpected_rows_query.row_count",)

    def _validate(self, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super()._validate({"unexpected_rows_query.table": [], **metrics}, *args, **kwargs)


def with_rows(expectation: Expectation) -> Expectation:
    """Return the expectation in a form that also returns the unexpected rows."""
    if not isinstance(expectation, ExpectNoRows):
        return expectation
    return gxe.UnexpectedRowsExpectation(
        unexpected_rows_query=expectation.unexpected_rows_query, severity=expectation.severity
    )


# --- The user's own -------------------------------------------------------------------------------


def own_expectations(folder: Path | None) -> dict[str, list[Expectation]]:
    """Read the user's expectations: a Great Expectations suite as JSON per resource, `<resource>.json`.

    Raises:
        SettingsError: a file is not a suite, or is not named for a resource.
    """
    suites: dict[str, list[Expectation]] = {}
    if folder is None:
        return suites
    if not folder.is_dir():
        raise SettingsError(f"FALETL_EXPECTATIONS: {folder} is not a folder")
    for path in sorted(folder.glob("*.json")):
        if path.stem not in RESOURCES:
            raise SettingsError(
                f"FALETL_EXPECTATIONS: {path} is not named for a resource: {', '.join(RESOURCES)}"
            )
        suites[path.stem] = _own_of(path)
    return suites


def _own_of(path: Path) -> list[Expectation]:
    file = f"FALETL_EXPECTATIONS: {path}"
    try:
        items = list(json.loads(path.read_text("utf-8-sig"))["expectations"])
        suite = ExpectationSuite(name=path.stem, expectations=items)
    except Exception as error:  # noqa: BLE001  # any error of Great Expectations about a wrong file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(f"{file} is not a suite: {reason[:200]}") from None
    if len(suite.expectations) < len(items):  # it drops them with only a log line
        raise SettingsError(f"{file} has an expectation of an unknown type or severity")
    for expectation in suite.expectations:
        expectation.description = expectation.description or _default_description(expectation)
        if not expectation.description.isprintable():
            raise SettingsError(f"{file} has a description that cannot be printed")
    names = [str(expectation.description) for expectation in suite.expectations]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise SettingsError(
            f"{file} has two expectations with the same description: {min(duplicates)!a}"
        )
    return list(suite.expectations)


def _default_description(expectation: Expectation) -> str:
    kwargs = expectation.configuration.kwargs
    arguments = ", ".join(
        f"{name}={value}" for name, value in sorted(kwargs.items()) if value is not None
    )
    return f"{expectation.expectation_type} ({arguments})"

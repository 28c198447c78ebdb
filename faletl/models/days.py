"""Find the models that can be built by day, and restrict their queries to some days."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache

import sqlglot
from sqlglot import exp

from faletl.models.catalogue import LONGEST_SPAN, SOURCE_DIALECT, Model, models, tables_read
from faletl.resources import RESOURCES

BY_WINDOW = ("ops.loads", "ops.restatements", "ops.quarantine", "ops.holds", "ops.failures")
"""Tables other than raw whose rows have a day: that of `window_start`."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive UTC days, from `first` to before `end`."""

    first: date
    end: date


@cache
def _all_read(sql: str) -> frozenset[str]:
    """Return the tables that a select reads, including those behind its views."""
    views = {model.table: model.sql for model in models() if model.is_view}
    read = tables_read(sql)
    return read.union(*(_all_read(views[table]) for table in read & views.keys()))


@cache
def sources(sql: str) -> frozenset[str]:
    """Return the resources that the rows of a select come from, directly or through models."""
    known = {model.table: model.sql for model in models()}
    read = tables_read(sql)
    own = {table.removeprefix("raw.") for table in read if table.startswith("raw.")}
    return frozenset(own).union(*(sources(known[table]) for table in read & known.keys()))


def is_by_day(model: Model) -> bool:
    """Return whether each row depends on its own day only, so that days can be built separately."""
    return model.day is not None and all(has_days(table) for table in _all_read(model.sql))


def lookups(model: Model) -> Mapping[str, frozenset[str] | None]:
    """Return the tables without days that the model looks up, with the columns it uses (None: all).

    Empty for a model that reads only tables with days, and for one that cannot be built by day.
    """
    return _lookups(model.sql) if model.day is not None and not is_by_day(model) else {}


def has_days(table: str) -> bool:
    """Return whether the table's rows have a day; tables behind a view are not examined."""
    if table.startswith("raw."):
        return RESOURCES[table.removeprefix("raw.")].window == "day"
    model = next((model for model in models() if model.table == table), None)
    if model is not None:
        return model.is_view or is_by_day(model)
    return table in BY_WINDOW or table.startswith("staging.seed_")


@cache
def _lookups(sql: str) -> Mapping[str, frozenset[str] | None]:
    without_days = {table for table in _all_read(sql) if not has_days(table)}
    if not all(table.startswith("marts.") for table in without_days):
        return {}
    tree = sqlglot.parse_one(sql, read=SOURCE_DIALECT)
    used_columns = frozenset(column.name for column in tree.find_all(exp.Column))
    used_columns |= {
        column.name for join in tree.find_all(exp.Join) for column in join.args.get("using") or ()
    }
    columns_by_table: dict[str, frozenset[str] | None] = dict.fromkeys(without_days, used_columns)
    for table in tree.find_all(exp.Table):
        name, select = f"{table.db}.{table.name}", table.parent_select
        stars = (
            {column.text("table") for column in select.selects if column.is_star} if select else set()
        )
        if name in columns_by_table and stars & {"", table.alias_or_name}:
            columns_by_table[name] = None
    return columns_by_table


def restricted(sql: str, span: Span, dialect: str = SOURCE_DIALECT) -> str:
    """Return the select restricted to rows on the days of the span, in tables whose rows have a day."""
    template = _restricted(sql, dialect)
    return template.replace(f"{_PLACEHOLDER.first}", f"{span.first}").replace(
        f"{_PLACEHOLDER.end}", f"{span.end}"
    )


_PLACEHOLDER = Span(date(1, 1, 1), date(1, 1, 2))
"""Days that none of our SQL names: a select is parsed once, then these are replaced."""


@cache
def _restricted(sql: str, dialect: str) -> str:
    tree = sqlglot.parse_one(sql, read=SOURCE_DIALECT)
    for table in list(tree.find_all(exp.Table)):
        rows = _rows_of_some_days(f"{table.db}.{table.name}")
        if rows is not None:
            part = sqlglot.parse_one(rows, read=SOURCE_DIALECT, into=exp.Select)
            table.replace(part.subquery(table.alias or table.name))
    return tree.sql(dialect)


def _rows_of_some_days(table: str) -> str | None:
    """Return the select of a table's rows on the `_PLACEHOLDER` days; None if its rows have no day."""
    model = next((model for model in models() if model.table == table), None)
    if model is not None and model.is_view:
        return _restricted(model.sql, SOURCE_DIALECT)
    if model is not None:
        column, kind, zone = model.day, "date", ""
    elif table.startswith("raw."):
        column, kind, zone = (
            RESOURCES[table.removeprefix("raw.")].time or "_snapshot_at",
            "timestamptz",
            "Z",
        )
    elif table in BY_WINDOW:
        column, kind, zone = "window_start", "timestamptz", "Z"
    else:
        return None
    if column is None:
        return None
    time = " 00:00:00" if zone else ""
    return (
        f"select * from {table} where \"{column}\" >= {kind} '{_PLACEHOLDER.first}{time}{zone}' "
        f"and \"{column}\" < {kind} '{_PLACEHOLDER.end}{time}{zone}'"
    )


def spans(days: Collection[date], longest: int = LONGEST_SPAN) -> Iterator[Span]:
    """Group days into as few consecutive spans as possible, of at most `longest` days, in order."""
    first = end = None
    for day in sorted(days):
        if first is None or day != end or (end - first).days >= longest:
            if first is not None and end is not None:
                yield Span(first, end)
            first = day
        end = day + timedelta(days=1)
    if first is not None and end is not None:
        yield Span(first, end)

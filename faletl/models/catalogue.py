"""The catalogue of models and checks, read from sql/.

A model is one bare select in a file. Its first comment line describes a row, its `grain` line names the
key, and a `days` line names the column that assigns a row to a UTC day. A comment after a column
describes the column. A column that passes through unchanged inherits the comment from its definition,
in an earlier model or in the catalogue of resources.

A build updates what changed since the last one. Of a model whose rows depend on their own day only, it
rebuilds the days that changed; any other model it rebuilds completely if a table that it reads changed.
A model that also looks up dimensions is rebuilt by day as long as these dimensions are unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter

import sqlalchemy as sa
import sqlglot
from sqlglot import exp

from faletl.files import sql_folder
from faletl.resources import RESOURCES
from faletl.warehouse.tables import LAYERS, RAW, SCHEMAS, SEEDS

SOURCE_DIALECT = "duckdb"

LONGEST_SPAN = 31
"""Maximum number of days that one statement sums up, so that memory does not grow with the history."""

SPANS = {"": LONGEST_SPAN, "one at a time": 1, "row by row": 36_500}
"""Maximum number of days that one statement builds, by the option in the model's `days` line."""


@dataclass(frozen=True, slots=True)
class Model:
    """One select of sql/. `grain` is empty where rows need not be unique.

    `day` is the column that assigns a row to a day, if any; `longest_span` is the maximum number of days
    that one statement builds. `is_of_now`: a view of the current state, never out of date.
    """

    layer: str
    name: str
    sql: str
    comment: str
    grain: tuple[str, ...]
    day: str | None
    longest_span: int = LONGEST_SPAN
    is_of_now: bool = False

    @property
    def table(self) -> str:
        """The name of its table or view, with the schema."""
        return f"{self.layer}.{self.name}"

    @property
    def is_view(self) -> bool:
        """Whether the model is a view: it only renames and casts, or shows the current state of ops."""
        return self.name.startswith("stg_") or self.is_of_now


@cache
def models() -> tuple[Model, ...]:
    """Return every model, in build order."""
    by_table = {}
    for layer in LAYERS:
        for path in sorted((sql_folder() / layer).glob("*.sql")):
            sql = path.read_text("utf-8")
            comment, *lines = (line.removeprefix("-- ") for line in sql.splitlines())
            options = dict(line.split(": ", 1) for line in lines[:2] if ": " in line)
            keys = options["grain"].split(";")[0]
            key = () if keys == "none" else tuple(keys.split(", "))
            day, _, each = options.get("days", "").split(";")[0].partition(", ")
            model = Model(
                layer, path.stem, sql, comment, key, day or None, SPANS[each], "view" in options
            )
            by_table[model.table] = model
    order = TopologicalSorter(
        {table: sorted(tables_read(model.sql) & by_table.keys()) for table, model in by_table.items()}
    ).static_order()
    return tuple(sorted((by_table[table] for table in order), key=lambda m: LAYERS.index(m.layer)))


@dataclass(frozen=True, slots=True)
class Check:
    """A select that must return no rows. `is_by_day`: each day can be checked separately.

    `keys_of` is the model whose keys it compares; that is done in memory, so a few days at a time.
    `cure` is what a person can do about the rows that it returns, if its head says so.
    """

    name: str
    sql: str
    is_by_day: bool
    keys_of: Model | None = None
    cure: str = ""


_CURE = "-- cure: "


@cache
def checks() -> tuple[Check, ...]:
    """Return every check: those of sql/checks, the grain of each model, the ledger of each raw table."""
    all_checks = []
    for path in sorted((sql_folder() / "checks").glob("*.sql")):
        sql = path.read_text("utf-8")
        _, days, next_line, *_ = sql.splitlines()
        cure = next_line.removeprefix(_CURE) if next_line.startswith(_CURE) else ""
        all_checks.append(Check(path.stem, sql, days == "-- days: each by itself", cure=cure))
    for model in models():
        key = ", ".join(model.grain)
        if key and not _has_fact(model):
            sql = (
                f"select {key}, count(*) as copies from {model.table} group by {key} having count(*) > 1"
            )
            all_checks.append(Check(f"grain of {model.table}", sql, model.day is not None, model))
    for name, table in RAW.items():
        all_checks.append(
            Check(f"loads of {table.fullname}", _ledger_check(name, table), is_by_day=True)
        )
    return tuple(all_checks)


def _has_fact(model: Model) -> bool:
    """Return whether a fact of the same key contains the view's rows: duplicates are found there."""
    return model.is_view and any(
        fact.layer == "marts" and fact.grain == model.grain and model.table in tables_read(fact.sql)
        for fact in models()
    )


def _ledger_check(resource: str, table: sa.Table) -> str:
    """Return the check that the raw table contains exactly the rows that the ledger calls current.

    It uses none of our functions, because it also runs on older warehouses. It groups by the number of
    the day, because calendar functions cost DuckDB a microsecond a row; a double is precise enough to
    distinguish the last microsecond of a day from the next day.
    """
    time = RESOURCES[resource].time
    day = f'floor(extract(epoch from "{time}") / 86400)'
    start = f"to_timestamp(86400 * {day})" if time else "_snapshot_at"
    cost = "sum(cost_total)" if "cost_total" in table.c else "0"
    return f"""
        with stored as (
            select
                _account, {start} as stored_start, count(*) as stored_rows, {cost} as stored_cost
            from {table.fullname} group by 1, 2
        ),
        recorded as (
            select account, window_start, rows as recorded_rows, cost_total as recorded_cost
            from ops.loads where resource = '{resource}' and is_current
        )
        select
            coalesce(_account, account) as account, coalesce(stored_start, window_start) as window_start,
            stored_rows, recorded_rows, stored_cost, recorded_cost
        from stored full join recorded on _account = account and stored_start = window_start
        where coalesce(stored_rows, 0) <> coalesce(recorded_rows, 0)
            or coalesce(stored_cost, 0) <> coalesce(recorded_cost, 0)
    """


@cache
def translate(sql: str, dialect: str) -> str:
    """Translate a select into the SQL of another database."""
    if dialect == SOURCE_DIALECT:
        return sql
    return sqlglot.transpile(sql, read=SOURCE_DIALECT, write=dialect, comments=False)[0]


@cache
def column_comments() -> dict[str, dict[str, str]]:
    """Return the comment of each column, by table or model.

    A column without a comment of its own inherits that of the columns with its name in the tables that
    the model reads, if these agree.

    Raises:
        ValueError: a column has no comment, or inherits several; a test prevents that.
    """
    tables = [*RAW.values(), *SEEDS]
    known = {t.fullname: {c.name: str(c.comment) for c in t.columns} for t in tables}
    for model in models():
        select = sqlglot.parse_one(model.sql, read=SOURCE_DIALECT, into=exp.Select)
        read = sorted(tables_read(model.sql) & known.keys())
        known[model.table] = {}
        for column in select.selects:
            own = " ".join(" ".join(column.comments or []).split())
            name = column.unalias().name or column.alias
            inherited = {known[table][name] for table in read if name in known[table]}
            if not own and len(inherited) != 1:
                raise ValueError(f"{model.table}.{column.alias_or_name}: {inherited or 'no comment'}")
            known[model.table][column.alias_or_name] = own or inherited.pop()
    return known


# --- What depends on what -------------------------------------------------------------------------


_COMMENT = re.compile(r"--.*")
_TABLE = re.compile(rf"\b(?:{'|'.join(SCHEMAS)})\.\w+")


@cache
def tables_read(sql: str) -> frozenset[str]:
    """Return the tables that a select names, with their schemas, by a regular expression for speed."""
    return frozenset(_TABLE.findall(_COMMENT.sub("", sql)))

"""Models: run sql/ layer by layer, then its checks, in one transaction.

A model is one bare select in a file: its first comment line says what a row is for, its `grain` line
names the key, a `days` line the column that puts a row on a UTC day, and a comment behind a column
says what the column holds. A column that passes through unchanged keeps the comment from where it was
defined, in an earlier model or in the catalogue.

A build makes anew what changed since the last one: of a model whose rows all come from rows of the
same day, the days that were loaded; any other model as a whole, if anything that it reads changed. A
model that beside that looks things up in dimensions is made by day as long as these say the same.
"""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)

SOURCE_DIALECT = "duckdb"

LONGEST_SPAN = 31
"""Days that one statement adds up: memory does not grow with the history."""

SPANS = {"": LONGEST_SPAN, "one at a time": 1, "row by row": 36_500}
"""Days that one statement builds, by what the model's head says of its days."""


@dataclass(frozen=True, slots=True)
class Model:
    """One select of sql/. `grain` is empty where rows need not be unique.

    `day` is the column that puts a row on a day, if there is one; `longest_span` is how many of its
    days one statement builds. `is_of_now`: it is never out of date, even if nothing was built.
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
        """Its table or view, with its schema."""
        return f"{self.layer}.{self.name}"

    @property
    def is_view(self) -> bool:
        """Whether it is kept as a view: it only renames and casts, or says what ops says now."""
        return self.name.startswith("stg_") or self.is_of_now


@cache
def models() -> tuple[Model, ...]:
    """Every model, in build order."""
    found = {}
    for layer in LAYERS:
        for path in sorted((sql_folder() / layer).glob("*.sql")):
            sql = path.read_text("utf-8")
            comment, *lines = (line.removeprefix("-- ") for line in sql.splitlines())
            told = dict(line.split(": ", 1) for line in lines[:2] if ": " in line)
            keys = told["grain"].split(";")[0]
            key = () if keys == "none" else tuple(keys.split(", "))
            day, _, each = told.get("days", "").split(";")[0].partition(", ")
            model = Model(layer, path.stem, sql, comment, key, day or None, SPANS[each], "view" in told)
            found[model.table] = model
    order = TopologicalSorter(
        {table: sorted(tables_read(model.sql) & found.keys()) for table, model in found.items()}
    ).static_order()
    return tuple(sorted((found[table] for table in order), key=lambda m: LAYERS.index(m.layer)))


@dataclass(frozen=True, slots=True)
class Check:
    """A select that must return no rows. `is_by_day`: what holds for each day holds for all.

    `keys_of` is the model whose keys it compares: in memory, so that it looks at few days at a time.
    `cure` is what a person can do about rows that it finds, where its head says so.
    """

    name: str
    sql: str
    is_by_day: bool
    keys_of: Model | None = None
    cure: str = ""


_CURE = "-- cure: "


@cache
def checks() -> tuple[Check, ...]:
    """Every check: those of sql/checks, the grain of each model, the ledger of each raw table."""
    found = []
    for path in sorted((sql_folder() / "checks").glob("*.sql")):
        sql = path.read_text("utf-8")
        _, days, more, *_ = sql.splitlines()
        cure = more.removeprefix(_CURE) if more.startswith(_CURE) else ""
        found.append(Check(path.stem, sql, days == "-- days: each by itself", cure=cure))
    for model in models():
        key = ", ".join(model.grain)
        if key and not _has_fact(model):
            sql = (
                f"select {key}, count(*) as copies from {model.table} group by {key} having count(*) > 1"
            )
            found.append(Check(f"grain of {model.table}", sql, model.day is not None, model))
    for name, table in RAW.items():
        found.append(Check(f"loads of {table.fullname}", _ledger_check(name, table), is_by_day=True))
    return tuple(found)


def _has_fact(model: Model) -> bool:
    """Whether a fact of the same key holds the rows of the view: what came twice is found there."""
    return model.is_view and any(
        fact.layer == "marts" and fact.grain == model.grain and model.table in tables_read(fact.sql)
        for fact in models()
    )


def _ledger_check(resource: str, table: sa.Table) -> str:
    """What the ledger calls current stands in the raw table, row for row, and nothing else does.

    Without functions of ours: it is asked of older warehouses, too. By the number of the day, as
    DuckDB takes a microsecond to find in a calendar when it began; a double tells the last microsecond
    of a day from the next one.
    """
    time = RESOURCES[resource].time
    day = f'floor(extract(epoch from "{time}") / 86400)'
    start = f"to_timestamp(86400 * {day})" if time else "_snapshot_at"
    cost = "sum(cost_total)" if "cost_total" in table.c else "0"
    return f"""
        with held as (
            select
                _account, {start} as held_start, count(*) as held_rows, {cost} as held_cost
            from {table.fullname} group by 1, 2
        ),
        entered as (
            select account, window_start, rows as entered_rows, cost_total as entered_cost
            from ops.loads where resource = '{resource}' and is_current
        )
        select
            coalesce(_account, account) as account, coalesce(held_start, window_start) as window_start,
            held_rows, entered_rows, held_cost, entered_cost
        from held full join entered on _account = account and held_start = window_start
        where coalesce(held_rows, 0) <> coalesce(entered_rows, 0)
            or coalesce(held_cost, 0) <> coalesce(entered_cost, 0)
    """


@cache
def translate(sql: str, dialect: str) -> str:
    """The same select in another database's SQL."""
    if dialect == SOURCE_DIALECT:
        return sql
    return sqlglot.transpile(sql, read=SOURCE_DIALECT, write=dialect, comments=False)[0]


@cache
def column_comments() -> dict[str, dict[str, str]]:
    """For each table and model the comment of each of its columns.

    A column without a comment of its own has that of the column of its name in the tables which the
    model reads, where these agree.

    Raises:
        ValueError: a column has no comment, or inherits more than one; a test keeps it from happening.
    """
    written = [*RAW.values(), *SEEDS]
    known = {t.fullname: {c.name: str(c.comment) for c in t.columns} for t in written}
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
    """The tables that a select names, with their schemas. Without a parser, which takes longer."""
    return frozenset(_TABLE.findall(_COMMENT.sub("", sql)))

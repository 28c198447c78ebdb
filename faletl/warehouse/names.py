"""Names: what our schemas are called in a database, where FALETL_SCHEMA_PREFIX may say so.

All SQL of faletl says `raw`, `staging`, `marts`, `reports` and `ops`. The prefix is added where SQL
leaves for the database, and nowhere else. What a reader types goes out as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from faletl.warehouse.tables import SCHEMAS

_OPTION = "schema_prefix"

AS_TYPED = {_OPTION: ""}
"""Execution options of a statement that names schemas as the database does: the query of a reader."""

_TABLE = re.compile(rf"(?<![\w.])(?:{'|'.join(SCHEMAS)})(?=\.\w)")

_NAMING = re.compile(
    rf"""
    (?P<comment> (?<=\bis\s) '(?:[^']|'')*' )  # of a table or column; it may name tables
    | '(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/  # these only look like SQL
    | (?P<table> (?<![\w.]) (?:{"|".join(SCHEMAS)}) (?=\.) )
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)


def prefixed(sql: str, prefix: str) -> str:
    """The statement with the prefix before each of our schemas in it."""

    def named(found: re.Match[str]) -> str:
        if found["comment"]:
            return _TABLE.sub(rf"{prefix}\g<0>", found[0])
        return f"{prefix if found['table'] else ''}{found[0]}"

    return _NAMING.sub(named, sql)


def add_prefix(engine: sa.Engine, prefix: str) -> None:
    """Let every statement of the engine name our schemas with the prefix."""
    engine.update_execution_options(**{_OPTION: prefix})
    if prefix:
        sa.event.listen(engine, "before_cursor_execute", _with_prefix, retval=True)


def in_database(connection: sa.Connection, names: Iterable[str]) -> list[str]:
    """What schemas, or tables with their schema, are called in the database of the connection."""
    return [f"{prefix_of(connection)}{name}" for name in names]


def prefix_of(connection: sa.Connection) -> str:
    """The prefix of our schemas in the database of the connection; empty where there is none."""
    return str(connection.get_execution_options().get(_OPTION, ""))


def _with_prefix(
    _connection: object, _cursor: object, sql: str, parameters: Any, context: Any, _is_many: bool
) -> tuple[str, Any]:
    return prefixed(sql, context.execution_options[_OPTION]), parameters

"""Names of our schemas in a database: FALETL_SCHEMA_PREFIX plus `raw`, `staging` and so on.

All SQL of faletl names the schemas without the prefix. It is added where SQL is sent to the database,
and nowhere else. The query of a reader is sent unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from faletl.warehouse.tables import SCHEMAS

_OPTION = "schema_prefix"

AS_TYPED = {_OPTION: ""}
"""Execution options of a statement that names schemas as in the database: the query of a reader."""

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
    """Return the statement with the prefix before each of our schemas."""

    def with_prefix(match: re.Match[str]) -> str:
        if match["comment"]:
            return _TABLE.sub(rf"{prefix}\g<0>", match[0])
        return f"{prefix if match['table'] else ''}{match[0]}"

    return _NAMING.sub(with_prefix, sql)


def add_prefix(engine: sa.Engine, prefix: str) -> None:
    """Let every statement of the engine name our schemas with the prefix."""
    engine.update_execution_options(**{_OPTION: prefix})
    if prefix:
        sa.event.listen(engine, "before_cursor_execute", _with_prefix, retval=True)


def in_database(connection: sa.Connection, names: Iterable[str]) -> list[str]:
    """Return the names of schemas, or of tables with their schema, in the database of the connection."""
    return [f"{prefix_of(connection)}{name}" for name in names]


def prefix_of(connection: sa.Connection) -> str:
    """Return the prefix of our schemas in the database of the connection; may be empty."""
    return str(connection.get_execution_options().get(_OPTION, ""))


def _with_prefix(
    _connection: object, _cursor: object, sql: str, parameters: Any, context: Any, _is_many: bool
) -> tuple[str, Any]:
    return prefixed(sql, context.execution_options[_OPTION]), parameters

"""DuckDB engines: how each one is opened, so that a setting is honoured everywhere."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import duckdb_sqlalchemy

from faletl.errors import StorageError
from faletl.files import scratch_folder
from faletl.money import BOUNDED_TYPE, DECIMAL_TYPE, SCALE

# The dialect would open an engine of its own, without our limits, to see if DuckDB has comments.
duckdb_sqlalchemy.has_comment_support = lambda: True  # type: ignore[attr-defined,assignment]


def config(memory: str, scratch: Path | None) -> dict[str, Any]:
    """Return the settings of an engine that takes at most `memory`.

    It spills to a folder of its own in `scratch`: two engines that share one would overwrite each
    other's files. Without `scratch` it spills nothing. It never installs or loads an extension.
    """
    spill = str(scratch / f"spill-{secrets.token_hex(4)}") if scratch is not None else ""
    return {
        "memory_limit": memory,
        "temp_directory": spill,
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }


@contextmanager
def engine(memory: str, scratch: Path | None, **more: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an engine in memory, with UTC as its time zone and `more` settings than those of `config`."""
    with duckdb.connect(config={**config(memory, scratch), **more}) as connection:
        connection.execute("set TimeZone = 'UTC'")
        yield connection


@contextmanager
def room_to_spill() -> Iterator[Path | None]:
    """Make a scratch folder below TMPDIR; None if that fails, because not every query needs it."""
    with ExitStack() as stack:
        try:
            folder: Path | None = stack.enter_context(scratch_folder())
        except StorageError:
            folder = None
        yield folder


def quoted(text: object) -> str:
    """Return the text as a literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


# The type of most amounts. DuckDB keeps it in 64 bits, and converts it from and to text much faster.
_NARROW_TYPE = f"decimal(18,{SCALE})"


def decimal_of(text: str, *, is_bounded: bool = True) -> str:
    """Return DuckDB SQL for a text as DECIMAL(38,12); NULL where it is not a number below the bound.

    The bound is `LARGEST` for an amount of one row; a sum may be as large as the type.
    """
    narrow = f"cast(try_cast({text} as {_NARROW_TYPE}) as {DECIMAL_TYPE})"
    wide = BOUNDED_TYPE if is_bounded else DECIMAL_TYPE
    return f"coalesce({narrow}, cast(try_cast({text} as {wide}) as {DECIMAL_TYPE}))"


def text_of(amount: str) -> str:
    """Return DuckDB SQL for the text of a DECIMAL(38,12), with all of its decimals."""
    narrow = f"cast(try_cast({amount} as {_NARROW_TYPE}) as varchar)"
    return f"coalesce({narrow}, cast({amount} as varchar))"


def count(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    """Return the number that the query gives; 0 where it gives no row."""
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0

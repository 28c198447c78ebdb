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
from faletl.landing.storage import scratch_folder

# The dialect would ask an engine of its own, without our limits, whether DuckDB knows comments.
duckdb_sqlalchemy.has_comment_support = lambda: True  # type: ignore[attr-defined,assignment]


def config(memory: str, scratch: Path | None) -> dict[str, Any]:
    """Return the settings of an engine that takes at most `memory`.

    What it spills lies in a folder of its own in `scratch`: two engines that share one would overwrite
    each other's files. Without `scratch` it spills nothing. It never installs or loads an extension.
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
    """An engine in memory, whose clock is UTC; `more` are further settings. See `config`."""
    with duckdb.connect(config={**config(memory, scratch), **more}) as connection:
        connection.execute("set TimeZone = 'UTC'")
        yield connection


@contextmanager
def room_to_spill() -> Iterator[Path | None]:
    """A scratch folder below TMPDIR; None where none can be made, as not every query needs it."""
    with ExitStack() as stack:
        try:
            folder: Path | None = stack.enter_context(scratch_folder())
        except StorageError:
            folder = None
        yield folder

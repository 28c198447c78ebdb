"""The warehouse: what every database must provide, and which module provides it.

The core (load.py, models.py, pipeline.py) speaks SQL through SQLAlchemy and never asks which
database it has; what a database needs words of its own for stands in its module here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write. `token` grows with every lease; each commit checks that it is the newest."""

    connection: sa.Connection
    token: int


class Warehouse(Protocol):
    """What a database must provide to hold faletl's tables."""

    dialect: str
    """The sqlglot name of its SQL."""

    def lease(self, holder: str) -> AbstractContextManager[Lease]:
        """Become the only writer, creating the warehouse when there is none.

        Raises:
            WarehouseBusyError: somebody else held the lease for as long as we wait; says who.
            TamperedError, SettingsError: the file is no warehouse of ours, or of a newer faletl.
        """

    def reading(
        self, *, wait: bool = True, is_older_fine: bool = False
    ) -> AbstractContextManager[sa.Connection | None]:
        """A connection for reading what is loaded now; None when there is no warehouse yet.

        Nobody writes while it is open: read and let go.

        Raises:
            WarehouseBusyError: somebody writes; at once, or after as long as we `wait`.
            TamperedError, SettingsError: it is no warehouse of ours, or not of this version;
                one of an older faletl may be read where that is fine.
        """

    def published(self) -> AbstractContextManager[sa.Connection | None]:
        """A connection for readers: never blocks a run, never sees half of one."""

    def export(self, query: str, path: Path) -> bool:
        """Write the rows of a reader's query to a Parquet file; False when nothing is published."""

    def renewed(self, holder: str, token: int) -> AbstractContextManager[Warehouse]:
        """An empty warehouse that takes the place of this one if all goes well, in one step.

        This one is held meanwhile, and need not be readable. Leases of the new one have greater
        tokens than `token`, and than those of this one, as far as these can be read.

        Raises: as `lease`.
        """

    def define_functions(self, connection: sa.Connection) -> None:
        """Create or replace the functions that the models call and the database does not have."""

    def take_in(self, connection: sa.Connection, table: sa.Table, rows: Path) -> None:
        """Insert a staged Parquet file in bulk; its columns are columns of the table."""

    def hand_out(self, connection: sa.Connection, query: sa.Select[Any], path: Path) -> None:
        """Write the rows of a select to a Parquet file, typed as in the warehouse."""

    def publish(self, lease: Lease) -> Path | None:
        """Show the newest build to readers, in one step; None when they have it already.

        Returns the file that readers open, where there is one. It is the last thing that a lease can
        be used for.

        Raises:
            WarehouseError: something was loaded that is not built yet.
        """


def open_warehouse(settings: Settings) -> Warehouse:
    """The warehouse that FALETL_WAREHOUSE names; raises SettingsError when there is no such kind."""
    try:
        url = sa.make_url(settings.warehouse)
    except sa.exc.ArgumentError:
        raise SettingsError(
            "FALETL_WAREHOUSE is no SQLAlchemy URL; use duckdb:///path/to/file.duckdb"
        ) from None
    if url.get_backend_name() != "duckdb":
        raise SettingsError(
            f"FALETL_WAREHOUSE: faletl keeps no warehouse in {url.get_backend_name()!r}; "
            "use duckdb:///path/to/file.duckdb"
        )
    from faletl.warehouse.duckdb import DuckDBWarehouse

    return DuckDBWarehouse(settings, url)

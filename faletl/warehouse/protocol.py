"""The protocol that each kind of warehouse implements."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write. `token` grows with every lease; each commit checks that it is the newest.

    `is_one_transaction`: the giver of the lease commits or undoes everything that is done under it.
    """

    connection: sa.Connection
    token: int
    is_one_transaction: bool = False

    def transaction(self) -> sa.Transaction:
        """Open a transaction; inside one that is open already, a savepoint."""
        return self.connection.begin_nested() if self.is_one_transaction else self.connection.begin()


class Warehouse(Protocol):
    """The operations that a database must provide to store faletl's tables (docs/warehouses.md)."""

    dialect: str
    """The name of its SQL dialect in sqlglot."""

    # Access.

    def lease(self, holder: str) -> AbstractContextManager[Lease]:
        """Become the only writer; create or upgrade the warehouse if necessary.

        Raises:
            WarehouseBusyError: another process kept the lease longer than we wait; names that process.
            TamperedError: the warehouse is damaged, or its tables were altered.
            StorageError: the disk refuses.
            SettingsError: the database is not a faletl warehouse, or is one of a newer faletl.
        """

    def reading(
        self, *, wait: bool = True, is_older_fine: bool = False
    ) -> AbstractContextManager[sa.Connection | None]:
        """Connect to read the loaded data, always in the state of now; None without a warehouse.

        The connection may keep writers waiting: close it soon.

        Raises:
            WarehouseBusyError: another process writes; without `wait`, at once.
            TamperedError, SettingsError: the database is not a faletl warehouse, or is one of a newer
                faletl. One of an older faletl is upgraded, unless `is_older_fine`.
        """

    def published(self) -> AbstractContextManager[sa.Connection | None]:
        """Connect for one select of a reader, who never blocks a run and never sees half of one."""

    def require_reader(self) -> None:
        """Raise UsageError if a query of this role could do more on the server than read tables."""

    def export_query(self, query: str, path: Path) -> bool:
        """Write the rows of a reader's query to a Parquet file; return False if nothing is published."""

    def grant(self, role: str) -> None:
        """Let a database role read marts and reports, now and after every build.

        Raises:
            UsageError: the database has no roles, or does not have this one.
        """

    def rebuilding(
        self, holder: str, token: int, ask: Callable[[sa.Connection], T]
    ) -> AbstractContextManager[tuple[Warehouse, T | None]]:
        """Make an empty warehouse that replaces this one in one step at the end, if all goes well.

        This warehouse stays locked meanwhile, and may be unreadable. Yields the new warehouse, and what
        `ask` returned for the old one, None if it cannot be read. Tokens of the new one are greater than
        `token`, and than those of the old one, as far as these can be read.

        Raises: as `lease`.
        """

    # Work under a lease.

    def load_rows(self, connection: sa.Connection, table: sa.Table, source: str, scratch: Path) -> None:
        """Insert staged rows (`Staged.source`) into the table, in bulk.

        `scratch` is a folder for temporary files.
        """

    def export_rows(self, connection: sa.Connection, query: sa.Select[Any], path: Path) -> None:
        """Write the rows of a select to a Parquet file, with the types of the warehouse."""

    def define_functions(self, connection: sa.Connection) -> None:
        """Create or replace the functions that the models call and the database lacks."""

    def column_types(self, connection: sa.Connection, select: str) -> list[tuple[str, str]]:
        """Return the name and type of each column that a table made from the select would have."""

    def make_view(self, connection: sa.Connection, name: str, select: str) -> None:
        """Create or replace a view; `select` is in the dialect of this database."""

    def make_table(self, connection: sa.Connection, name: str, select: str, by: str | None) -> None:
        """Create or replace an empty table with the columns of a select; `by` is its column of days."""

    def analyze(self, connection: sa.Connection, name: str) -> None:
        """Gather statistics of a table that was filled, where query plans depend on them."""

    def publish(self, lease: Lease) -> str | None:
        """Show the newest build to readers, in one step; return where they find it.

        Returns None if they have it already. A lease cannot be used after this.

        Raises:
            WarehouseError: loaded data is not built yet.
        """

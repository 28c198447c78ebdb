"""What a database must do to be a warehouse."""

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

    `is_one_transaction`: all that is done under it is committed, or undone, by whoever gave it.
    """

    connection: sa.Connection
    token: int
    is_one_transaction: bool = False

    def transaction(self) -> sa.Transaction:
        """What is done inside is done as a whole or not at all."""
        return self.connection.begin_nested() if self.is_one_transaction else self.connection.begin()


class Warehouse(Protocol):
    """What a database must provide to hold faletl's tables (docs/warehouses.md)."""

    dialect: str
    """The sqlglot name of its SQL."""

    # Who may use it.

    def lease(self, holder: str) -> AbstractContextManager[Lease]:
        """Become the only writer, creating or upgrading the warehouse if need be.

        Raises:
            WarehouseBusyError: somebody else held the lease for as long as we wait; says who.
            TamperedError: it is damaged, or its tables were altered.
            StorageError: the disk refuses.
            SettingsError: it is no warehouse of ours, or one of a newer faletl.
        """

    def reading(
        self, *, wait: bool = True, is_older_fine: bool = False
    ) -> AbstractContextManager[sa.Connection | None]:
        """A connection that sees what is loaded now, and goes on seeing that; None without a warehouse.

        It may keep writers waiting: read and let go.

        Raises:
            WarehouseBusyError: somebody writes; at once, or after as long as we `wait`.
            TamperedError, SettingsError: it is no warehouse of ours, or one of a newer faletl; one of
                an older faletl is upgraded, except where it may be read as it is.
        """

    def published(self) -> AbstractContextManager[sa.Connection | None]:
        """A connection for one select of a reader: never blocks a run, never sees half of one."""

    def require_reader(self) -> None:
        """Raises UsageError where a reader's query would have powers over the server."""

    def export(self, query: str, path: Path) -> bool:
        """Write the rows of a reader's query to a Parquet file; False when nothing is published."""

    def grant(self, role: str) -> None:
        """Let a role of the database read marts and reports, now and after every build.

        Raises:
            UsageError: the database has no roles, or not this one.
        """

    def renewed(
        self, holder: str, token: int, ask: Callable[[sa.Connection], T]
    ) -> AbstractContextManager[tuple[Warehouse, T | None]]:
        """An empty warehouse that takes the place of this one if all goes well, in one step.

        This one is held meanwhile, and need not be readable; with the new one comes what it answers to
        `ask`, None where it cannot. Leases of the new one have greater tokens than `token`, and than
        those of this one, as far as these can be read.

        Raises: as `lease`.
        """

    # What the core does under a lease.

    def take_in(self, connection: sa.Connection, table: sa.Table, source: str, scratch: Path) -> None:
        """Insert the columns of the table from staged rows (`Staged.source`), in bulk.

        `scratch` is a folder for what has to be written on the way.
        """

    def hand_out(self, connection: sa.Connection, query: sa.Select[Any], path: Path) -> None:
        """Write the rows of a select to a Parquet file, typed as in the warehouse."""

    def define_functions(self, connection: sa.Connection) -> None:
        """Create or replace the functions that the models call and the database does not have."""

    def described(self, connection: sa.Connection, select: str) -> list[tuple[str, str]]:
        """The name and type of each column of a select, as a table made of it would have them."""

    def make_view(self, connection: sa.Connection, name: str, select: str) -> None:
        """A view in place of what is there; `select` is in its own dialect."""

    def make_table(self, connection: sa.Connection, name: str, select: str, by: str | None) -> None:
        """An empty table with the columns of a select in place of what is there; days are in `by`."""

    def analyze(self, connection: sa.Connection, name: str) -> None:
        """A table was filled: look at it again, if that is what plans of queries stand on."""

    def publish(self, lease: Lease) -> str | None:
        """Show the newest build to readers, in one step; None when they have it already.

        Returns what readers open. It is the last thing that a lease can be used for.

        Raises:
            WarehouseError: something was loaded that is not built yet.
        """

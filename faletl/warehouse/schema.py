"""The schema of a warehouse, whichever database keeps it: made, upgraded, told apart from others."""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import UTC, datetime

import sqlalchemy as sa

from faletl import __version__
from faletl.errors import SettingsError, WarehouseError
from faletl.warehouse.tables import BUILDS, METADATA, SCHEMA_VERSION, SCHEMAS, WAREHOUSE

log = logging.getLogger(__name__)

OLDEST = 3
"""The oldest schema that can be upgraded; what is older has to be rebuilt."""


def create(connection: sa.Connection, token: int = 0, held: Collection[str] = ()) -> None:
    """Inside a transaction: all schemas (but those `held` already) and tables, empty.

    Leases will have greater tokens than `token`.
    """
    for name in SCHEMAS:
        if name not in held:
            connection.execute(sa.schema.CreateSchema(name))
    METADATA.create_all(connection, checkfirst=False)
    initialise(connection, token)


def initialise(connection: sa.Connection, token: int) -> None:
    """Inside a transaction: enter the warehouse itself, of which there is nothing yet."""
    connection.execute(
        sa.insert(WAREHOUSE).values(
            schema_version=SCHEMA_VERSION,
            faletl_version=__version__,
            fencing_token=token,
            data_version=0,
        )
    )


def is_older(connection: sa.Connection, where: str, *, is_older_fine: bool = False) -> bool:
    """Whether it has to be upgraded before it can be used by this faletl.

    Raises:
        SettingsError: no warehouse of ours, one of a newer faletl, or one that is too old.
    """
    try:
        version = connection.execute(sa.select(WAREHOUSE.c.schema_version)).scalar_one()
    except sa.exc.SQLAlchemyError as error:
        if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
            raise  # the server is gone, which tells nothing of what it holds
        raise SettingsError(f"{where} is a database, but no faletl warehouse") from None
    if version > SCHEMA_VERSION:
        raise SettingsError(
            f"{where} was written by a newer faletl (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); upgrade faletl"
        )
    if version < OLDEST and not is_older_fine:
        raise SettingsError(
            f"{where} was written by an older faletl (schema {version}, this one can upgrade from "
            f"{OLDEST}); faletl rebuild makes it anew from the landed pages"
        )
    return bool(version < SCHEMA_VERSION)


def upgrade(connection: sa.Connection, where: str) -> None:
    """Inside a transaction: give an older warehouse the tables, columns and comments it lacks.

    No row is touched. Marts and reports are made anew by the next build, which sees that it has
    another schema.
    """
    before = connection.execute(sa.select(WAREHOUSE.c.schema_version)).scalar_one()
    for table in METADATA.sorted_tables:
        held = columns_of(connection, table)
        if not held:
            table.create(connection)
            continue
        for column in table.columns:
            if column.name not in held:
                told = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"alter table {table.fullname} add column {told}")
            connection.execute(sa.schema.SetColumnComment(column))
        connection.execute(sa.schema.SetTableComment(table))
    connection.execute(
        sa.update(WAREHOUSE).values(schema_version=SCHEMA_VERSION, faletl_version=__version__)
    )
    log.warning("%s was upgraded from schema %d to %d", where, before, SCHEMA_VERSION)


def columns_of(connection: sa.Connection, table: sa.Table) -> set[str]:
    """The columns that the table really has; none where it is not there, as in an older warehouse."""
    names = ("table_schema", "table_name", "column_name")
    columns = sa.table(
        "columns", *(sa.column(name, sa.Text) for name in names), schema="information_schema"
    ).c
    found = sa.select(columns.column_name).where(
        columns.table_schema == table.schema, columns.table_name == table.name
    )
    return set(connection.execute(found).scalars())


def take_token(connection: sa.Connection, holder: str) -> int:
    """Inside a transaction: the token of a new lease, greater than any before."""
    token = connection.execute(
        sa.update(WAREHOUSE)
        .values(fencing_token=WAREHOUSE.c.fencing_token + 1, holder=holder, held_since=datetime.now(UTC))
        .returning(WAREHOUSE.c.fencing_token)
    ).scalar_one()
    return int(token)


def newest_build(connection: sa.Connection) -> tuple[str, int] | None:
    """The id of the newest build, and the version of the raw tables that it stands on."""
    newest = sa.select(BUILDS.c.build_id, BUILDS.c.data_version).order_by(BUILDS.c.fencing_token.desc())
    found = connection.execute(newest.limit(1)).first()
    return (found.build_id, found.data_version) if found else None


def build_to_publish(connection: sa.Connection) -> tuple[str, int]:
    """The newest build; raises WarehouseError if something was loaded that it does not stand on."""
    build = newest_build(connection)
    loaded = connection.execute(sa.select(WAREHOUSE.c.data_version)).scalar_one()
    if build is None or build[1] != loaded:
        raise WarehouseError("not all that is loaded is built; run faletl build first")
    return build

"""The schema of a warehouse in any database: create it, upgrade it, recognise it."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from faletl import __version__
from faletl.errors import SettingsError, TamperedError, WarehouseError
from faletl.warehouse.names import in_database, prefix_of
from faletl.warehouse.tables import BUILDS, METADATA, SCHEMA_VERSION, SCHEMAS, WAREHOUSE

log = logging.getLogger(__name__)

UNFIT = (
    "a table or column that faletl made is gone from the warehouse ({}); faletl verify lists what was "
    "altered, faletl rebuild builds the warehouse again from the landed pages"
)
"""The error for a query of ours that names a missing table, column or function."""

OLDEST = 3
"""The oldest schema version that can be upgraded; an older warehouse must be rebuilt."""


def create(connection: sa.Connection, token: int = 0, existing: Collection[str] = ()) -> None:
    """Create all schemas (except those that are `existing`) and empty tables, inside a transaction.

    The next leases get greater tokens than `token`.
    """
    for name in in_database(connection, SCHEMAS):
        if name not in existing:
            connection.execute(sa.schema.CreateSchema(name))
    statements: list[str] = []
    script = sa.create_mock_engine(
        connection.engine.url,
        lambda ddl, *_, **__: statements.append(str(ddl.compile(dialect=connection.dialect))),
    )
    METADATA.create_all(script, checkfirst=False)
    connection.exec_driver_sql("; ".join(statements))  # hundreds, with the comments
    initialise(connection, token)


def initialise(connection: sa.Connection, token: int) -> None:
    """Insert the row of ops.warehouse, inside a transaction; the table must be empty."""
    connection.execute(
        sa.insert(WAREHOUSE).values(
            schema_version=SCHEMA_VERSION,
            faletl_version=__version__,
            fencing_token=token,
            data_version=0,
            warehouse_id=secrets.token_hex(8),
        )
    )


def is_older(connection: sa.Connection, where: str, *, is_older_fine: bool = False) -> bool:
    """Return whether the warehouse must be upgraded before this faletl can use it.

    Raises:
        SettingsError: not a faletl warehouse, one of a newer faletl, or one that is too old.
    """
    try:
        version = connection.execute(sa.select(WAREHOUSE.c.schema_version)).scalar_one()
    except (sa.exc.ProgrammingError, sa.exc.NoResultFound, sa.exc.MultipleResultsFound):
        # Any other error, of a server that is gone or cannot wait, says nothing about its tables.
        prefix = prefix_of(connection)
        prefix_hint = f" whose schemas begin with {prefix} (FALETL_SCHEMA_PREFIX)" if prefix else ""
        raise SettingsError(
            f"{where} is a database, but not a faletl warehouse{prefix_hint}; set FALETL_WAREHOUSE to "
            "another one, or FALETL_SCHEMA_PREFIX, say to fal_, if others use this one, too"
        ) from None
    if version > SCHEMA_VERSION:
        raise SettingsError(
            f"{where} was written by a newer faletl (schema {version}, this one supports "
            f"{SCHEMA_VERSION}); upgrade faletl"
        )
    if version < OLDEST and not is_older_fine:
        raise SettingsError(
            f"{where} was written by an older faletl (schema {version}, this one can upgrade from "
            f"{OLDEST}); faletl rebuild builds it again from the landed pages"
        )
    return bool(version < SCHEMA_VERSION)


def upgrade(connection: sa.Connection, where: str) -> None:
    """Add the tables, columns and comments that an older warehouse lacks, inside a transaction.

    Existing rows stay unchanged. The next build notices the new schema and rebuilds marts and reports.
    """
    old_version = connection.execute(sa.select(WAREHOUSE.c.schema_version)).scalar_one()
    for table in METADATA.sorted_tables:
        existing = columns_of(connection, table)
        if not existing:
            table.create(connection, checkfirst=False)
            continue
        for column in table.columns:
            if column.name not in existing:
                definition = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"alter table {table.fullname} add column {definition}")
            connection.execute(sa.schema.SetColumnComment(column))
        connection.execute(sa.schema.SetTableComment(table))
    known_id = sa.func.coalesce(WAREHOUSE.c.warehouse_id, secrets.token_hex(8))
    connection.execute(
        sa.update(WAREHOUSE).values(
            schema_version=SCHEMA_VERSION, faletl_version=__version__, warehouse_id=known_id
        )
    )
    log.warning("%s was upgraded from schema %d to %d", where, old_version, SCHEMA_VERSION)


def columns_of(connection: sa.Connection, table: sa.Table) -> set[str]:
    """Return the columns that the table has in the database; none if the table does not exist."""
    return set(existing_columns(connection, [str(table.schema)]).get(table.fullname, ()))


def existing_columns(
    connection: sa.Connection, schemas: Collection[str]
) -> Mapping[str, Mapping[str, str]]:
    """Return the columns of tables and views in our schemas, as they are in the database, with types."""
    prefix = prefix_of(connection)
    names = ("table_schema", "table_name", "column_name", "data_type")
    numbers = ("ordinal_position", "numeric_precision", "numeric_scale")
    columns = sa.table(
        "columns",
        *(sa.column(name, sa.Text) for name in names),
        *(sa.column(name, sa.Integer) for name in numbers),
        schema="information_schema",
    )
    query = sa.select(columns).where(columns.c.table_schema.in_(in_database(connection, schemas)))
    columns_by_table: dict[str, dict[str, str]] = {}
    for column in connection.execute(query.order_by(columns.c.ordinal_position)):
        kind = column.data_type.lower()
        if kind == "numeric":  # PostgreSQL, where DuckDB has all of it in the type
            kind = f"decimal({column.numeric_precision},{column.numeric_scale})"
        table = f"{column.table_schema.removeprefix(prefix)}.{column.table_name}"
        columns_by_table.setdefault(table, {})[column.column_name] = {"varchar": "text"}.get(kind, kind)
    return columns_by_table


def altered(connection: sa.Connection) -> Iterator[str]:
    """Yield each difference between our tables in the database and their definitions.

    Additional columns are not a difference.
    """
    existing = existing_columns(connection, ["raw", "ops"])
    for table in METADATA.sorted_tables:
        if table.schema not in ("raw", "ops"):
            continue
        if table.fullname not in existing:
            yield f"{table.fullname} is gone"
            continue
        for column in table.columns:
            kind = existing[table.fullname].get(column.name)
            if kind != (expected := _kind(column.type)):
                problem = f"of type {kind}, not {expected}" if kind else "gone"
                yield f"{table.fullname}: the column {column.name} is {problem}"


def _kind(sql_type: sa.types.TypeEngine[Any]) -> str:
    if isinstance(sql_type, sa.Numeric):
        return f"decimal({sql_type.precision},{sql_type.scale})"
    if isinstance(sql_type, sa.DateTime):
        return "timestamp with time zone"
    return type(sql_type).__name__.lower().replace("biginteger", "bigint")


def refuse_altered(connection: sa.Connection, where: str) -> None:
    """Raise TamperedError if our tables were altered: rows written to them might be changed."""
    if changed := next(altered(connection), None):
        raise TamperedError(
            f"{where} was altered ({changed}); faletl rebuild builds it again from the landed pages"
        )


def take_token(connection: sa.Connection, holder: str) -> int:
    """Return the token of a new lease, greater than all before, inside a transaction."""
    token = connection.execute(
        sa.update(WAREHOUSE)
        .values(fencing_token=WAREHOUSE.c.fencing_token + 1, holder=holder, held_since=datetime.now(UTC))
        .returning(WAREHOUSE.c.fencing_token)
    ).scalar_one()
    return int(token)


def newest_build(connection: sa.Connection) -> tuple[str, int] | None:
    """Return the id of the newest build, and the version of the raw tables that it is made from."""
    newest = sa.select(BUILDS.c.build_id, BUILDS.c.data_version).order_by(BUILDS.c.fencing_token.desc())
    row = connection.execute(newest.limit(1)).first()
    return (row.build_id, row.data_version) if row else None


def build_to_publish(connection: sa.Connection) -> tuple[str, int]:
    """Return the newest build; raise WarehouseError if it does not contain all loaded data."""
    build = newest_build(connection)
    loaded = connection.execute(sa.select(WAREHOUSE.c.data_version)).scalar_one()
    if build is None or build[1] != loaded:
        raise WarehouseError("loaded data is not built yet; run faletl build first")
    return build

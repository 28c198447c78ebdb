"""The schema of a warehouse, whichever database keeps it: made, upgraded, told apart from others."""

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
    "the warehouse does not hold what faletl made ({}); faletl verify tells what was altered, faletl "
    "rebuild makes it anew from the landed pages"
)
"""Said of a query of ours that names what is not there."""

OLDEST = 3
"""The oldest schema that can be upgraded; what is older has to be rebuilt."""


def create(connection: sa.Connection, token: int = 0, held: Collection[str] = ()) -> None:
    """Inside a transaction: all schemas (but those that the database has, `held`) and tables, empty.

    Leases will have greater tokens than `token`.
    """
    for name in in_database(connection, SCHEMAS):
        if name not in held:
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
    """Inside a transaction: enter the warehouse itself, of which there is nothing yet."""
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
    """Whether it has to be upgraded before it can be used by this faletl.

    Raises:
        SettingsError: no warehouse of ours, one of a newer faletl, or one that is too old.
    """
    try:
        version = connection.execute(sa.select(WAREHOUSE.c.schema_version)).scalar_one()
    except (sa.exc.ProgrammingError, sa.exc.NoResultFound, sa.exc.MultipleResultsFound):
        # Any other error, of a server that is gone or cannot wait, tells nothing of what it holds.
        prefix = prefix_of(connection)
        where_else = f" whose schemas begin with {prefix} (FALETL_SCHEMA_PREFIX)" if prefix else ""
        raise SettingsError(
            f"{where} is a database, but no faletl warehouse{where_else}; set FALETL_WAREHOUSE to "
            "another one, or FALETL_SCHEMA_PREFIX, say to fal_, if others use this one, too"
        ) from None
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
            table.create(connection, checkfirst=False)
            continue
        for column in table.columns:
            if column.name not in held:
                told = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"alter table {table.fullname} add column {told}")
            connection.execute(sa.schema.SetColumnComment(column))
        connection.execute(sa.schema.SetTableComment(table))
    known_id = sa.func.coalesce(WAREHOUSE.c.warehouse_id, secrets.token_hex(8))
    connection.execute(
        sa.update(WAREHOUSE).values(
            schema_version=SCHEMA_VERSION, faletl_version=__version__, warehouse_id=known_id
        )
    )
    log.warning("%s was upgraded from schema %d to %d", where, before, SCHEMA_VERSION)


def columns_of(connection: sa.Connection, table: sa.Table) -> set[str]:
    """The columns that the table really has; none where it is not there, as in an older warehouse."""
    return set(columns_held(connection, [str(table.schema)]).get(table.fullname, ()))


def columns_held(connection: sa.Connection, schemas: Collection[str]) -> Mapping[str, Mapping[str, str]]:
    """The types of the columns, in order, that tables and views of our schemas really have."""
    prefix = prefix_of(connection)
    names = ("table_schema", "table_name", "column_name", "data_type")
    numbers = ("ordinal_position", "numeric_precision", "numeric_scale")
    columns = sa.table(
        "columns",
        *(sa.column(name, sa.Text) for name in names),
        *(sa.column(name, sa.Integer) for name in numbers),
        schema="information_schema",
    )
    found = sa.select(columns).where(columns.c.table_schema.in_(in_database(connection, schemas)))
    held: dict[str, dict[str, str]] = {}
    for column in connection.execute(found.order_by(columns.c.ordinal_position)):
        kind = column.data_type.lower()
        if kind == "numeric":  # PostgreSQL, where DuckDB has all of it in the type
            kind = f"decimal({column.numeric_precision},{column.numeric_scale})"
        table = f"{column.table_schema.removeprefix(prefix)}.{column.table_name}"
        held.setdefault(table, {})[column.column_name] = {"varchar": "text"}.get(kind, kind)
    return held


def altered(connection: sa.Connection) -> Iterator[str]:
    """What of our own tables is not as they were made, table by table; more columns do no harm."""
    held = columns_held(connection, ["raw", "ops"])
    for table in METADATA.sorted_tables:
        if table.schema not in ("raw", "ops"):
            continue
        if table.fullname not in held:
            yield f"{table.fullname} is gone"
            continue
        for column in table.columns:
            kind = held[table.fullname].get(column.name)
            if kind != (made := _kind(column.type)):
                told = f"of type {kind}, not {made}" if kind else "gone"
                yield f"{table.fullname}: the column {column.name} is {told}"


def _kind(of: sa.types.TypeEngine[Any]) -> str:
    if isinstance(of, sa.Numeric):
        return f"decimal({of.precision},{of.scale})"
    if isinstance(of, sa.DateTime):
        return "timestamp with time zone"
    return type(of).__name__.lower().replace("biginteger", "bigint")


def refuse_altered(connection: sa.Connection, where: str) -> None:
    """Raises TamperedError where somebody altered our tables: what is written to them might be bent."""
    if changed := next(altered(connection), None):
        raise TamperedError(
            f"{where} was altered ({changed}); faletl rebuild makes it anew from the landed pages"
        )


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

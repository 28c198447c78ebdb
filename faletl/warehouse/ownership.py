"""Ownership of tables and views: faletl replaces and drops only those that it made itself.

`ops.objects` names them. A warehouse of an older faletl has no such names; there, every object with the
name of one of ours counts as ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import sqlalchemy as sa

from faletl.errors import SettingsError
from faletl.files import sql_folder
from faletl.warehouse.names import in_database
from faletl.warehouse.schema import columns_of, existing_columns
from faletl.warehouse.tables import BUILDS, LAYERS, METADATA, OBJECTS, SCHEMAS


def planned() -> frozenset[str]:
    """Return the name of every table and view that faletl makes, with its schema."""
    models = (path for layer in LAYERS for path in (sql_folder() / layer).glob("*.sql"))
    tables = (table.fullname for table in METADATA.sorted_tables)
    return frozenset([*tables, *(f"{path.parent.name}.{path.stem}" for path in models)])


def refuse(foreign_names: Iterable[str], where: str) -> None:
    """Raise SettingsError if there are foreign objects with names that faletl needs."""
    if names := sorted(foreign_names):
        raise SettingsError(
            f"{where} has foreign objects with names that faletl needs: {', '.join(names)}; nothing was "
            "changed. Set FALETL_SCHEMA_PREFIX, for example to fal_, so that faletl's schemas get other "
            "names; or set FALETL_WAREHOUSE to another database"
        )


def of_others(connection: sa.Connection) -> list[str]:
    """Return the tables and views of a DuckDB file that faletl did not make, with their schemas."""
    objects = connection.exec_driver_sql(
        "select table_schema, table_schema || '.' || table_name from information_schema.tables "
        "where table_catalog = current_database()"
    )
    ours = set(in_database(connection, planned()))
    if columns_of(connection, OBJECTS):
        ours.update(connection.execute(sa.select(OBJECTS.c.name)).scalars())
        schemas = set[str]()
    else:  # an older faletl made whatever is in its schemas
        schemas = set(in_database(connection, SCHEMAS))
    return sorted(name for schema, name in objects if schema not in schemas and name not in ours)


def claim(connection: sa.Connection, tables: Collection[str]) -> None:
    """Register the tables and views that a build is about to make, inside a transaction.

    Raises:
        SettingsError: a foreign object has one of these names.
    """
    ours = set(in_database(connection, tables))
    known = set(connection.execute(sa.select(OBJECTS.c.name)).scalars())
    existing = ours.intersection(in_database(connection, existing_columns(connection, LAYERS)))
    has_build = connection.execute(sa.select(BUILDS.c.build_id).limit(1)).first() is not None
    if known or not has_build:  # else an older faletl made them
        refuse(existing - known, "the warehouse")
    if new := sorted(ours - known):
        connection.execute(sa.insert(OBJECTS), [{"name": name} for name in new])

"""Ownership: what faletl made in a database that others use, too. It replaces and drops nothing else.

`ops.objects` names the tables and views that are ours. A warehouse of an older faletl has no such names;
there everything that has the name of one of ours is, as that faletl made it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import sqlalchemy as sa

from faletl.errors import SettingsError
from faletl.files import sql_folder
from faletl.warehouse.names import in_database
from faletl.warehouse.schema import columns_held, columns_of
from faletl.warehouse.tables import BUILDS, LAYERS, METADATA, OBJECTS, SCHEMAS


def planned() -> frozenset[str]:
    """Every table and view that faletl makes, with its schema."""
    models = (path for layer in LAYERS for path in (sql_folder() / layer).glob("*.sql"))
    tables = (table.fullname for table in METADATA.sorted_tables)
    return frozenset([*tables, *(f"{path.parent.name}.{path.stem}" for path in models)])


def refuse(theirs: Iterable[str], where: str) -> None:
    """Raises SettingsError if there are objects of others where faletl would make its own."""
    if names := sorted(theirs):
        raise SettingsError(
            f"{where} holds {', '.join(names)} of somebody else, where faletl would make its own; "
            "nothing was changed. Set FALETL_SCHEMA_PREFIX, say to fal_, and faletl makes schemas of "
            "other names; or set FALETL_WAREHOUSE to another database"
        )


def of_others(connection: sa.Connection) -> list[str]:
    """The tables and views of a DuckDB file that faletl did not make, with their schemas."""
    found = connection.exec_driver_sql(
        "select table_schema, table_schema || '.' || table_name from information_schema.tables "
        "where table_catalog = current_database()"
    )
    ours = set(in_database(connection, planned()))
    if columns_of(connection, OBJECTS):
        ours.update(connection.execute(sa.select(OBJECTS.c.name)).scalars())
        schemas = set[str]()
    else:  # an older faletl made whatever is in its schemas
        schemas = set(in_database(connection, SCHEMAS))
    return sorted(name for schema, name in found if schema not in schemas and name not in ours)


def claim(connection: sa.Connection, tables: Collection[str]) -> None:
    """Inside a transaction: register what a build is about to make.

    Raises:
        SettingsError: something has one of these names that faletl did not make.
    """
    ours = set(in_database(connection, tables))
    known = set(connection.execute(sa.select(OBJECTS.c.name)).scalars())
    there = ours.intersection(in_database(connection, columns_held(connection, LAYERS)))
    has_build = connection.execute(sa.select(BUILDS.c.build_id).limit(1)).first() is not None
    if known or not has_build:  # else an older faletl made them
        refuse(there - known, "the warehouse")
    if new := sorted(ours - known):
        connection.execute(sa.insert(OBJECTS), [{"name": name} for name in new])

"""Ownership of tables and views: faletl replaces and drops only those that it made itself.

`ops.objects` names them. A warehouse of an older faletl has no such names; there, every object with the
name of one of ours counts as ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import sqlalchemy as sa

from faletl.errors import SettingsError
from faletl.files import sql_folder
from faletl.warehouse.names import AS_TYPED, in_database
from faletl.warehouse.schema import columns_of
from faletl.warehouse.tables import BUILDS, LAYERS, METADATA, OBJECTS, SCHEMAS

_OBJECTS: Mapping[str, str] = {
    "postgresql": """
        select nspname, relname from pg_class join pg_namespace on pg_namespace.oid = relnamespace
        union
        select nspname, proname from pg_proc join pg_namespace on pg_namespace.oid = pronamespace
        union
        select nspname, typname from pg_type join pg_namespace on pg_namespace.oid = typnamespace
        where typelem = 0
    """,
    "duckdb": """
        select schema_name, table_name from duckdb_tables()
        where database_name = current_database() and not internal
        union
        select schema_name, view_name from duckdb_views()
        where database_name = current_database() and not internal
        union
        select schema_name, index_name from duckdb_indexes() where database_name = current_database()
        union
        select schema_name, sequence_name from duckdb_sequences()
        where database_name = current_database()
        union
        select schema_name, function_name from duckdb_functions()
        where database_name = current_database() and not internal
        union
        select schema_name, type_name from duckdb_types()
        where database_name = current_database() and not internal
    """,
}
"""Queries for schema and name of every object in a database, also of those that our role may not use."""


def objects(connection: sa.Connection, schemas: Collection[str]) -> set[str]:
    """Return the names, with their schemas, of all objects in these schemas of the database."""
    rows = connection.exec_driver_sql(_OBJECTS[connection.dialect.name], execution_options=AS_TYPED)
    return {f"{schema}.{name}" for schema, name in rows if schema in schemas}


def models() -> frozenset[str]:
    """Return the name of every table and view that a build makes, with its schema."""
    paths = (path for layer in LAYERS for path in (sql_folder() / layer).glob("*.sql"))
    return frozenset(f"{path.parent.name}.{path.stem}" for path in paths)


def planned() -> frozenset[str]:
    """Return the name of every table and view that faletl makes, with its schema."""
    return models().union(table.fullname for table in METADATA.sorted_tables)


def refuse(foreign_names: Iterable[str], where: str) -> None:
    """Raise SettingsError if there are foreign objects with names that faletl needs."""
    if names := sorted(foreign_names):
        raise SettingsError(
            f"{where} has foreign objects with names that faletl needs: {', '.join(names)}; nothing was "
            "changed. Set FALETL_SCHEMA_PREFIX, for example to fal_, so that faletl's schemas get other "
            "names; or set FALETL_WAREHOUSE to another database"
        )


def of_others(connection: sa.Connection, functions: Collection[str]) -> list[str]:
    """Return what faletl did not make in a DuckDB file: schemas, and objects with their schemas.

    `functions` are those that faletl makes there.
    """
    schemas = set(
        connection.exec_driver_sql(
            "select schema_name from duckdb_schemas() where database_name = current_database()"
        ).scalars()
    )
    own = set(in_database(connection, SCHEMAS))
    ours = {*in_database(connection, planned()), *(f"main.{name}" for name in functions)}
    found = objects(connection, schemas)
    if columns_of(connection, OBJECTS):
        ours.update(connection.execute(sa.select(OBJECTS.c.name)).scalars())
    else:  # an older faletl made whatever is in its schemas
        ours.update(name for name in found if name.split(".")[0] in own)
    theirs = found - ours
    empty = schemas - own - {"main"} - {name.split(".")[0] for name in theirs}
    return sorted([*empty, *theirs])


def claim(connection: sa.Connection, tables: Collection[str]) -> None:
    """Register the tables and views that a build is about to make, inside a transaction.

    Raises:
        SettingsError: a foreign object has one of these names.
    """
    ours = set(in_database(connection, tables))
    known = set(connection.execute(sa.select(OBJECTS.c.name)).scalars())
    existing = ours & objects(connection, in_database(connection, LAYERS))
    has_build = connection.execute(sa.select(BUILDS.c.build_id).limit(1)).first() is not None
    if known or not has_build:  # else an older faletl made them
        refuse(existing - known, "the warehouse")
    register(connection, ours)


def register(connection: sa.Connection, names: Collection[str]) -> None:
    """Inside a transaction: list these objects in `ops.objects`, each once."""
    listed = connection.execute(sa.select(OBJECTS.c.name)).scalars()
    if new := sorted(set(names).difference(listed)):
        connection.execute(sa.insert(OBJECTS), [{"name": name} for name in new])

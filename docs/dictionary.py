"""The data dictionary, read from an empty warehouse that is really built.

Names, types and comments come from the database. It cannot store the grain of a table and, in DuckDB,
the purpose of a schema.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from faletl.config import Settings
from faletl.models.build import build_models
from faletl.models.catalogue import models
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import METADATA, SCHEMAS

INTRODUCTION = """\
# Data dictionary

<!-- Made by `make docs` from the comments in sql/, faletl/resources.py, faletl/warehouse/tables.py. -->

Every schema, table, view and column, in reading order. The descriptions are the comments in the
database, the types are DuckDB's. The grain of a table is the set of columns that identifies a row; it
is none if no set of columns does. Instants in `raw` and `ops` have a time zone, those in the models are
in UTC. How facts and dimensions join: [the star schema](star-schema.svg).
"""

RELATIONS = """
    select schema_name, table_name as name, 'Table' as kind, comment from duckdb_tables()
    union all
    select schema_name, view_name as name, 'View' as kind, comment from duckdb_views()
    order by name
"""
COLUMNS = """
    select column_name, data_type, comment from duckdb_columns()
    where schema_name = :schema and table_name = :name order by column_index
"""


def document() -> str:
    """Return the dictionary, in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.isolated(warehouse=f"duckdb:///{Path(folder) / 'empty.duckdb'}")
        warehouse = open_warehouse(settings)
        with warehouse.lease("make docs") as lease:
            build_models(settings, warehouse, lease, run_id="docs")
            return "\n".join([INTRODUCTION, *_contents(lease.connection), *_schemas(lease.connection)])


def _contents(connection: sa.Connection) -> Iterator[str]:
    relations = connection.execute(sa.text(RELATIONS)).all()
    for schema in SCHEMAS:
        links = [f"[{row.name}](#{schema}{row.name})" for row in relations if row.schema_name == schema]
        yield f"- [**{schema}**](#{schema}): {' · '.join(links)}"
    yield ""


def _schemas(connection: sa.Connection) -> Iterator[str]:
    relations = connection.execute(sa.text(RELATIONS)).all()
    grains = {table.fullname: table.info["grain"] for table in METADATA.tables.values()}
    grains |= {model.table: model.grain for model in models()}
    for schema, purpose in SCHEMAS.items():
        yield f"## {schema}\n\n{purpose}\n"
        for row in relations:
            if row.schema_name != schema:
                continue
            grain = ", ".join(f"`{column}`" for column in grains[f"{schema}.{row.name}"])
            yield f"### {schema}.{row.name}\n\n{_text(row.comment)}\n"
            yield f"{row.kind}. Grain: {grain or 'none'}.\n"
            yield "| column | type | meaning |\n| --- | --- | --- |"
            query = sa.text(COLUMNS).bindparams(schema=schema, name=row.name)
            for column in connection.execute(query):
                yield f"| `{column.column_name}` | {column.data_type} | {_text(column.comment)} |"
            yield ""


def _text(comment: str) -> str:
    """Escape the characters of a comment that have a meaning in Markdown."""
    return re.sub(r"([|*<>`\[\]])", r"\\\1", comment)

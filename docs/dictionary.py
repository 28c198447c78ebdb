"""The data dictionary: what a warehouse says of itself, asked of an empty one that was really built.

Names, types and comments are those in the database; what it cannot hold is the grain, and in DuckDB what
a schema is for.
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

Every schema, table, view and column, in reading order. The descriptions are those that the database has
as comments, the types are DuckDB's. The grain is what tells rows apart: the columns of which no two rows
hold the same values; none where there are no such columns. Instants of `raw` and `ops` carry their zone,
those of the models are in UTC. How facts and dimensions join: [the star schema](star-schema.svg).
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
    """The dictionary, in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.isolated(warehouse=f"duckdb:///{Path(folder) / 'empty.duckdb'}")
        warehouse = open_warehouse(settings)
        with warehouse.lease("make docs") as lease:
            build_models(settings, warehouse, lease, run_id="docs")
            return "\n".join([INTRODUCTION, *_contents(lease.connection), *_schemas(lease.connection)])


def _contents(connection: sa.Connection) -> Iterator[str]:
    found = connection.execute(sa.text(RELATIONS)).all()
    for schema in SCHEMAS:
        links = [f"[{row.name}](#{schema}{row.name})" for row in found if row.schema_name == schema]
        yield f"- [**{schema}**](#{schema}): {' · '.join(links)}"
    yield ""


def _schemas(connection: sa.Connection) -> Iterator[str]:
    found = connection.execute(sa.text(RELATIONS)).all()
    grains = {table.fullname: table.info["grain"] for table in METADATA.tables.values()}
    grains |= {model.table: model.grain for model in models()}
    for schema, purpose in SCHEMAS.items():
        yield f"## {schema}\n\n{purpose}\n"
        for row in found:
            if row.schema_name != schema:
                continue
            grain = ", ".join(f"`{column}`" for column in grains[f"{schema}.{row.name}"])
            yield f"### {schema}.{row.name}\n\n{_text(row.comment)}\n"
            yield f"{row.kind}. Grain: {grain or 'none'}.\n"
            yield "| column | type | holds |\n| --- | --- | --- |"
            asked = sa.text(COLUMNS).bindparams(schema=schema, name=row.name)
            for column in connection.execute(asked):
                yield f"| `{column.column_name}` | {column.data_type} | {_text(column.comment)} |"
            yield ""


def _text(comment: str) -> str:
    """The comment, with nothing in it that Markdown would take for its own."""
    return re.sub(r"([|*<>`\[\]])", r"\\\1", comment)

"""The documents that are made of the code, and the comments in the database that they repeat."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import time_machine

from docs.__main__ import DOCUMENTS
from docs.examples import warehouse
from docs.star_schema import edges
from faletl import pipeline
from faletl.cli.output import print_query
from faletl.config import Settings
from faletl.models.catalogue import column_comments, models
from faletl.warehouse.tables import METADATA, SCHEMAS
from tests.conftest import Query

pytestmark = pytest.mark.xdist_group("demo")  # which takes long to make, and is made once a process

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_made_of_the_code_is_current(name: str) -> None:
    is_current = (DOCS / name).read_text("utf-8") == DOCUMENTS[name]()
    assert is_current, f"docs/{name} is not what the code says now: run `make docs` and commit it"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_query_in_the_documents_runs(page: Path) -> None:
    text = page.read_text("utf-8")
    queries = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    queries += re.findall(r'\$ faletl sql "([^"]+)"', text)
    for query in queries:
        print_query(warehouse(), query, "csv")


def test_everything_in_a_warehouse_is_commented(
    clock: time_machine.Traveller, settings: Settings, query: Query
) -> None:
    assert pipeline.run(settings).exit_code == 0
    found = query(
        "select schema_name, table_name, '', comment from duckdb_tables() "
        "union all select schema_name, view_name, '', comment from duckdb_views() where not internal "
        "union all select schema_name, table_name, column_name, comment from duckdb_columns() "
        "where not internal"
    )
    assert {schema for schema, *_ in found} == SCHEMAS.keys()
    expected = column_comments().keys() | METADATA.tables.keys()
    assert {f"{schema}.{table}" for schema, table, *_ in found} == expected
    assert [".".join(name) for *name, comment in found if not (comment or "").strip()] == []


def test_the_grain_of_a_written_table_tells_its_rows_apart(
    clock: time_machine.Traveller, settings: Settings, query: Query
) -> None:
    assert pipeline.run(settings).exit_code == 0
    for table in METADATA.tables.values():
        if grain := ", ".join(f'"{table.c[name].name}"' for name in table.info["grain"]):
            twins = f"select {grain} from {table.fullname} group by all having count(*) > 1"
            assert query(twins) == [], table


def test_an_edge_of_the_star_leads_to_one_row_of_a_dimension_and_no_table_stands_alone() -> None:
    marts = {model.name: model for model in models() if model.layer == "marts"}
    for edge in edges():
        theirs = tuple(theirs for _, theirs in edge.equal)
        start = edge.within[1:2]  # the first bound of a range tells rows apart, too
        assert theirs + start == marts[edge.dimension].grain
        ours = {ours for ours, _ in edge.equal} | set(edge.within[:1])
        assert ours <= column_comments()[marts[edge.fact].table].keys()
    assert {name for edge in edges() for name in (edge.fact, edge.dimension)} == marts.keys()

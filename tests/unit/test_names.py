"""What schemas are called in a database: the prefix stands in SQL, and in nothing that only looks so."""

from __future__ import annotations

import pytest
import sqlglot
from sqlglot import exp

from faletl.models.catalogue import checks, models, translate
from faletl.warehouse.names import prefixed


@pytest.mark.parametrize(
    ("sql", "expected"),
    {
        "select * from raw.usage": "select * from fal_raw.usage",
        "insert into ops.loads (raw) select 1": "insert into fal_ops.loads (raw) select 1",
        'select marts.dim_unit."unit"': 'select fal_marts.dim_unit."unit"',
        "select 'raw.usage', 'it''s ops.loads'": "select 'raw.usage', 'it''s ops.loads'",
        'select 1 as "raw.usage" from raw.usage': 'select 1 as "raw.usage" from fal_raw.usage',
        "-- fal's raw.usage\nselect * from ops.loads": "-- fal's raw.usage\nselect * from fal_ops.loads",
        "/* fal's ops. */ select * from ops.loads": "/* fal's ops. */ select * from fal_ops.loads",
        "select other.raw.usage from fal_raw.usage": "select other.raw.usage from fal_raw.usage",
        "comment on table ops.loads is 'fal''s; see ops.holds'; comment on table raw.usage is 'raw.'": (
            "comment on table fal_ops.loads is 'fal''s; see fal_ops.holds'; "
            "comment on table fal_raw.usage is 'raw.'"
        ),
        "COMMENT ON TABLE ops.loads IS 'see ops.holds'": (
            "COMMENT ON TABLE fal_ops.loads IS 'see fal_ops.holds'"
        ),
        "select draw.x, before_marts.x": "select draw.x, before_marts.x",
    }.items(),
)
def test_a_prefix_stands_before_our_schemas_alone(sql: str, expected: str) -> None:
    assert prefixed(sql, "fal_") == expected


@pytest.mark.parametrize("dialect", ["duckdb", "postgres"])
def test_every_statement_of_ours_reads_tables_of_the_prefix_alone(dialect: str) -> None:
    for sql in (*(model.sql for model in models()), *(check.sql for check in checks())):
        (parsed,) = sqlglot.parse(prefixed(translate(sql, dialect), "fal_"), dialect)
        assert parsed is not None
        read = {table.db for table in parsed.find_all(exp.Table)} - {""}
        assert read
        assert all(schema.startswith("fal_") for schema in read)

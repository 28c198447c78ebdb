"""The practical limit: DuckDB alone, which makes one table of record lists on disk.

    duckdb_pages.py FOLDER DATABASE

Amounts are DECIMAL(18,9), which its JSON reader fills exactly for up to fifteen digits. Nothing checks
the digits, missing pages, or the sum against fal's.
"""

import sys

import duckdb

RECORD = {
    "request_id": "varchar", "endpoint_id": "varchar", "timestamp": "timestamptz",
    "quantity": "decimal(18,9)", "output_units": "decimal(18,9)", "unit": "varchar",
    "unit_price": "decimal(18,9)", "percent_discount": "decimal(18,9)",
    "cost_subtotal": "decimal(18,9)", "cost_discount": "decimal(18,9)", "cost_total": "decimal(18,9)",
    "cost_estimate_nano_usd": "bigint", "auth_method": "varchar",
    "auth_method_structured": "struct(detail varchar, api_key_id varchar)",
}  # fmt: skip

folder, database = sys.argv[1:]
columns = ", ".join(f"\"{name}\": '{kind}'" for name, kind in RECORD.items())
with duckdb.connect(database) as connection:
    connection.execute(
        f"create table billing_events as select * from read_json('{folder}/*/records-*.json', "
        f"format = 'array', columns = {{{columns}}})"
    )

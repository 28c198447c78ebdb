"""Billing events by dlt, as its documentation advises: REST source, cursor paginator, a day at a time.

Each day is one load package that replaces the day (merge by delete-insert); Parquet files; amounts with
a decimal hint; dlt's own retries, quicker than by default. Days that are loaded are not asked for again.

    dlt_events.py URL DATABASE FIRST_DAY DAYS
"""

import os
import sys
from datetime import date, timedelta

os.environ |= {
    "RUNTIME__DLTHUB_TELEMETRY": "false",
    "RUNTIME__REQUEST_MAX_ATTEMPTS": "6",
    "RUNTIME__REQUEST_BACKOFF_FACTOR": "0.1",
    "EXTRACT__WORKERS": "4",
    "NORMALIZE__WORKERS": "2",
}

import dlt
from dlt.sources.rest_api import rest_api_source

AMOUNTS = (
    "quantity", "output_units", "unit_price", "percent_discount", "cost_subtotal", "cost_discount",
    "cost_total",
)  # fmt: skip


def day_of(url, day, table, selector, amounts, params, steps):
    """The source of one day of a resource, which replaces that day."""
    return rest_api_source(
        {
            "client": {
                "base_url": url,
                "headers": {"Authorization": "Key sandbox-full:not-a-secret"},
                "paginator": {
                    "type": "cursor",
                    "cursor_path": "next_cursor",
                    "cursor_param": "cursor",
                },
            },
            "resources": [
                {
                    "name": table,
                    "write_disposition": {"disposition": "merge", "strategy": "delete-insert"},
                    "merge_key": "day",
                    "max_table_nesting": 0,
                    "columns": {
                        name: {"data_type": "decimal", "precision": 38, "scale": 12} for name in amounts
                    },
                    "endpoint": {
                        "path": f"models/{table.replace('_', '-')}",
                        "data_selector": selector,
                        "params": {
                            "start": f"{day}T00:00:00Z",
                            "end": f"{day + timedelta(days=1)}T00:00:00Z",
                            **params,
                        },
                    },
                    "processing_steps": [steps],
                }
            ],
        },
        name="fal",
    )


def pipeline_to(database):
    """Into a DuckDB file."""
    return dlt.pipeline(
        "fal",
        destination=dlt.destinations.duckdb(database),
        dataset_name="fal",
        pipelines_dir=f"{database}.pipelines",
    )


def events_of(url, day):
    """The source of one day."""

    def with_day(row):
        row["day"] = str(day)
        return row

    return day_of(
        url, day, "billing_events", "billing_events", AMOUNTS, {"limit": 10000}, {"map": with_day}
    )


def main():
    """Load what is not loaded yet."""
    url, database, first, days = sys.argv[1:]
    pipeline = pipeline_to(database)
    pipeline.run()  # what an earlier process left
    loaded = set()
    if pipeline.default_schema_name and "billing_events" in pipeline.default_schema.tables:
        with pipeline.sql_client() as client:
            found = client.execute_sql("select distinct day from billing_events")
            loaded = {row[0] for row in found}
    for number in range(int(days)):
        day = date.fromisoformat(first) + timedelta(days=number)
        if str(day) not in loaded:
            pipeline.run(events_of(url, day), loader_file_format="parquet")


if __name__ == "__main__":
    main()

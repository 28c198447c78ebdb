"""Hourly usage by dlt, as its documentation advises: REST source, cursor paginator, a day at a time.

Each day is one load package that replaces the day (merge by delete-insert); Parquet files; amounts with
a decimal hint. A bucket of results becomes a row for each.

    dlt_usage.py URL DATABASE FIRST_DAY DAYS
"""

import os
import sys
from datetime import date, timedelta

os.environ |= {
    "RUNTIME__DLTHUB_TELEMETRY": "false",
    "EXTRACT__WORKERS": "4",
    "NORMALIZE__WORKERS": "2",
}

import dlt
from dlt.sources.rest_api import rest_api_source

AMOUNTS = (
    "quantity", "unit_price", "percent_discount", "cost_subtotal", "cost_discount", "cost_total", "cost",
)  # fmt: skip


def usage_of(url, day):
    """The source of one day."""

    def rows_of(bucket):
        for row in bucket["results"]:
            structured = row.pop("auth_method_structured")
            yield {
                **row,
                "day": str(day),
                "bucket": bucket["bucket"],
                "api_key_id": structured["api_key_id"],
            }

    return rest_api_source(
        {
            "client": {
                "base_url": url,
                "headers": {"Authorization": "Key bench:not-a-secret"},
                "paginator": {
                    "type": "cursor",
                    "cursor_path": "next_cursor",
                    "cursor_param": "cursor",
                },
            },
            "resources": [
                {
                    "name": "usage",
                    "write_disposition": {"disposition": "merge", "strategy": "delete-insert"},
                    "merge_key": "day",
                    "max_table_nesting": 0,
                    "columns": {
                        name: {"data_type": "decimal", "precision": 38, "scale": 12} for name in AMOUNTS
                    },
                    "endpoint": {
                        "path": "models/usage",
                        "data_selector": "time_series",
                        "params": {
                            "start": f"{day}T00:00:00Z",
                            "end": f"{day + timedelta(days=1)}T00:00:00Z",
                            "timeframe": "hour",
                            "expand": "time_series",
                        },
                    },
                    "processing_steps": [{"yield_map": rows_of}],
                }
            ],
        },
        name="fal",
    )


url, database, first, days = sys.argv[1:]
pipeline = dlt.pipeline(
    "fal",
    destination=dlt.destinations.duckdb(database),
    dataset_name="fal",
    pipelines_dir=f"{database}.pipelines",
)
for number in range(int(days)):
    day = date.fromisoformat(first) + timedelta(days=number)
    pipeline.run(usage_of(url, day), loader_file_format="parquet")

"""Hourly usage by dlt, tuned as in dlt_rest.py: a bucket of results becomes a row for each.

dlt_usage.py URL DATABASE FIRST_DAY DAYS
"""

import sys
from datetime import date, timedelta

from dlt_rest import day_of, pipeline_to

AMOUNTS = (
    "quantity", "unit_price", "percent_discount", "cost_subtotal", "cost_discount", "cost_total", "cost",
)  # fmt: skip


def usage_of(url, day):
    """Return the source of one day."""

    def rows_of(bucket):
        for row in bucket["results"]:
            structured = row.pop("auth_method_structured")
            yield {
                **row,
                "day": str(day),
                "bucket": bucket["bucket"],
                "api_key_id": structured["api_key_id"],
            }

    params = {"timeframe": "hour", "expand": "time_series"}
    return day_of(url, day, "usage", "time_series", AMOUNTS, params, {"yield_map": rows_of})


url, database, first, days = sys.argv[1:]
pipeline = pipeline_to(database)
for number in range(int(days)):
    day = date.fromisoformat(first) + timedelta(days=number)
    pipeline.run(usage_of(url, day), loader_file_format="parquet")

"""A day of billing events with dlt, tuned by an expert: own requests, Arrow, Parquet files, merge.

dlt_arrow_events.py URL DATABASE DAY
"""

import json
import os
import sys
from datetime import date, timedelta
from decimal import Decimal

os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"

import dlt
import httpx
import pyarrow as pa

AMOUNTS = (
    "quantity", "output_units", "unit_price", "percent_discount", "cost_subtotal", "cost_discount",
    "cost_total",
)  # fmt: skip
SCHEMA = pa.schema(
    [
        ("request_id", pa.string()), ("endpoint_id", pa.string()), ("timestamp", pa.string()),
        *((name, pa.decimal128(38, 12)) for name in AMOUNTS),
        ("unit", pa.string()), ("cost_estimate_nano_usd", pa.int64()), ("auth_method", pa.string()),
        ("api_key_id", pa.string()), ("day", pa.string()),
    ]
)  # fmt: skip


@dlt.resource(
    name="billing_events",
    write_disposition={"disposition": "merge", "strategy": "delete-insert"},
    merge_key="day",
)
def events_of(url, day):
    """Yield the pages of the day as Arrow tables."""
    params = {"start": f"{day}T00:00:00Z", "end": f"{day + timedelta(days=1)}T00:00:00Z", "limit": 10000}
    with httpx.Client(headers={"Authorization": "Key bench:not-a-secret"}, timeout=60) as client:
        while True:
            text = client.get(f"{url}/models/billing-events", params=params).raise_for_status().content
            body = json.loads(text, parse_float=Decimal)
            for row in body["billing_events"]:
                row["day"] = str(day)
                row["api_key_id"] = row["auth_method_structured"].get("api_key_id")
            yield pa.Table.from_pylist(body["billing_events"], schema=SCHEMA)
            if not body["has_more"]:
                return
            params["cursor"] = body["next_cursor"]


url, database, day = sys.argv[1:]
dlt.pipeline(
    "fal",
    destination=dlt.destinations.duckdb(database),
    dataset_name="fal",
    pipelines_dir=f"{database}.pipelines",
).run(events_of(url, date.fromisoformat(day)), loader_file_format="parquet")

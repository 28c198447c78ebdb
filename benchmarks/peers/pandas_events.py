"""A day of billing events with a good pandas script: exact amounts, one transaction.

pandas_events.py URL DATABASE DAY
"""

import json
import sys
from datetime import date, timedelta
from decimal import Decimal

import duckdb
import httpx
import pandas as pd

AMOUNTS = (
    "quantity", "output_units", "unit_price", "percent_discount", "cost_subtotal", "cost_discount",
    "cost_total",
)  # fmt: skip
url, database, day = sys.argv[1], sys.argv[2], date.fromisoformat(sys.argv[3])
params = {"start": f"{day}T00:00:00Z", "end": f"{day + timedelta(days=1)}T00:00:00Z", "limit": 10000}
frames = []
with httpx.Client(headers={"Authorization": "Key bench:not-a-secret"}, timeout=60) as client:
    while True:
        answer = client.get(f"{url}/models/billing-events", params=params).raise_for_status()
        body = json.loads(answer.content, parse_float=Decimal)
        frame = pd.DataFrame.from_records(body["billing_events"])
        frame["api_key_id"] = [
            method.get("api_key_id") for method in frame.pop("auth_method_structured")
        ]
        frames.append(frame.astype(dict.fromkeys(AMOUNTS, str)))
        if not body["has_more"]:
            break
        params["cursor"] = body["next_cursor"]
events = pd.concat(frames, ignore_index=True)
amounts = ", ".join(f"try_cast({name} as decimal(38, 12)) as {name}" for name in AMOUNTS)
with duckdb.connect(database) as warehouse:
    warehouse.execute(
        f"create table billing_events as select * replace ({amounts}, cast(timestamp as timestamptz) as "
        "timestamp) from events"
    )

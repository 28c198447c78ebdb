"""Billing events with a careful script: httpx, retries, exact amounts, a transaction per day.

It tries a request again after network errors, 429 and 5xx, follows cursors while fal sends has_more, and
replaces a day in one transaction. Loaded days are not fetched again.

    httpx_events.py URL DATABASE FIRST_DAY DAYS
"""

import json
import sys
import time
from datetime import date, timedelta
from decimal import Decimal

import duckdb
import httpx
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("day", pa.string()), ("request_id", pa.string()), ("endpoint_id", pa.string()),
        ("timestamp", pa.string()), ("quantity", pa.decimal128(38, 12)),
        ("cost_total", pa.decimal128(38, 12)),
    ]
)  # fmt: skip


def page(client, params):
    """Return one page, after at most six attempts."""
    for attempt in range(6):
        try:
            answer = client.get("/models/billing-events", params=params)
            if answer.status_code != 429 and answer.status_code < 500:
                break
        except httpx.TransportError:
            if attempt == 5:
                raise
        time.sleep(0.1 * 2**attempt)
    answer.raise_for_status()
    return json.loads(answer.text, parse_float=Decimal, parse_int=Decimal)


def rows_of(client, day):
    """Return all charges of a day."""
    params = {
        "start": f"{day}T00:00:00Z",
        "end": f"{day + timedelta(days=1)}T00:00:00Z",
        "limit": 10000,
    }
    rows = []
    while True:
        body = page(client, params)
        rows += body.get("billing_events", [])
        if not body.get("has_more"):
            return rows
        params["cursor"] = body["next_cursor"]


def main():
    """Load the missing days."""
    url, database, first, days = sys.argv[1:]
    names = ", ".join(SCHEMA.names)
    headers = {"Authorization": "Key sandbox-full:not-a-secret"}
    with (
        duckdb.connect(database) as warehouse,
        httpx.Client(base_url=url, headers=headers, timeout=30) as client,
    ):
        warehouse.execute(
            "create table if not exists billing_events (day varchar, request_id varchar, endpoint_id "
            "varchar, timestamp varchar, quantity decimal(38, 12), cost_total decimal(38, 12))"
        )
        rows_loaded = warehouse.execute("select distinct day from billing_events").fetchall()
        loaded = {row[0] for row in rows_loaded}
        for number in range(int(days)):
            day = date.fromisoformat(first) + timedelta(days=number)
            if str(day) in loaded:
                continue
            rows = [{**row, "day": str(day)} for row in rows_of(client, day)]
            new = pa.Table.from_pylist(rows, schema=SCHEMA)  # noqa: F841  # DuckDB finds it by its name
            warehouse.execute("begin")
            warehouse.execute("delete from billing_events where day = ?", [str(day)])
            warehouse.execute(f"insert into billing_events select {names} from new")
            warehouse.execute("commit")


if __name__ == "__main__":
    main()

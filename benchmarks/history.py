"""What a full build of a long history costs.

    python -m benchmarks.history --days 100 --rows 100000

The warehouse is filled by SQL with charges and usage as loads leave them; `faletl build --full` is a
process of its own, with the memory that is set by default.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa

from benchmarks import ours
from benchmarks.measure import faletl, figures, spent, tell
from faletl.config import Settings
from faletl.warehouse import Lease, open_warehouse
from faletl.warehouse.tables import LOADS, RAW, WAREHOUSE

KEYS = 7
ENDPOINTS = 50

_EVENTS = """
    with numbers as (select unnest(range({rows})) as i)
    select
        '{account}' as _account, '{load_id}' as _load_id, i // 10000 + 1 as _page, i % 10000 + 1 as _row,
        md5('{day}' || i) as _hash, 1 as _ordinal, 'req-{day}-' || i || '-6f1c-4a27-9f0e' as request_id,
        'bench/endpoint-' || lpad(cast(i % {endpoints} as varchar), 2, '0') as endpoint_id,
        timestamptz '{day} 00:00:00Z'
            + to_microseconds(cast(i as bigint) * 86400000000 // {rows}) as "timestamp",
        cast(1 + i % 7 as decimal(38, 12)) as quantity, 'images' as unit,
        cast(0.025 as decimal(38, 12)) as unit_price,
        cast(0.025 * (1 + i % 7) as decimal(38, 12)) as cost_subtotal,
        cast(0 as decimal(38, 12)) as cost_discount,
        cast(0.025 * (1 + i % 7) as decimal(38, 12)) as cost_total,
        25000000 * (1 + i % 7) as cost_estimate_nano_usd, 'prod' as auth_method, 'prod' as auth_detail,
        'key-' || i % {keys} as api_key_id
    from numbers
"""

_USAGE = """
    select
        '{account}' as _account, '{load_id}' as _load_id, 1 as _page, row_number() over () as _row,
        date_trunc('hour', "timestamp") as bucket, endpoint_id, unit, sum(quantity) as quantity,
        unit_price, sum(cost_subtotal) as cost_subtotal, cast(0 as decimal(38, 12)) as cost_discount,
        sum(cost_total) as cost_total, sum(cost_total) as cost, 'USD' as currency, auth_method,
        auth_detail, api_key_id
    from raw.billing_events
    where "timestamp" >= timestamptz '{day} 00:00:00Z' and "timestamp" < timestamptz '{next} 00:00:00Z'
    group by all
"""


def fill(settings: Settings, account: str, first: date, days: int, rows: int) -> None:
    """So many charges on each of so many days, their usage by hour, and their lines in the ledger."""
    with open_warehouse(settings).lease("a benchmark") as lease:
        for number in range(days):
            _fill_day(lease, account, first + timedelta(days=number), rows)


def _fill_day(lease: Lease, account: str, day: date, rows: int) -> None:
    connection, start = lease.connection, datetime.combine(day, datetime.min.time(), UTC)
    with lease.transaction():
        version = connection.execute(
            sa.update(WAREHOUSE)
            .values(data_version=WAREHOUSE.c.data_version + 1)
            .returning(WAREHOUSE.c.data_version)
        ).scalar_one()
        for resource, query in (("billing_events", _EVENTS), ("usage", _USAGE)):
            load_id = f"{day:%Y%m%d}T000000000000Z-{'000001' if resource == 'usage' else '000002'}"
            select = query.format(
                account=account, load_id=load_id, day=day, next=day + timedelta(days=1), rows=rows,
                endpoints=ENDPOINTS, keys=KEYS,
            )  # fmt: skip
            connection.exec_driver_sql(f"insert into raw.{resource} by name {select}")
            held = sa.select(sa.func.count(), sa.func.sum(RAW[resource].c.cost_total)).where(
                RAW[resource].c["_load_id"] == load_id
            )
            count, cost = connection.execute(held).one()
            read_at = start + timedelta(days=2)
            connection.execute(
                sa.insert(LOADS).values(
                    load_id=load_id,
                    run_id="bench",
                    account=account,
                    resource=resource,
                    window_start=start,
                    window_end=start + timedelta(days=1),
                    pages=-(-count // 10_000),
                    rows=count,
                    cost_total=cost,
                    digest="0" * 64,
                    dropped_rows=0,
                    doubtful_rows=0,
                    rounded_amounts=0,
                    quarantined_rows=0,
                    fencing_token=lease.token,
                    last_fencing_token=lease.token,
                    last_load_id=load_id,
                    landing_path="bench",
                    proof="summary",
                    read_at=read_at,
                    last_read_at=read_at,
                    loaded_at=read_at,
                    is_current=True,
                    is_provisional=False,
                    is_settled=True,
                    data_version=version,
                )
            )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--days", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100_000, help="charges of each day")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        environment = ours.environment("http://127.0.0.1:9", Path(name))
        settings = Settings.isolated(warehouse=environment["FALETL_WAREHOUSE"])
        fill(settings, environment["FALETL_ACCOUNT"], date(2026, 1, 1), asked.days, asked.rows)
        built = spent(faletl("build", "--full"), environment)
    tell([{"work": "build --full", "days": asked.days, "rows a day": asked.rows, **figures(built)}])


if __name__ == "__main__":
    main()

"""The cost of a long history: one more day, the same day again, builds, and a dashboard's queries.

    python -m benchmarks.history 5000000 50000000

SQL fills the warehouse with charges and usage as loads do, 100,000 charges per day, and it is built
once in full; a plain copy of charges and usage is measured for comparison. Then five more days come
from a server, one run each; each day is fetched again, unchanged; a hundred queries run on the
published copy. Each command is its own process, with the default memory limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import sqlalchemy as sa

from benchmarks import ours
from benchmarks.account import serving, write_pages
from benchmarks.measure import ROUNDS, Spent, faletl, figures, median, print_results, spent
from faletl.config import Settings
from faletl.warehouse import open_warehouse
from faletl.warehouse.protocol import Lease
from faletl.warehouse.tables import LOADS, RAW, WAREHOUSE
from tests.feed import Feed

KEYS = 7
ENDPOINTS = 50
A_DAY = 100_000
NEXT = date(2026, 11, 1)

# Each runs over many ranges of days; their first columns are what dashboards group by.
QUERIES = (
    (
        "select usage_date, sum(cost_total) from reports.rpt_spend_daily "
        "where usage_date >= date '{since}' group by usage_date order by usage_date"
    ),
    (
        "select endpoint_id, sum(cost_total) as cost from reports.rpt_spend_daily "
        "where usage_date >= date '{since}' group by endpoint_id order by cost desc limit 10"
    ),
    (
        "select unit, sum(quantity), sum(cost_total) from reports.rpt_spend_daily "
        "where usage_date >= date '{since}' group by unit"
    ),
    (
        "select credential_label, sum(cost_total) from reports.rpt_spend_by_credential "
        "where usage_date >= date '{since}' group by credential_label"
    ),
    (
        "select usage_month, endpoint_id, cost_total, cost_change from reports.rpt_spend_monthly "
        "where usage_month >= date '{since}' order by usage_month, cost_total desc"
    ),
)
QUERY_COUNT = 100

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


_COPY = """
import duckdb
with duckdb.connect({copy!r}, config={{"memory_limit": {memory!r}}}) as connection:
    connection.execute("attach {warehouse!r} as warehouse (read_only)")
    for table in ("billing_events", "usage"):
        connection.execute(f"create table {{table}} as select * from warehouse.raw.{{table}}")
"""


def fill(settings: Settings, account: str, first: date, days: int, rows: int) -> None:
    """Add `rows` charges on each of `days` days, their usage by hour, and their rows in the ledger."""
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
            totals = sa.select(sa.func.count(), sa.func.sum(RAW[resource].c.cost_total)).where(
                RAW[resource].c["_load_id"] == load_id
            )
            count, cost = connection.execute(totals).one()
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


def measured(rows: int) -> list[dict[str, Any]]:
    """Return the results for a history of `rows` charges."""
    days = rows // A_DAY
    feed = Feed(NEXT, ROUNDS, A_DAY)
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        folder = Path(name)
        write_pages(feed, folder / "pages")
        with serving(folder / "pages") as url:
            environment = ours.environment(url, folder)
            settings = Settings.isolated(warehouse=environment["FALETL_WAREHOUSE"])
            fill(settings, environment["FALETL_ACCOUNT"], NEXT - timedelta(days=days), days, A_DAY)
            copy = {"copy": f"{folder / 'copy.duckdb'}", "memory": settings.memory}
            code = _COPY.format(warehouse=f"{folder / 'warehouse.duckdb'}", **copy)
            results = {
                "build --full": [spent(faletl("build", "--full"), environment)],
                "plain copy": [spent([sys.executable, "-c", code])],
            }
            Path(copy["copy"]).unlink()
            spent(faletl("publish"), environment)
            for number in range(ROUNDS):
                day_results = _one_more_day(feed.day(number), environment)
                for work, figure in day_results.items():
                    results.setdefault(work, []).append(figure)
        lines = [{"work": work, **figures(median(runs))} for work, runs in results.items()]
        lines.append(dashboard(folder / "spend.duckdb"))
        return [{"charges": rows, **line} for line in lines]


def _one_more_day(day: date, environment: dict[str, str]) -> dict[str, Spent]:
    loaded = ours.run(day, environment, builds=False)
    before = _version(environment)
    built, published = (spent(faletl(step), environment) for step in ("build", "publish"))
    again = ours.run(day, environment)
    assert before == _version(environment), "an unchanged day changed the data version"
    return {
        "one more day": loaded + built + published, "its load": loaded, "its build": built,
        "its publishing": published, "the day again": again,
    }  # fmt: skip


def _version(environment: dict[str, str]) -> int:
    url = environment["FALETL_WAREHOUSE"].removeprefix("duckdb:///")
    with duckdb.connect(url, read_only=True) as connection:
        row = connection.execute("select data_version from ops.warehouse").fetchone()
    assert row is not None
    return int(row[0])


def dashboard(path: Path) -> dict[str, Any]:
    """Measure a hundred queries on a warm connection, as of a tool that keeps it open."""
    taken = []
    with duckdb.connect(str(path), read_only=True) as connection:
        for number in range(-len(QUERIES), QUERY_COUNT):
            since = NEXT - timedelta(days=7 * max(number, 0))
            began = time.perf_counter()
            connection.execute(QUERIES[number % len(QUERIES)].format(since=since)).fetchall()
            if number >= 0:
                taken.append(1000 * (time.perf_counter() - began))
    cuts = statistics.quantiles(taken, n=20)
    return {
        "work": f"{QUERY_COUNT} queries", "p50_ms": round(statistics.median(taken), 1),
        "p95_ms": round(cuts[-1], 1), "most_ms": round(max(taken), 1),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=int, nargs="+", help="charges in the history")
    arguments = parser.parse_args()
    print_results([line for rows in arguments.rows for line in measured(rows)])


if __name__ == "__main__":
    main()

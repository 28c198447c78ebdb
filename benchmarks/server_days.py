"""The cost of one more day on PostgreSQL, by the length of the history; COPY and SQLAlchemy's insert.

    python -m benchmarks.server_days --rows 100000 --days 50 500

On a private server, a table of charges is filled for each number of days; then the last day is
replaced as a load does it (delete, COPY), five times. For comparison, SQLAlchemy's bulk insert adds
the same rows. With --indexes, each kind of index over days is measured. The figures are wall
seconds, as most of the work is the server's; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import sqlalchemy as sa

from benchmarks.measure import ROUNDS, print_results
from faletl.config import Settings
from faletl.duck import quoted
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import RAW
from tests.servers import shared_postgres

TABLE = RAW["billing_events"]
INDEXES = {
    "ours": "create index days on raw.billing_events (timestamp)",
    "none": None,
    "brin": "create index days on raw.billing_events using brin (timestamp)",
}
LAST = date(2026, 11, 1)


def measured(days: int, rows: int, indexes: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the results for a table of `days` days."""
    settings = Settings.isolated(warehouse=shared_postgres().new_database(f"days_{days}"))
    day, warehouse = folder / "day.parquet", open_warehouse(settings)
    with warehouse.lease("a benchmark") as lease:
        connection = lease.connection
        connection.exec_driver_sql("drop index raw.billing_events_timestamp")
        connection.commit()

        def copy() -> None:
            warehouse.load_rows(connection, TABLE, quoted(day), folder)

        def insert() -> None:
            connection.execute(sa.insert(TABLE), values)

        for number in range(days):
            write_day(day, LAST - timedelta(number), rows)
            with connection.begin():
                copy()
        write_day(day, LAST, rows)
        values = [dict(row) for row in _read(day)]
        for name in indexes:
            if index := INDEXES[name]:
                connection.exec_driver_sql(index)
                connection.commit()
            with psycopg.connect(settings.warehouse, autocommit=True) as settled:
                settled.execute("vacuum (analyze) raw.billing_events")
            size = connection.exec_driver_sql(
                "select pg_relation_size(to_regclass('raw.days'))"
            ).scalar()
            connection.commit()
            line = {"charges": rows * days, "index": name, "index_mib": round((size or 0) / 2**20, 1)}
            yield {**line, "how": "COPY", **replaced(connection, copy)}
            if name == indexes[0]:
                yield {**line, "how": "SQLAlchemy bulk insert", **replaced(connection, insert)}
            connection.exec_driver_sql("drop index if exists raw.days")
            connection.commit()


def replaced(connection: sa.Connection, fill: Callable[[], None]) -> dict[str, float]:
    """Return the seconds to delete and fill the last day, and to fill it only: medians."""
    seconds, fill_seconds = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        with connection.begin():
            since = datetime(LAST.year, LAST.month, LAST.day, tzinfo=UTC)
            connection.execute(sa.delete(TABLE).where(TABLE.c.timestamp >= since))
            deleted = time.perf_counter()
            fill()
            fill_seconds.append(time.perf_counter() - deleted)
        seconds.append(time.perf_counter() - began)
    return {
        "wall_s": round(statistics.median(seconds), 2),
        "fill_s": round(statistics.median(fill_seconds), 2),
    }  # fmt: skip


def write_day(path: Path, day: date, rows: int) -> None:
    """Write the charges of a day, as staging writes them."""
    values = {
        "_account": "'acme'",
        "_load_id": f"'{day}'",
        "_page": "1",
        "_row": "i",
        "_hash": "md5(i::varchar)",
        "_ordinal": "1",
        "timestamp": f"timestamptz '{day} 00:00:00Z' + to_microseconds(i * {86_400_000_000 // rows})",
        "request_id": "uuid()::varchar",
        "endpoint_id": "'fal-ai/flux/' || i % 50",
        "quantity": "i % 7",
        "unit": "'images'",
        "unit_price": "0.025",
        "cost_total": "0.025 * (i % 7)",
    }
    columns = ", ".join(f'{values.get(c.name, "null")} as "{c.name}"' for c in TABLE.columns)
    with duckdb.connect() as engine:
        engine.execute(f"copy (select {columns} from range({rows}) t(i)) to '{path}' (format parquet)")


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with duckdb.connect() as engine:
        result = engine.execute(f"from '{path}'")
        names = [column[0] for column in result.description or ()]
        yield from (dict(zip(names, row, strict=True)) for row in result.fetchall())


def main() -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="charges per day")
    parser.add_argument(
        "--days", type=int, nargs="+", default=[50, 500], help="days in the table before"
    )
    parser.add_argument("--indexes", action="store_true", help="try each kind of index over days")
    arguments = parser.parse_args()
    indexes = list(INDEXES) if arguments.indexes else ["ours"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print_results(
            [line for days in arguments.days for line in measured(days, arguments.rows, indexes, folder)]
        )


if __name__ == "__main__":
    main()

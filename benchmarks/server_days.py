"""What one more day costs on PostgreSQL, by the index over days: `server_days.py ROWS_A_DAY DAYS…`.

For each number of days a table of charges is filled on a private server; then the last day is replaced
as a load does it (delete, COPY, count), five times, with each kind of index. Prints medians of wall
seconds, and what the index takes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import psycopg
import sqlalchemy as sa

from faletl.config import Settings
from faletl.warehouse import Warehouse, open_warehouse, quoted
from faletl.warehouse.tables import RAW
from tests.servers import shared_postgres

TABLE = RAW["billing_events"]
INDEXES = {
    "none": None,
    "brin": "create index days on raw.billing_events using brin (timestamp)",
    "btree": "create index days on raw.billing_events (timestamp)",
}
LAST = date(2026, 11, 1)


def main() -> None:
    """Measure and print."""
    rows, *many = (int(word) for word in sys.argv[1:])
    print(f"{'rows':>12} {'index':>6} {'index MiB':>10} {'fill s':>8} {'a day s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for days in many:
            settings = Settings.isolated(warehouse=shared_postgres().new_database(f"days_{days}"))
            day = Path(folder) / "day.parquet"
            warehouse = open_warehouse(settings)
            with warehouse.lease("a benchmark") as lease:
                connection = lease.connection
                connection.exec_driver_sql("drop index raw.billing_events_timestamp")
                connection.commit()
                began = time.perf_counter()
                for number in range(days):
                    write_day(day, LAST - timedelta(number), rows)
                    with connection.begin():
                        warehouse.take_in(connection, TABLE, quoted(day), day.parent)
                filled = time.perf_counter() - began
                write_day(day, LAST, rows)
                for name, index in INDEXES.items():
                    if index:
                        connection.exec_driver_sql(index)
                        connection.commit()
                    with psycopg.connect(settings.warehouse, autocommit=True) as settled:
                        settled.execute("vacuum (analyze) raw.billing_events")
                    taken = statistics.median(replaced(warehouse, connection, day) for _ in range(5))
                    found = connection.exec_driver_sql(
                        "select pg_relation_size(to_regclass('raw.days'))"
                    )
                    size = (found.scalar() or 0) / 2**20
                    print(f"{rows * days:>12,} {name:>6} {size:>10.1f} {filled:>8.1f} {taken:>8.2f}")
                    connection.exec_driver_sql("drop index if exists raw.days")
                    connection.commit()


def replaced(warehouse: Warehouse, connection: sa.Connection, day: Path) -> float:
    """Seconds that it takes to delete the last day and to copy it in."""
    began = time.perf_counter()
    with connection.begin():
        connection.execute(
            sa.delete(TABLE).where(TABLE.c.timestamp >= datetime(2026, 11, 1, tzinfo=UTC))
        )
        warehouse.take_in(connection, TABLE, quoted(day), day.parent)
    return time.perf_counter() - began


def write_day(path: Path, day: date, rows: int) -> None:
    """Charges of a day, as staging would leave them."""
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


if __name__ == "__main__":
    main()

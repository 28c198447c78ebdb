"""Read what is published, again and again until stdin ends: `reading_on URL [PAUSE [patiently]]`.

Prints, as JSON, how often it looked and whatever was not as it must be: an error, sums of the layers
that differ, another answer within one transaction, or an older state than was seen before. Who is
patient does not mind that nothing is there, or that a server is away.
"""

from __future__ import annotations

import json
import select
import sys
from pathlib import Path
from typing import Any

import duckdb
import psycopg

SUMS = (
    "select (select coalesce(sum(cost_total), 0) from marts.fct_usage), "
    "(select coalesce(sum(cost_total), 0) from reports.rpt_spend_daily), "
    "(select coalesce(sum(cost_total), 0) from reports.rpt_spend_monthly), "
    "(select count(*) from marts.dim_unit), "
    "(select coalesce(max(data_version), 0) from ops.builds)"
)


def main() -> None:
    """See the module."""
    url, rounds, wrong, newest = sys.argv[1], 0, list[str](), 0
    pause = float(sys.argv[2]) if len(sys.argv) > 2 else 0
    is_patient = "patiently" in sys.argv
    while not select.select([sys.stdin], [], [], pause)[0]:
        try:
            with opened(url) as connection:
                answers = [connection.execute(SUMS).fetchall() for _ in range(2)]
        except (duckdb.Error, psycopg.Error) as error:
            if is_patient and is_away(url, error):
                continue
            wrong.append(repr(error))
            break
        rounds += 1
        ((*spent, units, version),) = answers[0]
        if answers[0] != answers[1] or len(set(spent)) != 1 or not units or version < newest:
            wrong.append(str(answers))
        newest = version
    print(json.dumps([rounds, wrong]))


def is_away(url: str, error: Exception) -> bool:
    """Whether there is nothing yet to read, or nobody who answers."""
    if not url.startswith("postgresql:"):
        return not Path(url).exists()
    return isinstance(error, (psycopg.OperationalError, psycopg.errors.UndefinedTable))


def opened(url: str) -> Any:
    """A new connection of a reader; on a server, with one state for all that it asks."""
    if not url.startswith("postgresql:"):
        return duckdb.connect(url, read_only=True)
    connection = psycopg.connect(url)
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    return connection


if __name__ == "__main__":
    main()

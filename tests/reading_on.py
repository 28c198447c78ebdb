"""Read what is published, again and again until stdin ends: `reading_on URL`, for tests of runs.

Prints, as JSON, how often it looked and whatever was not as it must be: an error, sums of the layers
that differ, or another answer within one transaction.
"""

from __future__ import annotations

import json
import select
import sys
from typing import Any

import duckdb
import psycopg

SUMS = (
    "select (select coalesce(sum(cost_total), 0) from marts.fct_usage), "
    "(select coalesce(sum(cost_total), 0) from reports.rpt_spend_daily), "
    "(select coalesce(sum(cost_total), 0) from reports.rpt_spend_monthly), "
    "(select count(*) from marts.dim_unit)"
)


def main() -> None:
    """See the module."""
    url, rounds, wrong = sys.argv[1], 0, list[str]()
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            with opened(url) as connection:
                answers = [connection.execute(SUMS).fetchall() for _ in range(2)]
        except (duckdb.Error, psycopg.Error) as error:
            wrong.append(repr(error))
            break
        rounds += 1
        ((*spent, units),) = answers[0]
        if answers[0] != answers[1] or len(set(spent)) != 1 or not units:
            wrong.append(str(answers))
    print(json.dumps([rounds, wrong]))


def opened(url: str) -> Any:
    """A new connection of a reader; on a server, with one state for all that it asks."""
    if not url.startswith("postgresql:"):
        return duckdb.connect(url, read_only=True)
    connection = psycopg.connect(url)
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    return connection


if __name__ == "__main__":
    main()

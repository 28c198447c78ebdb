"""Billing events by dlt, as its documentation advises: REST source, cursor paginator, a day at a time.

Each day is one load package that replaces the day (merge by delete-insert); Parquet files; amounts with
a decimal hint; dlt's own retries, quicker than by default. Loaded days are not fetched again.

    dlt_events.py URL DATABASE FIRST_DAY DAYS
"""

import sys
from datetime import date, timedelta

from dlt_rest import day_of, pipeline_to

AMOUNTS = (
    "quantity", "output_units", "unit_price", "percent_discount", "cost_subtotal", "cost_discount",
    "cost_total",
)  # fmt: skip


def events_of(url, day):
    """Return the source of one day."""

    def with_day(row):
        row["day"] = str(day)
        return row

    return day_of(
        url, day, "billing_events", "billing_events", AMOUNTS, {"limit": 10000}, {"map": with_day}
    )


def main():
    """Load the missing days."""
    url, database, first, days = sys.argv[1:]
    pipeline = pipeline_to(database)
    pipeline.run()  # finish the work of an earlier process
    loaded = set()
    if pipeline.default_schema_name and "billing_events" in pipeline.default_schema.tables:
        with pipeline.sql_client() as client:
            result = client.execute_sql("select distinct day from billing_events")
            loaded = {row[0] for row in result}
    for number in range(int(days)):
        day = date.fromisoformat(first) + timedelta(days=number)
        if str(day) not in loaded:
            pipeline.run(events_of(url, day), loader_file_format="parquet")


if __name__ == "__main__":
    main()

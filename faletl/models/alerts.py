"""Alerts for new rows of a report."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from faletl.money import plain
from faletl.warehouse import alerts

MAX_NAMED_RUNAWAYS = 5
"""A build logs at most this many new runaway charges individually."""

_RUNAWAYS = "reports.rpt_runaway_requests"


_RUNAWAY_KEY = ("account", "event_hash", "event_ordinal")


KEEP_OLD_RUNAWAYS = f"create temporary table runaways_before as select * from {_RUNAWAYS}"


def new_runaways(
    connection: sa.Connection, at: datetime, *, is_first: bool
) -> tuple[int, tuple[str, ...]]:
    """Return the number of new charges in the report, and sentences about the most expensive ones.

    Each charge is an open alert as long as the report contains it.
    """
    new = connection.exec_driver_sql(
        f"select * from {_RUNAWAYS} as now {'' if is_first else _not_in('runaways_before', 'now')} "
        "order by cost_total desc, requested_at, event_hash"
    )
    new_alerts = [_runaway_alert(row) for row in new.mappings()]
    alerts.raise_all(connection, new_alerts, at)
    if not is_first:
        gone = connection.exec_driver_sql(
            f"select * from runaways_before as now {_not_in(_RUNAWAYS, 'now')}"
        )
        alerts.resolve_all(connection, [_runaway_alert(row) for row in gone.mappings()], at)
        connection.exec_driver_sql("drop table runaways_before")
    return len(new_alerts), tuple(alert.detail for alert in new_alerts[:MAX_NAMED_RUNAWAYS])


def _not_in(table: str, rows: str) -> str:
    same = " and ".join(f"{rows}.{name} = known.{name}" for name in _RUNAWAY_KEY)
    return f"where not exists (select 1 from {table} as known where {same})"


def _runaway_alert(row: sa.RowMapping) -> alerts.Alert:
    request_id = str(row["request_id"])
    return alerts.Alert(
        kind="runaway",
        account=row["account"],
        subject=request_id,
        detail=_runaway_sentence(row),
        key=(
            request_id, str(row["endpoint_id"]), row["requested_at"].isoformat(),
            plain(row["cost_total"]), str(row["event_ordinal"]),
        ),
    )  # fmt: skip


def _runaway_sentence(row: sa.RowMapping) -> str:
    usual = "and no usual cost is known"
    if row["usual_cost"] is not None:
        usual = f"where the usual cost is {row['usual_cost'].normalize():f}"
    endpoint_id, request_id = (ascii(row[name])[1:-1][:80] for name in ("endpoint_id", "request_id"))
    return (
        f"{endpoint_id} was charged {row['cost_total'].normalize():f} {row['currency']} for the "
        f"request {request_id} of {row['requested_at']:%Y-%m-%d %H:%M} UTC, {usual} "
        f"({row['reason']})"
    )

"""The state of the warehouse as data: loaded, held, quarantined, failed, restated."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import WarehouseBusyError
from faletl.money import plain
from faletl.resources import RESOURCES
from faletl.warehouse import open_warehouse
from faletl.warehouse.alerts import open_alerts
from faletl.warehouse.tables import BUILDS, FAILURES, HOLDS, LOADS, QUARANTINE, RESTATEMENTS
from faletl.windows import instant

COVERAGE = "Model APIs only: serverless and compute are not in these sums."


def status(settings: Settings) -> dict[str, Any]:
    """Return the state of the warehouse; while a run writes, that of the published copy."""
    warehouse = open_warehouse(settings)
    try:
        with warehouse.reading(wait=False) as connection:
            return status_of(connection, is_published_copy=False)
    except WarehouseBusyError:
        with warehouse.published() as connection:
            return status_of(connection, is_published_copy=True)


def status_of(connection: sa.Connection | None, *, is_published_copy: bool) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "resources": [], "failures": [], "alerts": [], "restatements": [], "last_build": None,
    }  # fmt: skip
    if connection is None:
        return {**empty, "is_published_copy": is_published_copy, "coverage": COVERAGE}
    now = datetime.now(UTC)
    failures = [
        {**row, "window_start": utc(row["window_start"]), "failed_at": utc(row["failed_at"])}
        for row in connection.execute(sa.select(FAILURES).order_by(FAILURES.c.failed_at)).mappings()
    ]
    loads = connection.execute(
        sa.select(
            LOADS.c.account,
            LOADS.c.resource,
            sa.func.max(LOADS.c.window_start).label("newest"),
            sa.func.max(LOADS.c.window_end).label("until"),
            sa.func.count().label("windows"),
            sa.func.sum(LOADS.c.rows).label("rows"),
        )
        .where(LOADS.c.is_current)
        .group_by(LOADS.c.account, LOADS.c.resource)
    )
    loaded = {(row.account, row.resource): row for row in loads}
    order = list(RESOURCES)
    quarantined, held = _quarantine_counts(connection), _held_counts(connection)
    keys = loaded.keys() | {(failure["account"], failure["resource"]) for failure in failures}
    lines = []
    for account, resource in sorted(keys, key=lambda key: (key[0], order.index(key[1]))):
        row = loaded.get((account, resource))
        open_failures = [f for f in failures if (f["account"], f["resource"]) == (account, resource)]
        lines.append(
            {
                "account": account,
                "resource": resource,
                "newest_window": utc(row.newest) if row else None,
                "loaded_until": utc(row.until) if row else None,
                "lag_seconds": max(0, int((now - row.until).total_seconds())) if row else None,
                "windows": row.windows if row else 0,
                "rows": int(row.rows) if row else 0,
                "held": held.get((account, resource), 0),
                "quarantine": quarantined.get((account, resource), 0),
                "open_failures": len(open_failures),
            }
        )
    newest = (
        connection.execute(sa.select(BUILDS).order_by(BUILDS.c.fencing_token.desc()).limit(1))
        .mappings()
        .first()
    )
    last_build = newest and {
        "build_id": newest["build_id"],
        "finished_at": utc(newest["finished_at"]),
        "days": newest["days"],
        "checks": newest["checks"],
    }
    return {
        "resources": lines,
        "failures": failures,
        "alerts": _alerts(connection),
        "restatements": _restatements(connection),
        "last_build": last_build,
        "is_published_copy": is_published_copy,
        "coverage": COVERAGE,
    }


def _quarantine_counts(connection: sa.Connection) -> dict[tuple[str, str], int]:
    """Count the open quarantined rows per account and resource."""
    rows = QUARANTINE.c
    counts = connection.execute(
        sa.select(rows.account, rows.resource, sa.func.count())
        .where(rows.resolved_at.is_(None))
        .group_by(rows.account, rows.resource)
    )
    return {(account, resource): count for account, resource, count in counts}


def _held_counts(connection: sa.Connection) -> dict[tuple[str, str], int]:
    """Count the held windows per account and resource."""
    holds = HOLDS.c
    counts = connection.execute(
        sa.select(holds.account, holds.resource, sa.func.count()).group_by(holds.account, holds.resource)
    )
    return {(account, resource): count for account, resource, count in counts}


def _alerts(connection: sa.Connection) -> list[dict[str, Any]]:
    """Return the open alerts."""
    fields = ("kind", "account", "subject", "detail")
    return [
        {"first_seen_at": utc(alert["first_seen_at"]), **{name: alert[name] for name in fields}}
        for alert in open_alerts(connection)
    ]


def _restatements(connection: sa.Connection) -> list[dict[str, Any]]:
    """Sum the changes that fal made to closed days, per account, resource and currency."""
    lines = RESTATEMENTS.c
    change = sa.func.sum(lines.cost_total_after - lines.cost_total_before)
    key = (lines.account, lines.resource, lines.currency)
    sums = connection.execute(
        sa.select(
            *key,
            sa.func.count(),
            sa.func.count(sa.distinct(lines.window_start)),
            change,
            sa.func.max(lines.seen_at),
        )
        .group_by(*key)
        .order_by(*key)
    )
    return [
        {
            "account": account,
            "resource": resource,
            "currency": currency,
            "lines": count,
            "windows": windows,
            "cost_total_change": plain(Decimal(changed)),
            "last_seen_at": utc(seen_at),
        }
        for account, resource, currency, count, windows, changed, seen_at in sums
    ]


def utc(at: datetime) -> str:
    return instant(at.replace(microsecond=0))

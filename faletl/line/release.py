"""Build and publish the loaded data; send open alerts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal

import sqlalchemy as sa

from faletl.config import Settings
from faletl.line.report import Report
from faletl.models.build import Build, build_models, has_unbuilt_rows, needs_build, resources_changed
from faletl.resources import USAGE
from faletl.warehouse import alerts, open_warehouse
from faletl.warehouse.ledger import fence
from faletl.warehouse.tables import BUILDS, LOADS

log = logging.getLogger(__name__)


def is_behind(settings: Settings) -> bool:
    """Return whether rows were loaded or quarantined since the last build."""
    with open_warehouse(settings).reading() as connection:
        return connection is not None and has_unbuilt_rows(settings, connection)


def is_news(settings: Settings, resource: str) -> bool:
    """Return whether rows of the resource were loaded or quarantined since the last build."""
    with open_warehouse(settings).reading() as connection:
        return connection is not None and resource in resources_changed(connection)


def is_published(settings: Settings, day: date) -> bool:
    """Return whether readers see all usage of that UTC day, of each account loaded in that week."""
    is_recent = sa.and_(
        LOADS.c.resource == USAGE.name,
        LOADS.c.is_current,
        LOADS.c.window_start > datetime.combine(day - timedelta(days=7), time(), UTC),
    )
    is_complete = sa.and_(
        LOADS.c.window_start == datetime.combine(day, time(), UTC),
        ~LOADS.c.is_provisional,
        LOADS.c.data_version <= sa.select(sa.func.max(BUILDS.c.data_version)).scalar_subquery(),
    )
    with open_warehouse(settings).published() as connection:
        if connection is None:
            return False
        accounts = sa.select(LOADS.c.account, sa.func.max(sa.case((is_complete, 1), else_=0)))
        rows = connection.execute(accounts.where(is_recent).group_by(LOADS.c.account)).all()
    return bool(rows) and all(has_day for _, has_day in rows)


def build_and_publish(
    settings: Settings,
    report: Report,
    *,
    builds: Literal["changed", "behind", "always", "never"] = "changed",
    publishes: bool = True,
) -> None:
    """Build and publish under one lease, so that no load comes between; without a warehouse, do nothing.

    `builds` says when: `changed` if rows were loaded, `behind` also if rows were only quarantined.
    """
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None:
            return
    with warehouse.lease(f"faletl build and publish, run {report.run_id}") as lease:
        with lease.transaction():
            is_due = (builds == "changed" and needs_build(settings, lease.connection)) or (
                builds == "behind" and has_unbuilt_rows(settings, lease.connection)
            )
        if is_due or builds == "always":
            report.build = build_models(
                settings, warehouse, lease, run_id=report.run_id, full=builds == "always"
            )
            warn_of_runaways(report.build)
        if publishes:
            report.published = warehouse.publish(lease)


MAX_NAMED_ALERTS = 5
"""Alerts of one kind that are sent individually; of further ones, only the number."""


def announce_alerts(settings: Settings, send: Callable[[str, str], None]) -> None:
    """Pass kind and sentence of each open alert that was not sent yet to `send`; each only once."""
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None or not alerts.unannounced(connection):
            return
    with warehouse.lease("faletl, alerts") as lease, lease.transaction():
        fence(lease, changes_data=False)
        by_kind = alerts.unannounced(lease.connection)
        for kind, sentences in by_kind.items():
            for sentence in sentences[:MAX_NAMED_ALERTS]:
                send(kind, sentence)
            if (more := len(sentences) - MAX_NAMED_ALERTS) > 0:
                send(kind, f"and {more:,} more: see ops.alerts")
        alerts.mark_announced(lease.connection, datetime.now(UTC))


def warn_of_runaways(build: Build) -> None:
    """Log the new runaway charges: the most expensive ones individually, then the number of others."""
    for sentence in build.top_runaways:
        log.warning("runaway charge: %s", sentence)
    if more := build.runaways - len(build.top_runaways):
        log.warning("and %d more: see reports.rpt_runaway_requests", more)

"""Build and publish what is loaded; announce what people must hear of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa

from faletl.config import Settings
from faletl.models.build import Build, build_models, has_unbuilt_rows, needs_build, resources_changed
from faletl.resources import USAGE
from faletl.warehouse import alerts, open_warehouse
from faletl.warehouse.ledger import fence
from faletl.warehouse.tables import BUILDS, LOADS

if TYPE_CHECKING:
    pass
from faletl.line.report import Report

log = logging.getLogger(__name__)


def is_behind(settings: Settings) -> bool:
    """Whether something is loaded, or was set aside, that `build` would make news of."""
    with open_warehouse(settings).reading() as connection:
        return connection is not None and has_unbuilt_rows(settings, connection)


def is_news(settings: Settings, resource: str) -> bool:
    """Whether something of the resource is loaded, or was set aside, that is not built yet."""
    with open_warehouse(settings).reading() as connection:
        return connection is not None and resource in resources_changed(connection)


def is_published(settings: Settings, day: date) -> bool:
    """Whether readers see all usage of that UTC day, of each account read in the week before."""
    lately = sa.and_(
        LOADS.c.resource == USAGE.name,
        LOADS.c.is_current,
        LOADS.c.window_start > datetime.combine(day - timedelta(days=7), time(), UTC),
    )
    is_it = sa.and_(
        LOADS.c.window_start == datetime.combine(day, time(), UTC),
        ~LOADS.c.is_provisional,
        LOADS.c.data_version <= sa.select(sa.func.max(BUILDS.c.data_version)).scalar_subquery(),
    )
    with open_warehouse(settings).published() as connection:
        if connection is None:
            return False
        accounts = sa.select(LOADS.c.account, sa.func.max(sa.case((is_it, 1), else_=0)))
        found = connection.execute(accounts.where(lately).group_by(LOADS.c.account)).all()
    return bool(found) and all(is_there for _, is_there in found)


def build_and_publish(
    settings: Settings,
    report: Report,
    *,
    builds: Literal["changed", "behind", "always", "never"] = "changed",
    publishes: bool = True,
) -> None:
    """Under one lease, so that nobody loads in between; a warehouse that is not there stays so.

    `changed`: if something was loaded; `behind`: also if rows were only set aside.
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


MOST_ANNOUNCED = 5
"""Alerts of one kind that are sent one by one; of more, their number."""


def announce_alerts(settings: Settings, send: Callable[[str, str], None]) -> None:
    """Hand each open alert that was not sent yet to `send`, as its kind and its sentence; once each."""
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None or not alerts.unannounced(connection):
            return
    with warehouse.lease("faletl, alerts") as lease, lease.transaction():
        fence(lease, changes_data=False)
        found = alerts.unannounced(lease.connection)
        for kind, sentences in found.items():
            for sentence in sentences[:MOST_ANNOUNCED]:
                send(kind, sentence)
            if (more := len(sentences) - MOST_ANNOUNCED) > 0:
                send(kind, f"and {more:,} more: see ops.alerts")
        alerts.mark_announced(lease.connection, datetime.now(UTC))


def warn_of_runaways(build: Build) -> None:
    """Tell each charge that ran away and was not known before; of many, the dearest."""
    for sentence in build.top_runaways:
        log.warning("runaway charge: %s", sentence)
    if more := build.runaways - len(build.top_runaways):
        log.warning("and %d more: see reports.rpt_runaway_requests", more)

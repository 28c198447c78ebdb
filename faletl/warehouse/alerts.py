"""Alerts for people, kept in ops.alerts: opened when the cause appears, resolved when it is gone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from faletl.warehouse.tables import ALERTS

Kind = Literal["held", "refused", "locked", "runaway"]

_MAX_ROWS = 100  # of one statement


@dataclass(frozen=True, slots=True)
class Alert:
    """A problem (`kind`) of a `subject`, with a message for people (`detail`).

    `key` distinguishes it from earlier alerts of the same subject. The key contains no account label,
    not even in a hash, so that an alert survives a rename of the account.
    """

    kind: Kind
    account: str | None
    subject: str
    detail: str
    key: Sequence[str]

    @property
    def alert_key(self) -> str:
        """The key as it is stored in ops.alerts."""
        return hashlib.sha256("\x1f".join([self.kind, *self.key]).encode()).hexdigest()[:32]


def raise_alert(connection: sa.Connection, alert: Alert, at: datetime) -> None:
    """Open the alert, or give an open one of the subject the new message, inside a transaction."""
    is_same = _open(alert.kind, alert.account, alert.subject)
    if not connection.execute(
        sa.select(sa.func.count()).select_from(ALERTS).where(is_same)
    ).scalar_one():
        raise_all(connection, [alert], at)
        return
    connection.execute(sa.update(ALERTS).where(is_same).values(detail=alert.detail))


def raise_all(connection: sa.Connection, alerts: Sequence[Alert], at: datetime) -> None:
    """Open alerts, inside a transaction; their subjects must have no open alert of the kind."""
    for first in range(0, len(alerts), _MAX_ROWS):
        batch = alerts[first : first + _MAX_ROWS]
        _forget(connection, batch)
        rows = [
            {
                "alert_key": alert.alert_key, "kind": alert.kind, "account": alert.account,
                "subject": alert.subject, "detail": alert.detail, "first_seen_at": at,
            }
            for alert in batch
        ]  # fmt: skip
        connection.execute(sa.insert(ALERTS).values(rows))


def resolve_all(connection: sa.Connection, alerts: Sequence[Alert], at: datetime) -> None:
    """Mark these alerts as resolved, inside a transaction."""
    for first in range(0, len(alerts), _MAX_ROWS):
        keys = [alert.alert_key for alert in alerts[first : first + _MAX_ROWS]]
        is_open = sa.and_(ALERTS.c.alert_key.in_(keys), ALERTS.c.resolved_at.is_(None))
        connection.execute(sa.update(ALERTS).where(is_open).values(resolved_at=at))


def _forget(connection: sa.Connection, alerts: Sequence[Alert]) -> None:
    """Delete earlier rows of alerts that are raised again: only the newest is kept."""
    keys = [alert.alert_key for alert in alerts]
    connection.execute(sa.delete(ALERTS).where(ALERTS.c.alert_key.in_(keys)))


def resolve(connection: sa.Connection, kind: Kind, account: str, subject: str, at: datetime) -> None:
    """Mark the open alert of the subject, if there is one, as resolved, inside a transaction."""
    connection.execute(
        sa.update(ALERTS).where(_open(kind, account, subject)).values(resolved_at=at)
    )  # fmt: skip


def _open(kind: Kind, account: str | None, subject: str) -> sa.ColumnElement[bool]:
    return sa.and_(
        ALERTS.c.kind == kind,
        ALERTS.c.account.is_not_distinct_from(account),
        ALERTS.c.subject == subject,
        ALERTS.c.resolved_at.is_(None),
    )


def open_alerts(connection: sa.Connection) -> Sequence[sa.RowMapping]:
    """Return the open alerts, the oldest first."""
    query = sa.select(ALERTS).where(ALERTS.c.resolved_at.is_(None))
    return (
        connection.execute(query.order_by(ALERTS.c.first_seen_at, ALERTS.c.alert_key)).mappings().all()
    )


def unannounced(connection: sa.Connection) -> Mapping[str, Sequence[str]]:
    """Return the messages of open alerts that were not sent yet, by kind."""
    details: dict[str, list[str]] = {}
    for alert in open_alerts(connection):
        if alert["announced_at"] is None:
            details.setdefault(alert["kind"], []).append(alert["detail"])
    return details


def mark_announced(connection: sa.Connection, at: datetime) -> None:
    """Mark every open alert as sent, inside a transaction."""
    is_new = sa.and_(ALERTS.c.resolved_at.is_(None), ALERTS.c.announced_at.is_(None))
    connection.execute(sa.update(ALERTS).where(is_new).values(announced_at=at))

"""Alerts: what people should look at, kept in ops.alerts from its first sight until it is over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from faletl.warehouse.tables import ALERTS

Kind = Literal["held", "refused", "locked", "runaway"]

_AT_ONCE = 100  # rows of a statement


@dataclass(frozen=True, slots=True)
class Alert:
    """What is wrong (`kind`) with what (`subject`), as a sentence for people (`detail`).

    `key` tells it from earlier alerts of the same subject. No account label and no hash that contains
    one is part of it, so that renaming an account leaves the alert what it was.
    """

    kind: Kind
    account: str | None
    subject: str
    detail: str
    key: Sequence[str]

    @property
    def alert_key(self) -> str:
        """The key as ops.alerts holds it."""
        return hashlib.sha256("\x1f".join([self.kind, *self.key]).encode()).hexdigest()[:32]


def raise_alert(connection: sa.Connection, alert: Alert, at: datetime) -> None:
    """Inside a transaction: open the alert; one that is open for the subject gets the newer sentence."""
    same = _open(alert.kind, alert.account, alert.subject)
    if not connection.execute(sa.select(sa.func.count()).select_from(ALERTS).where(same)).scalar_one():
        raise_all(connection, [alert], at)
        return
    connection.execute(sa.update(ALERTS).where(same).values(detail=alert.detail))


def raise_all(connection: sa.Connection, alerts: Sequence[Alert], at: datetime) -> None:
    """Inside a transaction: open alerts of subjects of which none is open."""
    for first in range(0, len(alerts), _AT_ONCE):
        some = alerts[first : first + _AT_ONCE]
        _forget(connection, some)
        rows = [
            {
                "alert_key": one.alert_key, "kind": one.kind, "account": one.account,
                "subject": one.subject, "detail": one.detail, "first_seen_at": at,
            }
            for one in some
        ]  # fmt: skip
        connection.execute(sa.insert(ALERTS).values(rows))


def resolve_all(connection: sa.Connection, alerts: Sequence[Alert], at: datetime) -> None:
    """Inside a transaction: these alerts are over."""
    for first in range(0, len(alerts), _AT_ONCE):
        keys = [one.alert_key for one in alerts[first : first + _AT_ONCE]]
        is_open = sa.and_(ALERTS.c.alert_key.in_(keys), ALERTS.c.resolved_at.is_(None))
        connection.execute(sa.update(ALERTS).where(is_open).values(resolved_at=at))


def _forget(connection: sa.Connection, alerts: Sequence[Alert]) -> None:
    """An alert that was over and comes again is one row: that of its newest time."""
    keys = [one.alert_key for one in alerts]
    connection.execute(sa.delete(ALERTS).where(ALERTS.c.alert_key.in_(keys)))


def resolve(connection: sa.Connection, kind: Kind, account: str, subject: str, at: datetime) -> None:
    """Inside a transaction: the open alert of the subject, if there is one, is over."""
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
    """The alerts that are not over, the oldest first."""
    query = sa.select(ALERTS).where(ALERTS.c.resolved_at.is_(None))
    return (
        connection.execute(query.order_by(ALERTS.c.first_seen_at, ALERTS.c.alert_key)).mappings().all()
    )


def unannounced(connection: sa.Connection) -> Mapping[str, Sequence[str]]:
    """The sentences of open alerts that were not sent yet, by kind."""
    found: dict[str, list[str]] = {}
    for alert in open_alerts(connection):
        if alert["announced_at"] is None:
            found.setdefault(alert["kind"], []).append(alert["detail"])
    return found


def mark_announced(connection: sa.Connection, at: datetime) -> None:
    """Inside a transaction: every open alert was sent."""
    is_new = sa.and_(ALERTS.c.resolved_at.is_(None), ALERTS.c.announced_at.is_(None))
    connection.execute(sa.update(ALERTS).where(is_new).values(announced_at=at))

"""Alerts: what people should look at, kept in ops.alerts from its first sight until it is over."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from faletl.warehouse.tables import ALERTS

Kind = Literal["held", "refused", "locked", "runaway"]


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
    found = connection.execute(
        sa.update(ALERTS).where(_open(alert.kind, alert.account, alert.subject)).values(
            detail=alert.detail
        )
    )  # fmt: skip
    if found.rowcount:
        return
    connection.execute(sa.delete(ALERTS).where(ALERTS.c.alert_key == alert.alert_key))
    connection.execute(
        sa.insert(ALERTS).values(
            alert_key=alert.alert_key,
            kind=alert.kind,
            account=alert.account,
            subject=alert.subject,
            detail=alert.detail,
            first_seen_at=at,
        )
    )


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

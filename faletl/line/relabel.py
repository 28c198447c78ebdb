"""Open landed extracts under the current account labels, and restore accounts in a rebuild.

Landed pages never change, so their manifests keep the label of their time. Later decisions of people are
stored next to them (faletl/landing/decisions.py) and applied wherever extracts are opened for loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import UsageError
from faletl.landing import decisions, extracts
from faletl.landing.decisions import AccountBound, AccountForgotten, AccountRenamed, Decision, HorizonSet
from faletl.landing.extracts import Manifest, SealedExtract
from faletl.line import accounts
from faletl.line.accounts import Account
from faletl.warehouse import horizons
from faletl.warehouse.horizons import Horizon, Horizons
from faletl.warehouse.tables import WAREHOUSE
from faletl.windows import LONG_AGO

_SLACK = timedelta(milliseconds=1)
"""How far the recorded instant of a decision may be after the real one: see `decisions.next_instant`."""


def opener(
    settings: Settings, connection: sa.Connection | None = None
) -> Callable[[Path], SealedExtract | None]:
    """Return a function that opens landed extracts under current labels; None for forgotten accounts.

    With a `connection`, extracts are opened for its warehouse.

    Raises: as `decisions.recorded` and `require_followed`; from each call as `landing.open_read`.
    """
    all_decisions = decisions.recorded(settings)
    if connection is not None:
        require_followed(connection, all_decisions)
    return lambda folder: relabelled(extracts.open_read(folder), all_decisions)


def require_followed(connection: sa.Connection, all_decisions: Iterable[Decision]) -> None:
    """Raise UsageError if a label of this warehouse was renamed or forgotten in another one.

    Warehouses that share a landing folder share its accounts. Earlier extracts would be loaded under the
    new label, while the tables still have the old one.
    """
    until = connection.execute(sa.select(WAREHOUSE.c.decided_until)).scalar_one() or LONG_AGO
    known = accounts.known_accounts(connection)
    for decision in all_decisions:
        if isinstance(decision, AccountRenamed | AccountForgotten) and decision.decided_at > until:
            account = known.get(decision.account)
            if account is not None and (account.bound_at or LONG_AGO) <= decision.decided_at:
                raise UsageError(
                    f"another warehouse of this landing folder has renamed or forgotten the account "
                    f"{decision.account!a}; run faletl rebuild to apply that here, too"
                )


def follow(connection: sa.Connection, all_decisions: Iterable[Decision]) -> None:
    """Record that the tables reflect these decisions, inside a transaction."""
    instants = [
        decision.decided_at
        for decision in all_decisions
        if isinstance(decision, AccountRenamed | AccountForgotten)
    ]
    if instants:
        connection.execute(sa.update(WAREHOUSE).values(decided_until=max(instants)))


def relabelled(landed: SealedExtract, all_decisions: Sequence[Decision]) -> SealedExtract | None:
    """Return the extract under its current label; None if its account was forgotten."""
    manifest = landed.manifest
    label = label_now(all_decisions, manifest.account, manifest.began_at)
    if label is None:
        return None
    return SealedExtract(landed.folder, msgspec.structs.replace(manifest, account=label))


def label_now(all_decisions: Sequence[Decision], account: str, landed_at: datetime) -> str | None:
    """Return the current label of an extract that landed under `account`; None if it was forgotten.

    `all_decisions` are in order. A label that was renamed or forgotten may later belong to another
    account: an extract is of the account that had the label last at that instant. An extract that landed
    after the label had ended, and before it began again, is of a run that was still active.
    """
    end: int | None = None
    for number, decision in enumerate(all_decisions):
        if end is None and _ends(decision, account):
            end = number
        elif end is not None and _begins(decision, account):
            if decision.decided_at > landed_at + _SLACK:
                break
            end = None
    label: str | None = account
    for decision in all_decisions[end:] if end is not None else ():
        if label is not None and _ends(decision, label):
            label = decision.new_account if isinstance(decision, AccountRenamed) else None
    return label


def _ends(decision: Decision, label: str) -> bool:
    return isinstance(decision, AccountRenamed | AccountForgotten) and decision.account == label


def _begins(decision: Decision, label: str) -> bool:
    if isinstance(decision, AccountRenamed):
        return decision.new_account == label
    return isinstance(decision, AccountBound) and decision.account == label


# --- Rebuild --------------------------------------------------------------------------------------


def restore(
    connection: sa.Connection, all_decisions: Sequence[Decision], manifests: Iterable[Manifest]
) -> None:
    """Restore accounts and horizons in a warehouse that is rebuilt from scratch, inside a transaction.

    Landed extracts of an older faletl have no decisions next to them: then label and first planned day
    are taken from their `manifests`.
    """
    known: dict[str, Account] = {}
    rows: dict[str, Horizons] = {}
    for decision in all_decisions:
        _replay(decision, known, rows)
    for label, planned in _planned(manifests).items():
        rows[label] = {**planned, **rows.get(label, {})}
    for account in known.values():
        accounts.keep(connection, account)
    for owner, own_rows in rows.items():
        horizons.replace(connection, owner, own_rows)
    follow(connection, all_decisions)


def _planned(manifests: Iterable[Manifest]) -> dict[str, Horizons]:
    planned: dict[str, dict[str, Horizon]] = {}
    for manifest in manifests:
        if manifest.resource in horizons.BY_DAY:
            of_account = planned.setdefault(manifest.account, {})
            known = of_account.get(manifest.resource, Horizon(manifest.planned_from))
            of_account[manifest.resource] = Horizon(min(known.first_day, manifest.planned_from))
    return dict(planned)


def _replay(decision: Decision, known: dict[str, Account], rows: dict[str, Horizons]) -> None:
    match decision:
        case AccountBound():
            known[decision.account] = _bound(known.get(decision.account), decision)
            rows.pop(decision.key_id or "", None)  # a decision about the label's horizons follows
        case AccountRenamed(account=old, new_account=new):
            if old in known:
                known[new] = replace(known.pop(old), label=new)
            rows[new] = {**rows.get(new, {}), **rows.pop(old, {})}
        case AccountForgotten(account=label):
            known.pop(label, None)
            rows.pop(label, None)
        case HorizonSet(account=owner):
            rows[owner] = horizons.decided(decision)
        case _:
            pass  # decisions about windows


def _bound(account: Account | None, decision: AccountBound) -> Account:
    before = account or Account(decision.account, bound_at=decision.decided_at)
    usernames, key_ids = before.usernames, before.key_ids
    if name := decision.username:
        usernames = (*(username for username in usernames if username != name), name)
    if decision.key_id:
        key_ids = (*key_ids, decision.key_id)
    return replace(before, usernames=usernames, key_ids=key_ids, is_sandbox=decision.is_sandbox)

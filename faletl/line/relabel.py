"""Relabel: open what landed before under the labels of today, and bring accounts back in a rebuild.

Landed pages never change, so their manifests keep the label of their time. What people decided since
lies next to them (faletl/landing/decisions.py) and is applied wherever they are opened to be loaded.
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
"""By how much the instant of a decision may lie behind its own: see `decisions.next_instant`."""


def opener(
    settings: Settings, connection: sa.Connection | None = None
) -> Callable[[Path], SealedExtract | None]:
    """Return what opens landed extracts under the labels of today; None for a forgotten account's.

    With a `connection` they are opened for its warehouse.

    Raises: as `decisions.recorded` and `require_followed`; from each call as `landing.open_read`.
    """
    made = decisions.recorded(settings)
    if connection is not None:
        require_followed(connection, made)
    return lambda folder: relabelled(extracts.open_read(folder), made)


def require_followed(connection: sa.Connection, made: Iterable[Decision]) -> None:
    """Raises UsageError if a label of the warehouse was renamed or forgotten in another one.

    Warehouses that share a landing folder share its accounts. What landed before would be loaded under
    the new label, while the tables still hold the old one.
    """
    until = connection.execute(sa.select(WAREHOUSE.c.decided_until)).scalar_one() or LONG_AGO
    known = accounts.known_accounts(connection)
    for one in made:
        if isinstance(one, AccountRenamed | AccountForgotten) and one.decided_at > until:
            mine = known.get(one.account)
            if mine is not None and (mine.bound_at or LONG_AGO) <= one.decided_at:
                raise UsageError(
                    f"another warehouse of this landing folder has renamed or forgotten the account "
                    f"{one.account!a}; faletl rebuild makes this one follow"
                )


def follow(connection: sa.Connection, made: Iterable[Decision]) -> None:
    """Inside a transaction: the tables are as these decisions want them."""
    instants = [one.decided_at for one in made if isinstance(one, AccountRenamed | AccountForgotten)]
    if instants:
        connection.execute(sa.update(WAREHOUSE).values(decided_until=max(instants)))


def relabelled(landed: SealedExtract, made: Sequence[Decision]) -> SealedExtract | None:
    """Return the extract under the label of today; None if its account was forgotten since."""
    manifest = landed.manifest
    label = label_now(made, manifest.account, manifest.began_at)
    if label is None:
        return None
    return SealedExtract(landed.folder, msgspec.structs.replace(manifest, account=label))


def label_now(made: Sequence[Decision], account: str, landed_at: datetime) -> str | None:
    """Return the label of today of what landed under `account`; None if it was forgotten since.

    `made` are all decisions in their order. A label that was renamed or forgotten may have become that
    of another account: what landed is of the account that had it last at that instant. What landed
    after the label had ended, and before it began again, is of a run that was still under way.
    """
    end: int | None = None
    for number, one in enumerate(made):
        if end is None and _ends(one, account):
            end = number
        elif end is not None and _begins(one, account):
            if one.decided_at > landed_at + _SLACK:
                break
            end = None
    label: str | None = account
    for one in made[end:] if end is not None else ():
        if label is not None and _ends(one, label):
            label = one.new_account if isinstance(one, AccountRenamed) else None
    return label


def _ends(decision: Decision, label: str) -> bool:
    return isinstance(decision, AccountRenamed | AccountForgotten) and decision.account == label


def _begins(decision: Decision, label: str) -> bool:
    if isinstance(decision, AccountRenamed):
        return decision.new_account == label
    return isinstance(decision, AccountBound) and decision.account == label


# --- Rebuild --------------------------------------------------------------------------------------


def restore(connection: sa.Connection, made: Sequence[Decision], manifests: Iterable[Manifest]) -> None:
    """Inside a transaction: bring back accounts and horizons of a warehouse that is made from scratch.

    Landed extracts of an older faletl have no decisions next to them. Then the label is in their
    `manifests`, and so is the first day that was planned.
    """
    known: dict[str, Account] = {}
    rows: dict[str, Horizons] = {}
    for one in made:
        _replay(one, known, rows)
    for label, planned in _planned(manifests).items():
        rows[label] = {**planned, **rows.get(label, {})}
    for account in known.values():
        accounts.keep(connection, account)
    for owner, mine in rows.items():
        horizons.replace(connection, owner, mine)
    follow(connection, made)


def _planned(manifests: Iterable[Manifest]) -> dict[str, Horizons]:
    planned: dict[str, dict[str, Horizon]] = {}
    for one in manifests:
        if one.resource in horizons.BY_DAY:
            mine = planned.setdefault(one.account, {})
            known = mine.get(one.resource, Horizon(one.planned_from))
            mine[one.resource] = Horizon(min(known.first_day, one.planned_from))
    return dict(planned)


def _replay(decision: Decision, known: dict[str, Account], rows: dict[str, Horizons]) -> None:
    match decision:
        case AccountBound():
            known[decision.account] = _bound(known.get(decision.account), decision)
            rows.pop(decision.key_id or "", None)  # the horizons of the label follow
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
            pass  # of windows


def _bound(account: Account | None, decision: AccountBound) -> Account:
    before = account or Account(decision.account, bound_at=decision.decided_at)
    usernames, key_ids = before.usernames, before.key_ids
    if name := decision.username:
        usernames = (*(one for one in usernames if one != name), name)
    if decision.key_id:
        key_ids = (*key_ids, decision.key_id)
    return replace(before, usernames=usernames, key_ids=key_ids, is_sandbox=decision.is_sandbox)

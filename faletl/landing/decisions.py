"""Decisions of people, as small files in the landing folder, next to the pages that they concern.

    <landing>/.decisions/<instant>-<random>.json

A file has one decision and never changes. The warehouse has the same decisions in its `ops` tables,
where runs look them up; `faletl rebuild` restores them from here if the warehouse is lost.
"""

from __future__ import annotations

import getpass
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import TypeAlias

import msgspec

from faletl.config import Settings
from faletl.errors import StorageError, TamperedError, UsageError
from faletl.files import storage_error
from faletl.landing import extracts
from faletl.landing.extracts import Instant, Manifest
from faletl.landing.storage import backend_for, write_durably
from faletl.wire import UNREADABLE

_STAMP = "%Y%m%dT%H%M%S%fZ"
_NAME = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{6}\.json", re.ASCII)


class _Decision(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """The fields of all decisions: when, and by whom (the user of the operating system)."""

    decided_at: Instant
    decided_by: str = ""


class AccountBound(_Decision, frozen=True, tag="account_bound"):
    """A label was bound to fal's username, to a key (its fingerprint), or to both."""

    account: str
    username: str | None = None
    key_id: str | None = None
    is_sandbox: bool = False


class AccountRenamed(_Decision, frozen=True, tag="account_renamed"):
    """A label was renamed, for all extracts that landed under the old label before."""

    account: str
    new_account: str


class AccountForgotten(_Decision, frozen=True, tag="account_forgotten"):
    """All extracts that landed under a label before must be left out."""

    account: str


class HorizonSet(_Decision, frozen=True, tag="horizon_set"):
    """The first day to load was set, per resource (faletl/warehouse/horizons.py: `decided`).

    `account` is the fingerprint of a key as long as its label is unknown.
    """

    account: str
    first_days: dict[str, date]
    decided: list[str] = []


class WindowAccepted(_Decision, frozen=True, tag="window_accepted"):
    """A held or refused window was accepted; the fields are the columns of ops.acceptances."""

    acceptance_id: str
    account: str
    resource: str
    window_start: Instant
    load_id: str
    accepted: str
    rows_digest: str
    reason: str
    rows_before: int
    rows_after: int
    cost_total_before: str
    cost_total_after: str


Decision: TypeAlias = AccountBound | AccountRenamed | AccountForgotten | HorizonSet | WindowAccepted


def next_instant(settings: Settings) -> datetime:
    """Return the instant for a decision that is made now: later than all recorded decisions.

    The clocks of machines differ. Decisions are applied in the order of their instants, so a clock that
    is behind must not put a rename before the binding that it ends.
    """
    now, newest = datetime.now(UTC), max(_names(settings), default="")
    if not newest:
        return now
    last = datetime.strptime(newest.partition("-")[0], _STAMP).replace(tzinfo=UTC)
    return max(now, last + datetime.resolution)


def record(settings: Settings, decision: Decision) -> None:
    """Write the decision durably.

    Call it as the last step of the transaction that writes the decision to `ops`: then a decision is in
    the warehouse only if it is here as well.

    Raises:
        StorageError: the landing folder cannot be written.
    """
    folder = extracts.root(settings) / extracts.DECISIONS
    path = folder / f"{decision.decided_at.strftime(_STAMP)}-{secrets.token_hex(3)}.json"
    try:
        backend_for(folder).make(folder)
    except OSError as error:
        raise storage_error(error, path) from None
    write_durably(path, msgspec.json.format(msgspec.json.encode(decision), indent=1))


def recorded(settings: Settings) -> Sequence[Decision]:
    """Return all decisions, the oldest first.

    Raises:
        TamperedError: a file is damaged.
        UsageError: a newer faletl wrote a decision that this one does not know.
        StorageError: the landing folder cannot be read.
    """
    folder = extracts.root(settings) / extracts.DECISIONS
    names = sorted(_names(settings))
    try:
        return [_decoded(str(folder / name), backend_for(folder).read(folder / name)) for name in names]
    except OSError as error:
        raise StorageError(f"cannot read {error.filename or folder}: {error.strerror}") from None


def _names(settings: Settings) -> list[str]:
    folder = extracts.root(settings) / extracts.DECISIONS
    try:
        return [name for name in backend_for(folder).names(folder) if _NAME.fullmatch(name)]
    except OSError as error:
        raise StorageError(f"cannot read {error.filename or folder}: {error.strerror}") from None


def _decoded(path: str, content: bytes) -> Decision:
    try:
        decision: Decision = msgspec.json.decode(content, type=Decision)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path} is a decision of a newer faletl ({error}); upgrade faletl") from None
    except UNREADABLE as error:
        raise TamperedError(f"{path} cannot be read: {error}", file=path) from None
    return decision


def accept_command(manifest: Manifest) -> str:
    """Return the command that accepts the window's extract, without its reason."""
    return f"faletl accept {manifest.resource} {manifest.window.day} {account_option(manifest.account)}"


def account_option(label: str) -> str:
    """Return the command line option that names the account."""
    return f"--account {label!r}"


def user_name() -> str:
    """Return the user of the operating system, who decides; empty where it has no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container
        return ""

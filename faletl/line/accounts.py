"""Account labels: find the label for the data of a key, by the username and the key.

A label is bound to fal's usernames of the account and to its keys. Usernames can be renamed, keys are
replaced, and fal may refuse to return the username. So either of the two identifies an account, and
contradictions are refused before anything is loaded. Of a key, only a salted fingerprint of its id is
stored: it can be compared with a key and reveals nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING

import msgspec
import sqlalchemy as sa

from faletl import invented
from faletl.config import FINGERPRINT, Settings, is_label
from faletl.errors import (
    ContractError,
    FaletlError,
    KeyRefusedError,
    LeaseLostError,
    NotFoundError,
    UsageError,
)
from faletl.fal.client import FalClient
from faletl.fal.pages import read_envelope
from faletl.fal.questions import ask_in_either_form, bounds
from faletl.landing import decisions
from faletl.landing.decisions import AccountBound
from faletl.resources import CREDITS, USAGE, Question
from faletl.warehouse import horizons, open_warehouse
from faletl.warehouse.ledger import fence
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.schema import columns_of
from faletl.warehouse.tables import ACCOUNTS, HORIZONS, LOADS, RAW
from faletl.windows import HOUR, LONG_AGO, SETTLE, Window
from faletl.wire import UNREADABLE, MalformedBodyError, as_json

if TYPE_CHECKING:
    from faletl.selection import Asked

log = logging.getLogger(__name__)

NAMELESS = "default"
"""The label of the first account of a warehouse, if fal refuses to return its username."""


@dataclass(frozen=True, slots=True)
class Account:
    """A label and its bindings. `usernames` are fal's, the newest last; `key_ids` are fingerprints.

    `is_sandbox` and `bound_at` are None if an older faletl loaded the account and recorded no binding.
    """

    label: str
    usernames: tuple[str, ...] = ()
    key_ids: tuple[str, ...] = ()
    is_sandbox: bool | None = None
    bound_at: datetime | None = None

    def has_key(self, settings: Settings, *, metrics: bool = False) -> bool:
        """Return whether FAL_KEY (or FAL_METRICS_KEY) is bound to the account."""
        return any(settings.has_fingerprint(key_id, metrics=metrics) for key_id in self.key_ids)

    @property
    def is_free(self) -> bool:
        """Whether the label has no bindings."""
        return not self.usernames and not self.key_ids


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of FAL_KEY according to fal; without a `username`, `why_nameless` is the reason."""

    is_sandbox: bool
    username: str | None = None
    why_nameless: FaletlError | None = None

    @property
    def name(self) -> str:
        """A description for people, without any part of the key."""
        return f"fal's account {self.username!a}" if self.username else "the key in FAL_KEY"


@dataclass(frozen=True, slots=True)
class SignedIn:
    """The account of a run. `owners` are the label and, if it could not be bound, its key's fingerprint.

    Extracts that landed under the label before `bound_at` may be of another account.
    """

    label: str
    owners: tuple[str, ...]
    username: str | None
    bound_at: datetime


# --- Known accounts -------------------------------------------------------------------------------


def known_accounts(connection: sa.Connection) -> dict[str, Account]:
    """Return every account of the warehouse by label, including those that an older faletl loaded."""
    rows = connection.execute(sa.select(ACCOUNTS)).mappings().all()
    known = {
        row["account"]: Account(
            label=row["account"],
            usernames=tuple(msgspec.json.decode(row["usernames"])),
            key_ids=tuple(msgspec.json.decode(row["key_ids"])),
            is_sandbox=row["is_sandbox"],
            bound_at=row["bound_at"].astimezone(UTC),
        )
        for row in rows
    }
    loaded = connection.execute(sa.select(LOADS.c.account).distinct()).scalars()
    if unwritten := sorted(set(loaded) - known.keys()):
        names, _ = _names_of_older(connection, known, unwritten)
        for label in unwritten:
            is_sandbox = True if invented.ACCOUNT in names[label] else None
            known[label] = Account(label, tuple(names[label]), is_sandbox=is_sandbox)
    return known


def known_to_readers(connection: sa.Connection) -> dict[str, Account]:
    """Return every account that readers can see; empty if the tables are missing or not readable."""
    is_shown = all(columns_of(connection, table) for table in (ACCOUNTS, LOADS, RAW[CREDITS.name]))
    return known_accounts(connection) if is_shown else {}


def _names_of_older(
    connection: sa.Connection, known: Mapping[str, Account], labels: Collection[str]
) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """Return the usernames of each label in raw.credits, and the usernames with several labels.

    A username with two labels identifies neither: an older faletl loaded one account twice.
    """
    table = RAW[CREDITS.name].c
    rows = connection.execute(
        sa.select(table["_account"], table.username)
        .where(table["_account"].in_(sorted(labels)))
        .group_by(table["_account"], table.username)
        .order_by(sa.func.max(table["_snapshot_at"]), table.username)
    ).all()
    labels_of: dict[str, set[str]] = {}
    for label, name in [*rows, *((a.label, name) for a in known.values() for name in a.usernames)]:
        labels_of.setdefault(name, set()).add(label)
    doubtful = {
        name: labels_of_name for name, labels_of_name in labels_of.items() if len(labels_of_name) > 1
    }
    names: dict[str, list[str]] = {label: [] for label in labels}
    for label, name in rows:
        if name not in doubtful:
            names[label].append(name)
    return names, doubtful


def require_known(connection: sa.Connection, label: str | None) -> None:
    """Raise LeaseLostError if the account was renamed or forgotten during the run."""
    if label is not None and label not in known_accounts(connection):
        raise LeaseLostError(
            f"the account {label!a} was renamed or forgotten meanwhile (faletl accounts); nothing was "
            "written under the old label, and the next run uses the new one"
        )


# --- The label of a key ---------------------------------------------------------------------------


def label_of(known: Mapping[str, Account], caller: Caller, settings: Settings) -> str:
    """Return the label of the caller's account (docs/decisions.md, "Accounts").

    Raises:
        UsageError: username, key and FALETL_ACCOUNT contradict each other; or they do not identify an
            account; or a sandbox answers for a warehouse of fal's accounts, or the reverse.
        ContractError: fal's answer has no usable username, and nothing else identifies the account.
    """
    _refuse_mixture(known, caller, settings)
    by_key = next((account.label for account in known.values() if account.has_key(settings)), None)
    by_name = next(
        (account.label for account in known.values() if caller.username in account.usernames), None
    )
    if by_key and by_name and by_key != by_name:
        raise UsageError(
            f"the key in FAL_KEY is recorded for account {by_key!a}, but fal returned the "
            f"username {caller.username!a}, which is account {by_name!a}; set FAL_KEY to a key of "
            f"{by_key!a}, or forget the wrong account: faletl accounts forget"
        )
    label = by_key or by_name
    _refuse_metrics_key(known, label, settings)
    if settings.account is not None:
        return _configured_label(known, caller, settings.account, label)
    return label or _new_label(known, caller)


def _configured_label(
    known: Mapping[str, Account], caller: Caller, configured: str, label: str | None
) -> str:
    if label is not None and configured != label:
        cure = (
            f"set FALETL_ACCOUNT={label}, or FAL_KEY to a key of {configured!a}"
            if configured in known
            else f"to give it that label: faletl accounts rename {label!a} {configured!a}"
        )
        raise UsageError(
            f"FALETL_ACCOUNT is {configured!a}, but {caller.name} is account {label!a} here; {cure}"
        )
    names = known[configured].usernames if label is None and configured in known else ()
    if caller.username and names and caller.username not in names:
        raise UsageError(
            f"FALETL_ACCOUNT is {configured!a}, which is fal's account {names[-1]!a} here, but the key "
            f"in FAL_KEY is of fal's account {caller.username!a}; correct one of the two, or, if fal "
            "renamed the account, run once with a key that was used before"
        )
    return configured


def _new_label(known: Mapping[str, Account], caller: Caller) -> str:
    """Return the label for an account whose username and key are both unknown."""
    if len(known) == 1 and all(account.is_free for account in known.values()):
        return next(iter(known))  # loaded by an older faletl, which did not record its owner
    if caller.username is None:
        why = caller.why_nameless
        if isinstance(why, ContractError) and not isinstance(why, NotFoundError):
            raise why
        if not known:
            return NAMELESS
        raise UsageError(
            f"fal did not return the account of the key in FAL_KEY ({why}), the key was never used "
            f"here, and the warehouse has {_listed(known)}; set FALETL_ACCOUNT to the account's label"
        )
    if caller.username in known and known[caller.username].usernames:
        raise UsageError(
            f"the label {caller.username!a} is that of fal's account "
            f"{known[caller.username].usernames[-1]!a} here; set FALETL_ACCOUNT to another label for "
            f"{caller.name}"
        )
    return caller.username


def _refuse_metrics_key(known: Mapping[str, Account], label: str | None, settings: Settings) -> None:
    """Raise UsageError if FAL_METRICS_KEY is of another account than FAL_KEY, which alone decides."""
    for account in known.values():
        if account.label != label and account.has_key(settings, metrics=True):
            whose = f"of {label!a}" if label else "of an account that is unknown here"
            raise UsageError(
                f"FAL_METRICS_KEY is a key of account {account.label!a}, but FAL_KEY is {whose}; set "
                "both to keys of the same account"
            )


def _refuse_mixture(known: Mapping[str, Account], caller: Caller, settings: Settings) -> None:
    """Raise UsageError if invented and real money would be mixed."""
    others = [
        account.label
        for account in known.values()
        if _is_sandbox(account, caller, settings) != caller.is_sandbox
    ]
    if not others:
        return
    if caller.is_sandbox:
        raise UsageError(
            f"{settings.api_url} is a sandbox, whose data is invented, but the warehouse has "
            f"{_listed(others)} of fal; set FALETL_WAREHOUSE and FALETL_LANDING to others for it"
        )
    raise UsageError(
        f"the warehouse has {_listed(others)} of a sandbox, whose data is invented, but "
        f"{settings.api_url} is fal; set FALETL_WAREHOUSE and FALETL_LANDING to others for it"
    )


def _is_sandbox(account: Account, caller: Caller, settings: Settings) -> bool:
    """Return whether the account is invented; without evidence, one of an older faletl is real."""
    if account.is_sandbox is not None:
        return account.is_sandbox
    is_own = caller.username in account.usernames and settings.has_sandbox_key
    return is_own and caller.is_sandbox


def _listed(labels: Iterable[str]) -> str:
    names = sorted(labels)
    return f"account{'s' * (len(names) > 1)} {', '.join(map(ascii, names))}"


# --- Signing in -----------------------------------------------------------------------------------


def sign_in(
    client: FalClient, settings: Settings, warehouse: Warehouse, selection: Asked, now: datetime
) -> SignedIn:
    """Bind FAL_KEY to its account and return that; its horizons are stored first.

    A new username or key is bound to its label after fal has answered a question about usage, so that a
    wrong or useless key binds nothing. A key that may not read usage still works with an account that is
    bound already.

    Raises:
        UsageError: see `label_of`; nothing is changed.
        KeyRefusedError: fal refuses usage to a key whose account is not bound yet.
        ApiUnavailableError, ContractError: fal could not be asked.
        WarehouseError, StorageError: warehouse or landing folder cannot be written.
    """
    known, owner = _known_to(warehouse, settings)
    if owner in known and settings.account is not None:
        _configured_label(known, Caller(is_sandbox=False), settings.account, owner)
    owner = owner or settings.fingerprint()
    before = horizons.remember(settings, warehouse, owner, selection, now)
    try:
        caller = _caller(client, settings)
        label = label_of(known, caller, settings)
    except UsageError:
        if before is not None:
            horizons.put_back(settings, warehouse, owner, before)
        raise
    account = known.get(label, Account(label))
    if _is_bound(account, caller, settings):
        return _signed_in(account, caller, owner)
    try:
        ask_for_usage(client, settings, now)
    except FaletlError as error:
        if account.bound_at is None:
            raise
        log.info("%s; the key is not bound to account %a", error, label)
        return _signed_in(account, caller, owner)
    account = _bind(settings, warehouse, caller, owner, selection, now)
    return _signed_in(account, caller, account.label)


def look_up(client: FalClient, settings: Settings, known: Mapping[str, Account]) -> str:
    """Return the label of the account of FAL_KEY, and write nothing. Raises as `sign_in`."""
    return label_of(known, _caller(client, settings), settings)


def preview(client: FalClient, settings: Settings, warehouse: Warehouse) -> SignedIn:
    """Return what `sign_in` would, without writing or requesting usage. Raises as `sign_in`."""
    known, owner = _known_to(warehouse, settings)
    caller = _caller(client, settings)
    label = label_of(known, caller, settings)
    return _signed_in(known.get(label, Account(label)), caller, owner or label)


def _signed_in(account: Account, caller: Caller, owner: str) -> SignedIn:
    owners = tuple(dict.fromkeys((account.label, owner)))
    return SignedIn(account.label, owners, caller.username, account.bound_at or LONG_AGO)


def label_of_key(warehouse: Warehouse, settings: Settings) -> str | None:
    """Return the label of FAL_KEY, or else the only label; None if there are several or none."""
    known, owner = _known_to(warehouse, settings)
    only = next(iter(known)) if len(known) == 1 else None
    return owner if owner in known else only


def _known_to(warehouse: Warehouse, settings: Settings) -> tuple[dict[str, Account], str | None]:
    """Return all accounts, and the owner of FAL_KEY's horizons (see `owner_of_key`)."""
    with warehouse.reading() as connection:
        if connection is None:
            return {}, None
        known = known_accounts(connection)
        return known, owner_of_key(settings, connection, known.values())


def owner_of_key(settings: Settings, connection: sa.Connection, known: Iterable[Account]) -> str | None:
    """Return the label of FAL_KEY, or the fingerprint under which its horizons are stored, or None."""
    if settings.key is None:
        return None
    owners = sa.select(HORIZONS.c.account).where(HORIZONS.c.account.startswith(FINGERPRINT)).distinct()
    pending = (key for key in connection.execute(owners).scalars() if settings.has_fingerprint(key))
    return next((each.label for each in known if each.has_key(settings)), None) or next(pending, None)


def set_horizon(
    settings: Settings, day: date, resources: Collection[str] = (), label: str | None = None
) -> None:
    """Set the first day to load of these resources (default: all with days), as `faletl horizon --set`.

    The account is the one with this label, or else of FALETL_ACCOUNT, of FAL_KEY, or the only one. For a
    key that was never used, the horizon applies from its first run.

    Raises:
        UsageError: an invalid day or resource, or an unknown account.
    """
    horizons.refuse_odd(day, resources)
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:  # so that wrong use creates no warehouse
        _horizons_of(settings, connection, label)
    with warehouse.lease("faletl horizon") as lease, lease.transaction():
        owner = _horizons_of(settings, lease.connection, label)
        horizons.decide(settings, lease, owner, day, resources)


def _horizons_of(settings: Settings, connection: sa.Connection | None, label: str | None) -> str:
    """Return the label, or the fingerprint of an unused key, whose horizons are to be set."""
    known = known_accounts(connection) if connection is not None else {}
    if label or settings.account in known:
        chosen = label or str(settings.account)
        if chosen not in known:
            raise UsageError(f"there is no account {chosen!a}; see faletl accounts")
        return chosen
    if settings.key is not None:
        owner = owner_of_key(settings, connection, known.values()) if connection is not None else None
        return owner or settings.fingerprint()
    if len(known) == 1:
        return next(iter(known))
    raise UsageError(
        "there are several accounts; name one with --account; see faletl accounts"
        if known
        else "there is no account yet; run faletl run first, or set FAL_KEY"
    )


def _is_bound(account: Account, caller: Caller, settings: Settings) -> bool:
    """Return whether key and username of the caller are recorded, the username as the newest."""
    is_newest = caller.username is None or caller.username in account.usernames[-1:]
    return account.bound_at is not None and is_newest and account.has_key(settings)


def _caller(client: FalClient, settings: Settings) -> Caller:
    """Ask fal for the account of the key; a refusal or a missing path leaves it unknown."""
    username, why = None, None
    try:
        _, username = client.get(CREDITS.path, {"expand": ("credits",)}, _username_or_why)
    except (KeyRefusedError, NotFoundError) as error:
        why = error
    if isinstance(username, ContractError):
        return Caller(client.is_sandbox, None, username)
    return Caller(client.is_sandbox, username, why)


def _username_or_why(body: bytes) -> str | ContractError:
    try:
        return read_username(body)
    except ContractError as error:
        return error


def read_username(body: bytes) -> str:
    """Return the username in an answer of /account/billing.

    Raises:
        ContractError, MalformedBodyError: the answer has no usable username.
    """
    try:
        username = msgspec.json.decode(as_json(body), type=dict[str, msgspec.Raw])["username"]
        label = msgspec.json.decode(username, type=str)
    except msgspec.ValidationError as error:
        raise ContractError(f"fal's account has a username that is not text: {error}") from None
    except UNREADABLE as error:
        raise MalformedBodyError(f"the answer is not a complete JSON document ({error})") from None
    except KeyError:
        raise ContractError("fal's account has no username; set FALETL_ACCOUNT") from None
    if not label.strip():
        raise ContractError("fal's account has an empty username; set FALETL_ACCOUNT")
    if not is_label(label):
        raise ContractError("fal's account has a username that cannot be a label; set FALETL_ACCOUNT")
    return label


def ask_for_usage(client: FalClient, settings: Settings, now: datetime) -> None:
    """Request a row of the last full hour; raise KeyRefusedError with the needed permissions."""
    end = (now - SETTLE).replace(minute=0, second=0, microsecond=0)
    hour = bounds(Window(end - HOUR, end))

    def ask(question: Question) -> None:
        client.get(
            USAGE.path,
            {**question, **hour, "limit": "1"},
            lambda body: read_envelope(body, USAGE.rows_path),
        )

    try:
        ask_in_either_form(USAGE, 0, ask, is_older=False)
    except KeyRefusedError as error:
        raise KeyRefusedError(
            f"{error.message}; check {settings.key_name()}: {USAGE.name} needs {USAGE.needs}",
            **error.facts,
        ).at(resource=USAGE.name) from None
    except FaletlError as error:
        raise error.at(resource=USAGE.name) from None


# --- Binding --------------------------------------------------------------------------------------


def _bind(
    settings: Settings,
    warehouse: Warehouse,
    caller: Caller,
    owner: str,
    selection: Asked,
    now: datetime,
) -> Account:
    """Bind username, key and the horizons of the key to their label; all or nothing."""
    with warehouse.lease("faletl, which binds an account") as lease, lease.transaction():
        fence(lease, changes_data=False)
        connection = lease.connection
        known = known_accounts(connection)
        label = label_of(known, caller, settings)  # another run may have bound it meanwhile
        older = list(_record_older_accounts(settings, connection, known, label))
        before = known.get(label, Account(label))
        account, new_decisions = _bound(settings, before, caller, owner)
        keep(connection, account)
        rows = horizons.of_owner(connection, label)
        if owner != label:
            rows = horizons.merged(rows, horizons.of_owner(connection, owner))
            horizons.replace(connection, owner, {})
        rows = horizons.moved(rows, label, selection, now, settings.first_days)
        for decision in [*older, *new_decisions]:
            decisions.record(
                settings, msgspec.structs.replace(decision, decided_at=decisions.next_instant(settings))
            )
        horizons.write(settings, lease, label, rows)
    _log_new_username(known.get(label), account, caller)
    return account


def _bound(
    settings: Settings, before: Account, caller: Caller, owner: str
) -> tuple[Account, list[AccountBound]]:
    """Return the account with its new bindings, and the decision that records them."""
    usernames = before.usernames
    if caller.username is not None:
        usernames = (*(name for name in usernames if name != caller.username), caller.username)
    new_key = None
    if not before.has_key(settings):
        new_key = owner if owner.startswith(FINGERPRINT) else settings.fingerprint()
    at = decisions.next_instant(settings)
    account = Account(
        label=before.label,
        usernames=usernames,
        key_ids=(*before.key_ids, new_key) if new_key else before.key_ids,
        is_sandbox=caller.is_sandbox,
        bound_at=before.bound_at or datetime.now(UTC),
    )
    return account, [_decision(account.label, caller.username, new_key, caller.is_sandbox, at)]


def _decision(
    label: str, username: str | None, key_id: str | None, is_sandbox: bool, at: datetime
) -> AccountBound:
    return AccountBound(
        decided_at=at,
        decided_by=decisions.user_name(),
        account=label,
        username=username,
        key_id=key_id,
        is_sandbox=is_sandbox,
    )


def _record_older_accounts(
    settings: Settings, connection: sa.Connection, known: Mapping[str, Account], but: str
) -> Iterator[AccountBound]:
    """Record the accounts that an older faletl loaded, except `but`; warn of ambiguous usernames."""
    older = [account for account in known.values() if account.bound_at is None]
    if not older:
        return
    recorded = {label: account for label, account in known.items() if account.bound_at is not None}
    _, doubtful = _names_of_older(connection, recorded, [account.label for account in older])
    for name, labels_of_name in sorted(doubtful.items()):
        labels = ", ".join(map(ascii, sorted(labels_of_name)))
        log.warning("fal's account %a was loaded under several labels, %s, so it counts more than once; "
                    "delete one of them with faletl accounts forget", name, labels)  # fmt: skip
    at = decisions.next_instant(settings)
    for account in older:
        is_sandbox = bool(account.is_sandbox)
        for username in account.usernames or (None,):
            yield _decision(account.label, username, None, is_sandbox, at)
        if account.label != but:
            keep(connection, replace(account, is_sandbox=is_sandbox, bound_at=datetime.now(UTC)))


def keep(connection: sa.Connection, account: Account) -> None:
    """Replace the label's row in ops.accounts, inside a transaction."""
    connection.execute(sa.delete(ACCOUNTS).where(ACCOUNTS.c.account == account.label))
    connection.execute(
        sa.insert(ACCOUNTS).values(
            account=account.label,
            usernames=_texts(account.usernames),
            key_ids=_texts(account.key_ids),
            is_sandbox=bool(account.is_sandbox),
            bound_at=account.bound_at,
        )
    )


def _texts(texts: Sequence[str]) -> str:
    return msgspec.json.encode(texts).decode()


def _log_new_username(before: Account | None, account: Account, caller: Caller) -> None:
    """Log a new username of the account."""
    name = caller.username
    if before is None or name is None or name in before.usernames:
        return
    if before.usernames:
        log.warning("fal renamed the account %a to %a; it keeps its label %a", before.usernames[-1],
                    name, account.label)  # fmt: skip
    elif name != account.label:
        log.warning("the account %a is now bound to fal's account %a", account.label, name)

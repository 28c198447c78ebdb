"""Accounts: under which label the data of a key is kept, by what fal says of the account.

A label is bound to fal's usernames of the account and to its keys. A username can be renamed, keys are
replaced, and fal may refuse to say the username: so either of the two is enough to know an account
again, and what contradicts both is refused before anything is loaded. Of a key only a fingerprint of
its id is kept: salted, so that it can be compared with a key and tells nothing else.
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
"""The label of the first account of a warehouse, where fal refuses to say its username."""


@dataclass(frozen=True, slots=True)
class Account:
    """A label and what it is bound to. `usernames` are fal's, the newest last; `key_ids` fingerprints.

    `is_sandbox` is None, and `bound_at` too, where an older faletl loaded the account and nothing is
    written down of it yet.
    """

    label: str
    usernames: tuple[str, ...] = ()
    key_ids: tuple[str, ...] = ()
    is_sandbox: bool | None = None
    bound_at: datetime | None = None

    def has_key(self, settings: Settings, *, metrics: bool = False) -> bool:
        """Whether FAL_KEY (or FAL_METRICS_KEY) was seen with the account."""
        return any(settings.has_fingerprint(one, metrics=metrics) for one in self.key_ids)

    @property
    def is_free(self) -> bool:
        """Whether nothing tells whose the label is."""
        return not self.usernames and not self.key_ids


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom fal takes FAL_KEY for: the `username` is None where it does not say, see `why_nameless`."""

    is_sandbox: bool
    username: str | None = None
    why_nameless: FaletlError | None = None

    @property
    def name(self) -> str:
        """Who it is, in words for people; nothing of the key."""
        return f"fal's account {self.username!a}" if self.username else "the key in FAL_KEY"


@dataclass(frozen=True, slots=True)
class SignedIn:
    """The account of a run. `owners` are the label and, where it could not be bound, its key.

    Nothing that landed under the label before `bound_at` is of this account: it may have had another.
    """

    label: str
    owners: tuple[str, ...]
    username: str | None
    bound_at: datetime


# --- Who is known ---------------------------------------------------------------------------------


def known_accounts(connection: sa.Connection) -> dict[str, Account]:
    """Return every account of the warehouse by its label, also those that an older faletl loaded."""
    found = connection.execute(sa.select(ACCOUNTS)).mappings().all()
    known = {
        row["account"]: Account(
            label=row["account"],
            usernames=tuple(msgspec.json.decode(row["usernames"])),
            key_ids=tuple(msgspec.json.decode(row["key_ids"])),
            is_sandbox=row["is_sandbox"],
            bound_at=row["bound_at"].astimezone(UTC),
        )
        for row in found
    }
    loaded = connection.execute(sa.select(LOADS.c.account).distinct()).scalars()
    if unwritten := sorted(set(loaded) - known.keys()):
        names, _ = _names_of_older(connection, known, unwritten)
        for label in unwritten:
            is_sandbox = True if invented.ACCOUNT in names[label] else None
            known[label] = Account(label, tuple(names[label]), is_sandbox=is_sandbox)
    return known


def known_to_readers(connection: sa.Connection) -> dict[str, Account]:
    """Return the same of what is published; nothing where an older faletl, or no right, hides it."""
    is_shown = all(columns_of(connection, table) for table in (ACCOUNTS, LOADS, RAW[CREDITS.name]))
    return known_accounts(connection) if is_shown else {}


def _names_of_older(
    connection: sa.Connection, known: Mapping[str, Account], labels: Collection[str]
) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """Return the usernames that raw.credits has of each label; and those that it has of several.

    A name found under two labels tells nothing: one account was loaded twice by an older faletl.
    """
    table = RAW[CREDITS.name].c
    found = connection.execute(
        sa.select(table["_account"], table.username)
        .where(table["_account"].in_(sorted(labels)))
        .group_by(table["_account"], table.username)
        .order_by(sa.func.max(table["_snapshot_at"]), table.username)
    ).all()
    labels_of: dict[str, set[str]] = {}
    for label, name in [*found, *((a.label, name) for a in known.values() for name in a.usernames)]:
        labels_of.setdefault(name, set()).add(label)
    doubtful = {name: among for name, among in labels_of.items() if len(among) > 1}
    names: dict[str, list[str]] = {label: [] for label in labels}
    for label, name in found:
        if name not in doubtful:
            names[label].append(name)
    return names, doubtful


def require_known(connection: sa.Connection, label: str | None) -> None:
    """Raises LeaseLostError where somebody renamed or forgot the account while a run was under way."""
    if label is not None and label not in known_accounts(connection):
        raise LeaseLostError(
            f"the account {label!a} was renamed or forgotten meanwhile (faletl accounts); nothing was "
            "written under the old label, and the next run goes on under the new one"
        )


# --- Which label it is ----------------------------------------------------------------------------


def label_of(known: Mapping[str, Account], caller: Caller, settings: Settings) -> str:
    """Return the label of the caller's account (docs/decisions.md, "Accounts").

    Raises:
        UsageError: username, key and FALETL_ACCOUNT contradict each other; or nothing says which of the
            accounts it is; or a sandbox answers for a warehouse of fal's accounts, or the reverse.
        ContractError: fal's answer has no usable username, and nothing else says which account it is.
    """
    _refuse_mixture(known, caller, settings)
    by_key = next((one.label for one in known.values() if one.has_key(settings)), None)
    by_name = next((one.label for one in known.values() if caller.username in one.usernames), None)
    if by_key and by_name and by_key != by_name:
        raise UsageError(
            f"the key in FAL_KEY is known as one of account {by_key!a}, but fal says that it is of "
            f"{caller.username!a}, which is account {by_name!a}; set FAL_KEY to a key of {by_key!a}, or "
            f"forget the account that is wrong: faletl accounts forget"
        )
    label = by_key or by_name
    _refuse_metrics_key(known, label, settings)
    if settings.account is not None:
        return _given_label(known, caller, settings.account, label)
    return label or _new_label(known, caller)


def _given_label(known: Mapping[str, Account], caller: Caller, given: str, label: str | None) -> str:
    if label is not None and given != label:
        cure = (
            f"set FALETL_ACCOUNT={label}, or FAL_KEY to a key of {given!a}"
            if given in known
            else f"to give it that label: faletl accounts rename {label!a} {given!a}"
        )
        raise UsageError(
            f"FALETL_ACCOUNT is {given!a}, but {caller.name} is account {label!a} here; {cure}"
        )
    names = known[given].usernames if label is None and given in known else ()
    if caller.username and names and caller.username not in names:
        raise UsageError(
            f"FALETL_ACCOUNT is {given!a}, which is fal's account {names[-1]!a} here, but the key in "
            f"FAL_KEY is of fal's account {caller.username!a}; correct one of the two, or, if fal "
            "renamed the account, run once with a key that was used before"
        )
    return given


def _new_label(known: Mapping[str, Account], caller: Caller) -> str:
    """The label of an account that neither its username nor its key is known of."""
    if len(known) == 1 and all(one.is_free for one in known.values()):
        return next(iter(known))  # as an older faletl loaded it, which wrote down whose it was nowhere
    if caller.username is None:
        why = caller.why_nameless
        if isinstance(why, ContractError) and not isinstance(why, NotFoundError):
            raise why
        if not known:
            return NAMELESS
        raise UsageError(
            f"fal does not say whose the key in FAL_KEY is ({why}), it was never used "
            f"here, and the warehouse holds {_listed(known)}; set FALETL_ACCOUNT to the account's label"
        )
    if caller.username in known and known[caller.username].usernames:
        raise UsageError(
            f"the label {caller.username!a} is that of fal's account "
            f"{known[caller.username].usernames[-1]!a} here; set FALETL_ACCOUNT to another label for "
            f"{caller.name}"
        )
    return caller.username


def _refuse_metrics_key(known: Mapping[str, Account], label: str | None, settings: Settings) -> None:
    """FAL_KEY alone decides which account it is; the second key must at least be of no other one."""
    for one in known.values():
        if one.label != label and one.has_key(settings, metrics=True):
            whose = f"of {label!a}" if label else "of no account that is known here"
            raise UsageError(
                f"FAL_METRICS_KEY is a key of account {one.label!a}, but FAL_KEY is {whose}; set both "
                "to keys of the same account"
            )


def _refuse_mixture(known: Mapping[str, Account], caller: Caller, settings: Settings) -> None:
    """Invented money never joins real money."""
    others = [
        one.label for one in known.values() if _is_sandbox(one, caller, settings) != caller.is_sandbox
    ]
    if not others:
        return
    if caller.is_sandbox:
        raise UsageError(
            f"{settings.api_url} is a sandbox, whose data is invented, but the warehouse holds "
            f"{_listed(others)} of fal; set FALETL_WAREHOUSE and FALETL_LANDING to others for it"
        )
    raise UsageError(
        f"the warehouse holds {_listed(others)} of a sandbox, whose data is invented, but "
        f"{settings.api_url} is fal; set FALETL_WAREHOUSE and FALETL_LANDING to others for it"
    )


def _is_sandbox(account: Account, caller: Caller, settings: Settings) -> bool:
    """Whether the account is invented; one that an older faletl loaded is real if nothing shows it."""
    if account.is_sandbox is not None:
        return account.is_sandbox
    is_own = caller.username in account.usernames and settings.has_sandbox_key
    return is_own and caller.is_sandbox


def _listed(labels: Iterable[str]) -> str:
    names = sorted(labels)
    return f"account{'s' * (len(names) > 1)} {', '.join(map(ascii, names))}"


# --- Signing in -----------------------------------------------------------------------------------


def sign_in(
    client: FalClient, settings: Settings, warehouse: Warehouse, asked: Asked, now: datetime
) -> SignedIn:
    """Return the account of FAL_KEY, bound; write down before that from which day on it is asked for.

    A new username or key is bound to its label once fal has answered a question about usage to the key:
    so a key that is wrong, or of no use, binds nothing. A key that may not read usage can still be used
    with an account that is bound already.

    Raises:
        UsageError: see `label_of`; nothing is changed.
        KeyRefusedError: fal refuses usage to a key whose account is not bound yet.
        ApiUnavailableError, ContractError: fal could not be asked.
        WarehouseError, StorageError: nothing can be written.
    """
    known, owner = _known_to(warehouse, settings)
    if owner in known and settings.account is not None:
        _given_label(known, Caller(is_sandbox=False), settings.account, owner)
    owner = owner or settings.fingerprint()
    before = horizons.remember(settings, warehouse, owner, asked, now)
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
    account = _bind(settings, warehouse, caller, owner, asked, now)
    return _signed_in(account, caller, account.label)


def look_up(client: FalClient, settings: Settings, known: Mapping[str, Account]) -> str:
    """Return the label of the account of FAL_KEY; nothing is written. Raises as `sign_in`."""
    return label_of(known, _caller(client, settings), settings)


def preview(client: FalClient, settings: Settings, warehouse: Warehouse) -> SignedIn:
    """Return what `sign_in` would; nothing is written, and usage is not asked for. Raises alike."""
    known, owner = _known_to(warehouse, settings)
    caller = _caller(client, settings)
    label = label_of(known, caller, settings)
    return _signed_in(known.get(label, Account(label)), caller, owner or label)


def _signed_in(account: Account, caller: Caller, owner: str) -> SignedIn:
    owners = tuple(dict.fromkeys((account.label, owner)))
    return SignedIn(account.label, owners, caller.username, account.bound_at or LONG_AGO)


def label_of_key(warehouse: Warehouse, settings: Settings) -> str | None:
    """Return the label of FAL_KEY, or the only one there is; None if that leaves it open."""
    known, owner = _known_to(warehouse, settings)
    only = next(iter(known)) if len(known) == 1 else None
    return owner if owner in known else only


def _known_to(warehouse: Warehouse, settings: Settings) -> tuple[dict[str, Account], str | None]:
    """All accounts; and the label of FAL_KEY, or the fingerprint under which its horizons stand."""
    with warehouse.reading() as connection:
        if connection is None:
            return {}, None
        known = known_accounts(connection)
        return known, owner_of_key(settings, connection, known.values())


def owner_of_key(settings: Settings, connection: sa.Connection, known: Iterable[Account]) -> str | None:
    """Return the label of FAL_KEY, or the fingerprint under which its horizons stand; None without."""
    if settings.key is None:
        return None
    owners = sa.select(HORIZONS.c.account).where(HORIZONS.c.account.startswith(FINGERPRINT)).distinct()
    pending = (one for one in connection.execute(owners).scalars() if settings.has_fingerprint(one))
    return next((one.label for one in known if one.has_key(settings)), None) or next(pending, None)


def set_horizon(
    settings: Settings, day: date, resources: Collection[str] = (), label: str | None = None
) -> None:
    """Set the first day to load of these resources (none: of all by day), as `faletl horizon --set`.

    It is that of the account with this label, or else of FALETL_ACCOUNT, of FAL_KEY, or of the only
    one. Of a key that was never used it holds from its first run on.

    Raises:
        UsageError: day, resource or account cannot be meant.
    """
    horizons.refuse_odd(day, resources)
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:  # so that wrong use makes no warehouse
        _horizons_of(settings, connection, label)
    with warehouse.lease("faletl horizon") as lease, lease.transaction():
        owner = _horizons_of(settings, lease.connection, label)
        horizons.decide(settings, lease, owner, day, resources)


def _horizons_of(settings: Settings, connection: sa.Connection | None, label: str | None) -> str:
    """The label, or the fingerprint of a key that was never used, whose horizons are meant."""
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
        "name the account whose horizon is meant with --account; see faletl accounts"
        if known
        else "there is no account yet; run faletl run first, or set FAL_KEY"
    )


def _is_bound(account: Account, caller: Caller, settings: Settings) -> bool:
    """Whether all that fal says of the caller is written down, the username as the newest."""
    is_newest = caller.username is None or caller.username in account.usernames[-1:]
    return account.bound_at is not None and is_newest and account.has_key(settings)


def _caller(client: FalClient, settings: Settings) -> Caller:
    """Ask fal whose the key is. A refusal, or no such path, says nothing; any other failure raises."""
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
    """Return the account's name in an answer of /account/billing.

    Raises:
        ContractError, MalformedBodyError: there is none.
    """
    try:
        username = msgspec.json.decode(as_json(body), type=dict[str, msgspec.Raw])["username"]
        label = msgspec.json.decode(username, type=str)
    except msgspec.ValidationError as error:
        raise ContractError(f"fal's account has no proper name: {error}") from None
    except UNREADABLE as error:
        raise MalformedBodyError(f"the answer is no whole JSON document ({error})") from None
    except KeyError:
        raise ContractError("fal's account has no username; set FALETL_ACCOUNT") from None
    if not label.strip():
        raise ContractError("fal's account has an empty username; set FALETL_ACCOUNT")
    if not is_label(label):
        raise ContractError("fal's account has a username that cannot be a label; set FALETL_ACCOUNT")
    return label


def ask_for_usage(client: FalClient, settings: Settings, now: datetime) -> None:
    """Ask for a row of the last full hour; raises KeyRefusedError with what the key would need."""
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
    asked: Asked,
    now: datetime,
) -> Account:
    """Bind username and key to their label, and the horizons of the key with them; all or nothing."""
    with warehouse.lease("faletl, which binds an account") as lease, lease.transaction():
        fence(lease, changes_data=False)
        connection = lease.connection
        known = known_accounts(connection)
        label = label_of(known, caller, settings)  # somebody may have bound it meanwhile
        made = list(_write_down_older(settings, connection, known, label))
        before = known.get(label, Account(label))
        account, bound = _bound(settings, before, caller, owner)
        keep(connection, account)
        rows = horizons.of_owner(connection, label)
        if owner != label:
            rows = horizons.merged(rows, horizons.of_owner(connection, owner))
            horizons.replace(connection, owner, {})
        rows = horizons.moved(rows, label, asked, now, settings.first_days)
        for one in [*made, *bound]:
            decisions.record(
                settings, msgspec.structs.replace(one, decided_at=decisions.next_instant(settings))
            )
        horizons.write(settings, lease, label, rows)
    _tell(known.get(label), account, caller)
    return account


def _bound(
    settings: Settings, before: Account, caller: Caller, owner: str
) -> tuple[Account, list[AccountBound]]:
    """The account with what is new of it; and the decision that says so."""
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


def _write_down_older(
    settings: Settings, connection: sa.Connection, known: Mapping[str, Account], but: str
) -> Iterator[AccountBound]:
    """Write down what an older faletl loaded of other accounts; warn of names that bind nothing."""
    older = [one for one in known.values() if one.bound_at is None]
    if not older:
        return
    written = {label: one for label, one in known.items() if one.bound_at is not None}
    _, doubtful = _names_of_older(connection, written, [one.label for one in older])
    for name, among in sorted(doubtful.items()):
        labels = ", ".join(map(ascii, sorted(among)))
        log.warning("fal's account %a was loaded under several labels, %s, so it counts more than once; "
                    "take one of them out with faletl accounts forget", name, labels)  # fmt: skip
    at = decisions.next_instant(settings)
    for one in older:
        is_sandbox = bool(one.is_sandbox)
        for username in one.usernames or (None,):
            yield _decision(one.label, username, None, is_sandbox, at)
        if one.label != but:
            keep(connection, replace(one, is_sandbox=is_sandbox, bound_at=datetime.now(UTC)))


def keep(connection: sa.Connection, account: Account) -> None:
    """Inside a transaction: make this what ops.accounts says of the label."""
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


def _tell(before: Account | None, account: Account, caller: Caller) -> None:
    name = caller.username
    if before is None or name is None or name in before.usernames:
        return
    if before.usernames:
        log.warning("fal calls the account %a now %a; it keeps its label %a", before.usernames[-1], name,
                    account.label)  # fmt: skip
    elif name != account.label:
        log.warning("the account %a is taken to be fal's account %a", account.label, name)

"""The line in pieces that any worker can take: one plans, many extract, one loads.

What they hand each other is the path of a plan, which lies beside the landed pages, and which of its
windows are meant. `faletl run` does the same in one process; a scheduler calls these.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Self, TypedDict

import msgspec

from faletl.config import Settings
from faletl.errors import (
    AccountLockedError,
    ApiUnavailableError,
    ContractError,
    FaletlError,
    TamperedError,
)
from faletl.fal.client import FalClient
from faletl.files import scratch_folder, storage_error
from faletl.landing import extracts
from faletl.landing.extracts import SealedExtract
from faletl.landing.storage import backend_for, parse_location, write_durably
from faletl.line import accounts, holds
from faletl.line.accounts import SignedIn
from faletl.line.extract import fencing_token, prove_or_reread, worked
from faletl.line.fetch import Origin, ask_ahead
from faletl.line.load import load_reads, record_failures
from faletl.line.overlap import charges_first
from faletl.line.plan import Task, first_planned, plan, with_ids
from faletl.line.report import Report, new_run_id, outcome_of
from faletl.resources import RESOURCES
from faletl.selection import Asked
from faletl.staging.window import Staged
from faletl.warehouse import horizons, open_warehouse
from faletl.warehouse.ledger import reads_by_day
from faletl.warehouse.protocol import Warehouse
from faletl.windows import LONG_AGO, Window
from faletl.wire import UNREADABLE

log = logging.getLogger(__name__)

MOST_PIECES = 24
"""A plan is cut into at most so many: a task costs a scheduler seconds, however little it does."""

MOST_BATCHES = 40
"""As many as fal's catalogue makes, and some."""

_IN_USE = timedelta(days=7)
"""A plan is younger while tasks of its run may still be tried."""


class Piece(TypedDict):
    """Consecutive windows of a plan, by their numbers in it; `windows` names them for people."""

    plan: str
    first: int
    end: int
    windows: str


class Batch(TypedDict):
    """Some of the endpoint ids that one window of a plan asks for; `ids` names them for people."""

    plan: str
    window: int
    number: int
    ids: str


class Planned(msgspec.Struct, frozen=True):
    """A `Task` as it stands in a plan."""

    resource: str
    start: datetime
    end: datetime
    ids: list[str] = []
    is_whole_catalogue: bool = False
    ahead: list[str] = []

    @classmethod
    def of(cls, task: Task, now: datetime) -> Self:
        """The task, with a read to ask each batch of ids ahead in, where there are several."""
        batches = math.ceil(len(task.ids) / (task.resource.ids_per_call or len(task.ids) or 1))
        ahead = [extracts.new_extract_id(now) for _ in range(batches)] if batches > 1 else []
        window = task.window
        ids, is_whole = list(task.ids), task.is_whole_catalogue
        return cls(task.resource.name, window.start, window.end, ids, is_whole, ahead)

    @property
    def task(self) -> Task:
        """The task."""
        window = Window(self.start, self.end)
        ids, ahead = tuple(self.ids), tuple(self.ahead)
        return Task(RESOURCES[self.resource], window, ids, self.is_whole_catalogue, ahead)


class Plan(msgspec.Struct, frozen=True):
    """What a run reads, as it was planned; `fencing_token` is the newest one that was known then."""

    run_id: str
    account: str
    fencing_token: int
    planned_from: dict[str, date]
    windows: list[Planned]
    bound_at: datetime = LONG_AGO
    accepted: list[str] = []

    @property
    def origin(self) -> Origin:
        """What the reads of one task have in common: it begins now."""
        unknown_ids = {name: set[str]() for name in RESOURCES}
        now = datetime.now(UTC)
        return Origin(
            self.account,
            self.run_id,
            now,
            self.fencing_token,
            self.planned_from,
            unknown_ids,
            self.bound_at,
            frozenset(self.accepted),
        )


def make_plan(settings: Settings, asked: Asked, *, is_first_due: bool = False) -> str | None:
    """Write down what `faletl run` would read now; returns the path, None if nothing is due.

    With `is_first_due` the first read ever of a resource is of what is due, recent days asked for or
    not: who tries a new DAG by hand has its history at once, and not with the next run that is due.

    Raises:
        UsageError: settings that cannot mean anything; no key.
        KeyRefusedError: fal accepts the key for nothing, or not for usage and its account is not known.
        AccountLockedError: fal locked the account.
        ApiUnavailableError, ContractError: fal did not say whose the key is.
        WarehouseError, StorageError: the warehouse, or the plan, cannot be written.
    """
    settings.require_key()
    now, run_id, warehouse = datetime.now(UTC), new_run_id(), open_warehouse(settings)
    with _locks_recorded(settings, Report(run_id)):
        signed_in = _sign_in(settings, warehouse, asked, now)
    account = signed_in.label
    if is_first_due and _is_first(warehouse, account, asked) and not _is_older(settings, asked, now):
        asked = Asked(resources=asked.resources)
        horizons.remember(settings, warehouse, account, asked, now)
    with warehouse.reading() as connection:
        tasks = plan(settings, connection, account, asked, now, owners=signed_in.owners)
        first, rest = charges_first(connection, account, tasks)
        tasks = [*first, *rest]
        by_ids = [task for task in tasks if task.resource.ids_per_call is not None]
        known = {(t.resource.name, t.window): t for t in with_ids(connection, account, by_ids, now)}
        token, accepted = fencing_token(connection), sorted(holds.accepted_rows(connection))
    if by_ids and not known:
        log.warning("no endpoint is known yet to ask for; load usage or models first")
    planned_from = first_planned(tasks)
    tasks = [known.get((t.resource.name, t.window), t) for t in tasks]
    windows = [Planned.of(t, now) for t in tasks if t.resource.ids_per_call is None or t.ids]
    if not windows:
        return None
    made = Plan(run_id, account, token, planned_from, windows, signed_in.bound_at, accepted)
    folder = extracts.root(settings) / extracts.PLANS
    path = folder / f"{made.run_id}.json"
    try:
        backend_for(folder).make(folder)
        for old in old_plans(settings, now):
            backend_for(old).delete(old)
    except OSError as error:
        raise storage_error(error, path) from None
    write_durably(path, msgspec.json.format(msgspec.json.encode(made), indent=1))
    log.info("%d windows of account %s are to be read: %s", len(windows), account, path)
    return str(path.absolute())


def _sign_in(settings: Settings, warehouse: Warehouse, asked: Asked, now: datetime) -> SignedIn:
    """The account; a key that can do nothing is refused here once, and not in each task that follows."""
    with FalClient(settings) as client:
        signed_in = accounts.sign_in(client, settings, warehouse, asked, now)
        if signed_in.username is None:  # fal let the key read nothing so far
            with suppress(ApiUnavailableError, ContractError):
                accounts.ask_for_usage(client, settings, now)
    return signed_in


def read_plan(path: str) -> Plan:
    """The plan at that path.

    Raises:
        TamperedError: it is not there, or none of ours.
        SettingsError, StorageError: see `faletl.landing.extracts.root`.
    """
    try:
        file = parse_location(path)
        return msgspec.json.decode(backend_for(file).read(file), type=Plan)
    except (OSError, *UNREADABLE) as error:
        raise TamperedError(
            f"the plan {path} cannot be read ({error}); every worker must see the same FALETL_LANDING"
        ) from None


def old_plans(settings: Settings, now: datetime) -> list[Path]:
    """The plans that are older than FALETL_KEEP_DAYS, and whose runs have ended; raises StorageError."""
    folder = extracts.root(settings) / extracts.PLANS
    kept = max(timedelta(days=settings.keep_days), _IN_USE)
    oldest = f"{now - kept:%Y%m%dT%H%M%SZ}"  # a plan is named for when it was made
    names = sorted(backend_for(folder).names(folder))
    return [folder / name for name in names if name[:1].isdigit() and name < oldest]


def pieces(path: str, most: int = MOST_PIECES) -> list[Piece]:
    """The plan's windows in at most so many pieces of about the same size, in order."""
    windows = read_plan(path).windows
    size = math.ceil(len(windows) / most)
    return [
        Piece(plan=path, first=first, end=first + len(part), windows=_span(part))
        for first in range(0, len(windows), max(size, 1))
        for part in [windows[first : first + size]]
    ]


def batches(path: str) -> list[Batch]:
    """The batches of endpoint ids to ask ahead: of windows that ask for more than one call takes.

    None where there are more than `MOST_BATCHES`: with so many windows, work is spread without them.
    """
    found = [
        Batch(
            plan=path, window=at, number=number, ids=f"{_span([one])}, {number + 1} of {len(one.ahead)}"
        )
        for at, one in enumerate(read_plan(path).windows)
        for number in range(len(one.ahead))
    ]
    return found if len(found) <= MOST_BATCHES else []


def ask_batch(settings: Settings, batch: Batch) -> bool:
    """Land what fal answers for one batch of ids, for `extract_piece` to find.

    Raises: as `faletl.line.fetch.ask_ahead`.
    """
    made = read_plan(batch["plan"])
    task, number = made.windows[batch["window"]].task, batch["number"]
    size = task.resource.ids_per_call or len(task.ids)
    ids = task.ids[number * size : (number + 1) * size]
    with FalClient(settings) as client:
        return ask_ahead(
            client, settings, made.account, task.resource, task.window, ids, task.ahead[number]
        )


def extract_piece(settings: Settings, piece: Piece) -> Report:
    """Fetch, land and prove the windows of a piece; those that an earlier try landed are taken as read.

    Raises:
        KeyRefusedError, AccountLockedError: fal refused the key, or locked the account; nothing more is
            asked.
        StorageError, WarehouseError: nothing more can be written.
    """
    made = read_plan(piece["plan"])
    report = Report(made.run_id, made.account)
    tasks = [planned.task for planned in made.windows[piece["first"] : piece["end"]]]
    origin = made.origin
    with FalClient(settings) as client, scratch_folder() as scratch:

        def work(task: Task) -> Staged:
            landed = _landed(settings, made, task)
            return prove_or_reread(client, settings, task, scratch, origin, landed)

        with _locks_recorded(settings, report):
            for batch, _ in worked(client, settings, tasks, work, report):
                for staged in batch:
                    report.outcomes.append(outcome_of(staged, "landed"))
                    staged.discard()
    record_failures(settings, report)
    return report


@contextmanager
def _locks_recorded(settings: Settings, report: Report) -> Iterator[None]:
    """Record that fal locked the account for `faletl status`, before the error ends the task."""
    try:
        yield
    except AccountLockedError as error:
        report.failures.append((None, error))
        record_failures(settings, report)
        raise


def load_plan(settings: Settings, path: str) -> Report:
    """Stage and load all that landed for the plan, in its order; what is refused goes to the report."""
    made = read_plan(path)
    report = Report(made.run_id, made.account)
    load_reads(settings, list(_all_landed(settings, made, report)), report)
    return report


def _all_landed(settings: Settings, made: Plan, report: Report) -> Iterator[SealedExtract]:
    for planned in made.windows:
        try:
            landed = _landed(settings, made, planned.task)
        except FaletlError as error:
            report.failures.append((planned.task, error))
            continue
        if landed is not None:
            yield landed


def _landed(settings: Settings, made: Plan, task: Task) -> SealedExtract | None:
    return extracts.read_of_run(settings, made.account, task.resource.name, task.window, made.run_id)


def _is_first(warehouse: Warehouse, account: str, asked: Asked) -> bool:
    """Whether days are asked for of resources of which nothing is loaded yet."""
    days = [name for name in asked.resources if name in horizons.BY_DAY]
    with warehouse.reading() as connection:
        is_loaded = connection is not None and any(
            reads_by_day(connection, account, name) for name in days
        )
    return bool(days) and not is_loaded


def _is_older(settings: Settings, asked: Asked, now: datetime) -> bool:
    """Whether days are asked for that are not due at first."""
    first = now.date() - timedelta(days=settings.first_days)
    return asked.start is not None and asked.start < first


def _span(windows: Sequence[Planned]) -> str:
    first, last = windows[0].task, windows[-1].task
    name = first.resource.name
    return f"{name} {first.window}" + (f" to {last.window}" if len(windows) > 1 else "")

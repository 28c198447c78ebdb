"""Run the line across workers: one task plans, many extract chunks, one loads.

Tasks pass each other only the path of a plan, stored next to the landed pages, and the numbers of its
windows. `faletl run` does the same in one process; a scheduler calls these functions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Self, TypedDict

import msgspec

from faletl.config import Settings
from faletl.errors import (
    AccountLockedError,
    ApiUnavailableError,
    ContractError,
    FaletlError,
    KeyRefusedError,
    TamperedError,
)
from faletl.fal.client import FalClient
from faletl.files import scratch_folder, storage_error
from faletl.landing import extracts
from faletl.landing.extracts import SealedExtract
from faletl.landing.storage import backend_for, parse_location, write_durably
from faletl.line import accounts, holds
from faletl.line.accounts import SignedIn
from faletl.line.extract import fencing_token, fetch_until_proven, run_concurrently
from faletl.line.fetch import RunContext, ask_ahead
from faletl.line.load import load_extracts, record_failures
from faletl.line.overlap import charges_first
from faletl.line.plan import Task, first_planned, plan, with_ids
from faletl.line.report import Report, new_run_id, result_of
from faletl.resources import RESOURCES
from faletl.selection import Asked
from faletl.staging.window import Staged
from faletl.warehouse import horizons, open_warehouse
from faletl.warehouse.ledger import last_extracts
from faletl.warehouse.protocol import Warehouse
from faletl.windows import LONG_AGO, Window
from faletl.wire import UNREADABLE

log = logging.getLogger(__name__)

MAX_CHUNKS = 24
"""A plan is split into at most this many chunks: each task costs a scheduler seconds."""

MAX_BATCHES = 40
"""Slightly more than the batches that fal's catalogue needs."""

_IN_USE = timedelta(days=7)
"""Tasks of a run are not retried after this time, so its plan can be deleted."""


class Chunk(TypedDict):
    """Consecutive windows of a plan, by their numbers in it; `windows` is their name for people."""

    plan: str
    first: int
    end: int
    windows: str


class Batch(TypedDict):
    """A batch of endpoint ids of one window of a plan; `ids` is its name for people."""

    plan: str
    window: int
    number: int
    ids: str


class PlannedTask(msgspec.Struct, frozen=True):
    """A `Task` as it is stored in a plan."""

    resource: str
    start: datetime
    end: datetime
    ids: list[str] = []
    is_whole_catalogue: bool = False
    ahead: list[str] = []

    @classmethod
    def of(cls, task: Task, now: datetime) -> Self:
        """Return the stored form of a task; each of several batches of ids gets an extract id."""
        batches = math.ceil(len(task.ids) / (task.resource.ids_per_call or len(task.ids) or 1))
        ahead = [extracts.new_extract_id(now) for _ in range(batches)] if batches > 1 else []
        window = task.window
        ids, is_whole = list(task.ids), task.is_whole_catalogue
        return cls(task.resource.name, window.start, window.end, ids, is_whole, ahead)

    @property
    def task(self) -> Task:
        """The task that was stored."""
        window = Window(self.start, self.end)
        ids, ahead = tuple(self.ids), tuple(self.ahead)
        return Task(RESOURCES[self.resource], window, ids, self.is_whole_catalogue, ahead)


class Plan(msgspec.Struct, frozen=True):
    """The windows of a run, as planned; `fencing_token` is the newest one at that time."""

    run_id: str
    account: str
    fencing_token: int
    planned_from: dict[str, date]
    windows: list[PlannedTask]
    bound_at: datetime = LONG_AGO
    accepted: list[str] = []

    @property
    def origin(self) -> RunContext:
        """The context of a task that starts now."""
        unknown_ids = {name: set[str]() for name in RESOURCES}
        now = datetime.now(UTC)
        return RunContext(
            self.account,
            self.run_id,
            now,
            self.fencing_token,
            self.planned_from,
            unknown_ids,
            self.bound_at,
            frozenset(self.accepted),
        )


def write_plan(settings: Settings, selection: Asked, *, is_first_due: bool = False) -> str | None:
    """Store a plan of what `faletl run` would extract now; return its path, None if nothing is due.

    With `is_first_due`, the first extract ever of a resource covers all due days, even if only recent
    days were asked for: a new DAG that is run by hand loads its history at once.

    Raises:
        UsageError: invalid settings, or no key.
        KeyRefusedError: fal refuses the key, or refuses usage to a key whose account is unknown.
        AccountLockedError: fal locked the account.
        ApiUnavailableError, ContractError: fal did not return the account of the key.
        WarehouseError, StorageError: the warehouse, or the plan, cannot be written.
    """
    settings.require_key()
    now, run_id, warehouse = datetime.now(UTC), new_run_id(), open_warehouse(settings)
    with _locks_recorded(settings, Report(run_id)):
        signed_in = _sign_in(settings, warehouse, selection, now)
    account = signed_in.label
    if (
        is_first_due
        and _is_first(warehouse, account, selection)
        and not _is_older(settings, selection, now)
    ):
        selection = Asked(resources=selection.resources)
        horizons.remember(settings, warehouse, account, selection, now)
    with warehouse.reading() as connection:
        tasks = plan(settings, connection, account, selection, now, owners=signed_in.owners)
        first, rest = charges_first(connection, account, tasks)
        tasks = [*first, *rest]
        by_ids = [task for task in tasks if task.resource.ids_per_call is not None]
        known = {(t.resource.name, t.window): t for t in with_ids(connection, account, by_ids, now)}
        token, accepted = fencing_token(connection), sorted(holds.accepted_rows(connection))
    if by_ids and not known:
        log.warning("no endpoint ids are known yet; load usage or models first")
    planned_from = first_planned(tasks)
    tasks = [known.get((t.resource.name, t.window), t) for t in tasks]
    windows = [PlannedTask.of(t, now) for t in tasks if t.resource.ids_per_call is None or t.ids]
    if not windows:
        return None
    new_plan = Plan(run_id, account, token, planned_from, windows, signed_in.bound_at, accepted)
    folder = extracts.root(settings) / extracts.PLANS
    path = folder / f"{new_plan.run_id}.json"
    try:
        backend_for(folder).make(folder)
        for old in old_plans(settings, now):
            backend_for(old).delete(old)
    except OSError as error:
        raise storage_error(error, path) from None
    write_durably(path, msgspec.json.format(msgspec.json.encode(new_plan), indent=1))
    log.info("planned %d windows of account %s: %s", len(windows), account, path)
    return str(path.absolute())


def _sign_in(settings: Settings, warehouse: Warehouse, selection: Asked, now: datetime) -> SignedIn:
    """Return the account; a useless key is refused here, once, and not in each task that follows."""
    with FalClient(settings) as client:
        signed_in = accounts.sign_in(client, settings, warehouse, selection, now)
        if signed_in.username is None:  # fal has not accepted the key for anything yet
            try:
                accounts.ask_for_usage(client, settings, now)
            except KeyRefusedError as error:
                # With 403 the key may still have other permissions, and each task reports its own.
                if error.facts.get("status") != HTTPStatus.FORBIDDEN:
                    raise
            except (ApiUnavailableError, ContractError):
                pass  # each task that needs usage reports it
    return signed_in


def read_plan(path: str) -> Plan:
    """Read the plan at that path.

    Raises:
        TamperedError: it does not exist, or is not a plan.
        SettingsError, StorageError: see `faletl.landing.extracts.root`.
    """
    try:
        file = parse_location(path)
        return msgspec.json.decode(backend_for(file).read(file), type=Plan)
    except (OSError, *UNREADABLE) as error:
        raise TamperedError(
            f"the plan {path} cannot be read ({error}); make sure that all workers have the same "
            "FALETL_LANDING"
        ) from None


def old_plans(settings: Settings, now: datetime) -> list[Path]:
    """Return plans older than FALETL_KEEP_DAYS whose runs have ended; may raise StorageError."""
    folder = extracts.root(settings) / extracts.PLANS
    kept = max(timedelta(days=settings.keep_days), _IN_USE)
    oldest = f"{now - kept:%Y%m%dT%H%M%SZ}"  # a plan is named for when it was made
    names = sorted(backend_for(folder).names(folder))
    return [folder / name for name in names if name[:1].isdigit() and name < oldest]


def chunks(path: str, most: int = MAX_CHUNKS) -> list[Chunk]:
    """Split the plan's windows into at most `most` chunks of similar size, in order."""
    windows = read_plan(path).windows
    size = math.ceil(len(windows) / most)
    return [
        Chunk(plan=path, first=first, end=first + len(part), windows=_span(part))
        for first in range(0, len(windows), max(size, 1))
        for part in [windows[first : first + size]]
    ]


def batches(path: str) -> list[Batch]:
    """Return the batches of endpoint ids to request ahead, of windows that need more than one call.

    Returns none if there are more than `MAX_BATCHES`: then there are enough windows to spread work.
    """
    all_batches = [
        Batch(
            plan=path,
            window=window_number,
            number=number,
            ids=f"{_span([planned])}, {number + 1} of {len(planned.ahead)}",
        )
        for window_number, planned in enumerate(read_plan(path).windows)
        for number in range(len(planned.ahead))
    ]
    return all_batches if len(all_batches) <= MAX_BATCHES else []


def ask_batch(settings: Settings, batch: Batch) -> bool:
    """Land fal's answers for one batch of ids, for `extract_chunk` to find.

    Raises: as `faletl.line.fetch.ask_ahead`.
    """
    run_plan = read_plan(batch["plan"])
    task, number = run_plan.windows[batch["window"]].task, batch["number"]
    size = task.resource.ids_per_call or len(task.ids)
    ids = task.ids[number * size : (number + 1) * size]
    with FalClient(settings) as client:
        return ask_ahead(
            client, settings, run_plan.account, task.resource, task.window, ids, task.ahead[number]
        )


def extract_chunk(settings: Settings, chunk: Chunk) -> Report:
    """Fetch, land and prove the windows of a chunk, except those that an earlier try landed.

    Raises:
        KeyRefusedError, AccountLockedError: fal refused the key, or locked the account; no further
            request is sent.
        StorageError, WarehouseError: landing folder or warehouse cannot be written.
    """
    run_plan = read_plan(chunk["plan"])
    report = Report(run_plan.run_id, run_plan.account)
    tasks = [planned.task for planned in run_plan.windows[chunk["first"] : chunk["end"]]]
    origin = run_plan.origin
    with FalClient(settings) as client, scratch_folder() as scratch:

        def work(task: Task) -> Staged:
            landed = _landed(settings, run_plan, task)
            return fetch_until_proven(client, settings, task, scratch, origin, landed)

        with _locks_recorded(settings, report):
            for batch, _ in run_concurrently(client, settings, tasks, work, report):
                for staged in batch:
                    report.outcomes.append(result_of(staged, "landed"))
                    staged.discard()
    record_failures(settings, report)
    return report


@contextmanager
def _locks_recorded(settings: Settings, report: Report) -> Iterator[None]:
    """Record for `faletl status` that fal locked the account, before the error ends the task."""
    try:
        yield
    except AccountLockedError as error:
        report.failures.append((None, error))
        record_failures(settings, report)
        raise


def load_plan(settings: Settings, path: str) -> Report:
    """Stage and load all extracts that landed for the plan, in order; refused ones go to the report."""
    run_plan = read_plan(path)
    report = Report(run_plan.run_id, run_plan.account)
    load_extracts(settings, list(_all_landed(settings, run_plan, report)), report)
    return report


def _all_landed(settings: Settings, run_plan: Plan, report: Report) -> Iterator[SealedExtract]:
    for planned in run_plan.windows:
        try:
            landed = _landed(settings, run_plan, planned.task)
        except FaletlError as error:
            report.failures.append((planned.task, error))
            continue
        if landed is not None:
            yield landed


def _landed(settings: Settings, run_plan: Plan, task: Task) -> SealedExtract | None:
    return extracts.read_of_run(
        settings, run_plan.account, task.resource.name, task.window, run_plan.run_id
    )


def _is_first(warehouse: Warehouse, account: str, selection: Asked) -> bool:
    """Return whether days of resources are asked for, and nothing of these is loaded yet."""
    days = [name for name in selection.resources if name in horizons.BY_DAY]
    with warehouse.reading() as connection:
        is_loaded = connection is not None and any(
            last_extracts(connection, account, name) for name in days
        )
    return bool(days) and not is_loaded


def _is_older(settings: Settings, selection: Asked, now: datetime) -> bool:
    """Return whether days before FALETL_FIRST_DAYS are asked for."""
    first = now.date() - timedelta(days=settings.first_days)
    return selection.start is not None and selection.start < first


def _span(windows: Sequence[PlannedTask]) -> str:
    first, last = windows[0].task, windows[-1].task
    name = first.resource.name
    return f"{name} {first.window}" + (f" to {last.window}" if len(windows) > 1 else "")

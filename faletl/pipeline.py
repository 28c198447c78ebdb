"""The steps of a run as functions: the command line and schedulers call only these.

    extract (fetch, land, stage, prove) → load → build → publish

Each step can run again at any time and ends in the same state. A window that fails does not stop the
others: what can be done is done, and the failures are told in the report.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec
import sqlalchemy as sa

from faletl import landing, models
from faletl.client import FalClient, MalformedBodyError, StoppedError
from faletl.config import Settings
from faletl.errors import (
    ContractError,
    FaletlError,
    KeyRefusedError,
    UnprovenError,
    UsageError,
)
from faletl.extract import Origin, fetch_window
from faletl.landing import Landed
from faletl.load import (
    endpoint_ids,
    horizons,
    loaded_reads,
    reads_by_day,
    record_failure,
    replace_window,
)
from faletl.resources import RESOURCES, Resource
from faletl.staging import Staged, stage_window
from faletl.warehouse import Warehouse, open_warehouse
from faletl.warehouse.tables import WAREHOUSE
from faletl.windows import Read, Window, due_days, utc_days

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is under way, how many of its windows are done, and of how many."""


OPTIONAL = frozenset({"credits"})
"""Resources that a key may be refused without ending the run, unless they are asked for by name."""


def _silent(_what: str, _done: int, _of: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One window of one resource to extract."""

    resource: Resource
    window: Window
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one window: landed, loaded, unchanged (the same rows again) or superseded."""

    resource: str
    window: Window
    outcome: str
    rows: int
    path: Path


@dataclass(slots=True)
class Report:
    """What a step did, and what it could not do."""

    run_id: str
    account: str | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[tuple[Task | None, FaletlError]] = field(default_factory=list)
    build: models.Build | None = None
    published: Path | None = None

    @property
    def exit_code(self) -> int:
        """The highest of its failures' exit codes, 0 without any (README, "Exit codes")."""
        return max((error.exit_code for _, error in self.failures), default=0)


# --- The steps ------------------------------------------------------------------------------------


def run(
    settings: Settings,
    *,
    start: date | None = None,
    end: date | None = None,
    resources: Collection[str] = (),
    progress: Progress = _silent,
) -> Report:
    """The whole line, for what is due or for the UTC days from `start` to before `end`.

    Named days are always fetched again; without `end` they go up to now. Models, prices and credits
    are read as of now, once. Nothing is raised that a scheduler could act upon: see the report.

    Raises:
        UsageError: dates, resources or settings that cannot mean anything; no key.
    """
    report = Report(_new_run_id())
    warehouse = open_warehouse(settings)

    def take(batch: list[Staged]) -> None:
        _load_batch(settings, warehouse, batch, report)

    is_writable = _extract_all(
        settings, warehouse, report, take, start=start, end=end, resources=resources, progress=progress
    )
    if is_writable:
        _record_failures(warehouse, report)
        try:
            _build_and_publish(settings, report)
        except FaletlError as error:
            report.failures.append((None, error))
    return report


def extract(
    settings: Settings,
    *,
    start: date | None = None,
    end: date | None = None,
    resources: Collection[str] = (),
    progress: Progress = _silent,
) -> Report:
    """Land and prove the windows that `run` would; load nothing. Raises UsageError, as `run`."""
    report = Report(_new_run_id())

    def take(batch: list[Staged]) -> None:
        report.outcomes.extend(_outcome(staged, "landed") for staged in batch)

    _extract_all(
        settings, open_warehouse(settings), report, take,
        start=start, end=end, resources=resources, progress=progress,
    )  # fmt: skip
    return report


def load(
    settings: Settings,
    *,
    start: date | None = None,
    end: date | None = None,
    resources: Collection[str] = (),
    progress: Progress = _silent,
) -> Report:
    """Stage, prove and load what has landed and is not loaded yet; asks fal nothing."""
    report = Report(_new_run_id())
    _check(start, end, resources)
    warehouse = open_warehouse(settings)
    waiting = [
        landed
        for landed in _not_loaded(settings, warehouse, report)
        if _is_wanted(landed.manifest.resource, landed.manifest.window, start, end, resources)
    ]
    with tempfile.TemporaryDirectory(prefix="faletl-") as scratch:
        for done, landed in enumerate(waiting):
            progress("loading", done, len(waiting))
            try:
                staged = stage_window(settings, landed, Path(scratch))
            except FaletlError as error:
                task = Task(RESOURCES[landed.manifest.resource], landed.manifest.window)
                report.failures.append((task, error))
                continue
            _load_batch(settings, warehouse, [staged], report)
            staged.path.unlink()
        progress("loading", len(waiting), len(waiting))
    return report


def build(settings: Settings, *, full: bool = False) -> Report:
    """Build marts and reports if raw, the SQL or the seeds changed (`full`: in any case).

    Raises:
        CheckFailedError: a SQL check found rows; nothing was changed.
    """
    report = Report(_new_run_id())
    _build_and_publish(settings, report, builds="always" if full else "changed", publishes=False)
    return report


def publish(settings: Settings) -> Report:
    """Show the newest build to readers, if they do not have it yet.

    Raises:
        WarehouseError: something was loaded that is not built yet.
    """
    report = Report(_new_run_id())
    _build_and_publish(settings, report, builds="never")
    return report


def _build_and_publish(
    settings: Settings,
    report: Report,
    *,
    builds: Literal["changed", "always", "never"] = "changed",
    publishes: bool = True,
) -> None:
    """Under one lease, so that nobody loads in between; a warehouse that is not there stays so."""
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None:
            return
    with warehouse.lease(f"faletl build and publish, run {report.run_id}") as lease:
        is_due = builds == "changed" and models.needs_build(settings, lease.connection)
        if is_due or builds == "always":
            report.build = models.build(settings, warehouse, lease, run_id=report.run_id)
        if publishes:
            report.published = warehouse.publish(lease)


# --- Extraction -----------------------------------------------------------------------------------


def _extract_all(
    settings: Settings,
    warehouse: Warehouse,
    report: Report,
    take: Callable[[list[Staged]], None],
    *,
    start: date | None,
    end: date | None,
    resources: Collection[str],
    progress: Progress,
) -> bool:
    """Hand over what was extracted, batch by batch; returns whether the warehouse can be written.

    A refused key ends extraction, as does a warehouse that cannot take what was extracted.
    """
    settings.require_key()
    _check(start, end, resources)
    extracted = _extracted(settings, warehouse, report, start, end, resources, progress)
    try:
        with closing(extracted):
            for batch in extracted:
                take(batch)
                for staged in batch:
                    staged.path.unlink(missing_ok=True)
    except FaletlError as error:
        report.failures.append((None, error))
        return isinstance(error, KeyRefusedError)
    return True


def _extracted(
    settings: Settings,
    warehouse: Warehouse,
    report: Report,
    start: date | None,
    end: date | None,
    resources: Collection[str],
    progress: Progress,
) -> Generator[list[Staged]]:
    """Fetch, land, stage and prove several windows at a time; yield those that are done.

    Windows that fail go to the report. What is asked by ids comes last, when the ids are known.

    Raises:
        KeyRefusedError: fal refused the key; nothing more is asked.
        StorageError, WarehouseError: nothing more can be written.
    """
    now = datetime.now(UTC)
    with FalClient(settings) as client, tempfile.TemporaryDirectory(prefix="faletl-") as scratch:
        label = report.account = _account(client, settings)
        with warehouse.reading() as connection:
            reads = {
                name: reads_by_day(connection, label, name) if connection is not None else {}
                for name in RESOURCES
            }
            first_days = dict.fromkeys(RESOURCES, now.date() - timedelta(settings.first_days))
            if connection is not None:
                first_days |= horizons(connection, label)
            token = _fencing_token(connection)
        tasks = plan(reads, first_days, now, start=start, end=end, resources=resources)
        seen_ids: set[str] = set()
        optional = OPTIONAL - set(resources)
        origin = Origin(label, report.run_id, token, _first_planned(tasks))

        def work(task: Task) -> Staged:
            try:
                return _prove_or_reread(client, settings, task, Path(scratch), origin)
            except KeyRefusedError:
                if task.resource.name not in optional:
                    client.stop()  # no other thread needs to hear it too
                raise

        done = 0
        for is_by_ids in (False, True):
            wave = [task for task in tasks if (task.resource.ids_per_call is not None) == is_by_ids]
            if is_by_ids and wave:
                with warehouse.reading() as connection:
                    wave = [_with_ids(connection, label, task, now, seen_ids) for task in wave]
                wave = [task for task in wave if task.ids]
            for batch, count in _worked(client, settings, wave, work, report, optional):
                done += count
                progress("extracting", done, len(tasks))
                seen_ids.update(*(staged.endpoint_ids for staged in batch))
                if batch:
                    yield batch


def _worked(
    client: FalClient,
    settings: Settings,
    tasks: list[Task],
    work: Callable[[Task], Staged],
    report: Report,
    optional: Collection[str],
) -> Iterator[tuple[list[Staged], int]]:
    """Work on several tasks at a time; yield what finished, with how many tasks ended.

    Only a few tasks are begun ahead of what was taken, so that finished windows do not pile up.
    """
    waiting, running = deque(tasks), dict[Future[Staged], Task]()
    pool = ThreadPoolExecutor(settings.parallel, thread_name_prefix="extract")
    try:
        while waiting or running:
            while waiting and len(running) < 2 * settings.parallel:
                task = waiting.popleft()
                running[pool.submit(work, task)] = task
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            batch = []
            for future in ended:
                task = running.pop(future)
                try:
                    batch.append(future.result())
                except StoppedError:
                    continue  # the key was refused to another window, which tells
                except KeyRefusedError as error:
                    if task.resource.name not in optional:
                        raise
                    log.warning("%s; it is skipped", error)
                except FaletlError as error:
                    report.failures.append((task, error))
            yield batch, len(ended)
    except BaseException:
        client.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prove_or_reread(
    client: FalClient, settings: Settings, task: Task, scratch: Path, origin: Origin
) -> Staged:
    """Fetch and stage; where the rows do not add up, once more: pages may have shifted."""
    for again in (False, True):
        landed = fetch_window(
            client, settings, task.resource, task.window, origin=origin, ids=task.ids, again=again
        )
        try:
            return stage_window(settings, landed, scratch)
        except UnprovenError as error:
            if again:
                raise
            log.warning("%s; reading the window once more", error)
    raise AssertionError("unreachable")


def plan(
    reads: Mapping[str, Mapping[date, Read]],
    first_days: Mapping[str, date],
    now: datetime,
    *,
    start: date | None = None,
    end: date | None = None,
    resources: Collection[str] = (),
) -> list[Task]:
    """The windows to extract: the days named, else those that are due (docs/decisions.md).

    `reads` holds, per resource, the newest read of each loaded day; `first_days` the day from which
    on its ledger is to be complete. A day that has not ended is cut
    at its last full hour; one of which no hour has ended is left out.
    """
    tasks = []
    is_named = start is not None or end is not None
    for name, resource in RESOURCES.items():
        if resources and name not in resources:
            continue
        if resource.window == "snapshot":
            if is_named or resource.every_run or now.date() not in reads[name]:
                tasks.append(Task(resource, Window.snapshot(now)))
            continue
        days = (
            utc_days(start, min(end or date.max, Window.of_day(now.date()).end.date()))
            if start is not None
            else due_days(now, reads[name], first_days[name])
        )
        tasks += [Task(resource, cut) for day in days if (cut := day.settled(now)) is not None]
    return tasks


def _first_planned(tasks: list[Task]) -> dict[str, date]:
    first: dict[str, date] = {}
    for task in tasks:
        first[task.resource.name] = min(first.get(task.resource.name, date.max), task.window.day)
    return first


def _account(client: FalClient, settings: Settings) -> str:
    """The account's label.

    Only a refusal makes it `default`: one bad minute must not make a second account.
    """
    if settings.account:
        return settings.account
    try:
        _, label = client.get("/account/billing", {"expand": ("credits",)}, _read_username)
    except KeyRefusedError:
        return "default"
    return label


def _read_username(body: bytes) -> str:
    try:
        username = msgspec.json.decode(body, type=dict[str, msgspec.Raw])["username"]
        label = msgspec.json.decode(username, type=str)
    except msgspec.ValidationError as error:
        raise ContractError(f"fal's account has no proper name: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBodyError(str(error)) from None
    except KeyError:
        raise ContractError("fal's account has no username; set FALETL_ACCOUNT") from None
    if not label.strip():
        raise ContractError("fal's account has an empty username; set FALETL_ACCOUNT")
    return label


def _with_ids(
    connection: sa.Connection | None, account: str, task: Task, now: datetime, seen: set[str]
) -> Task:
    """The task with the endpoint ids to ask for: what the warehouse knows, what this run has seen."""
    known, unknown = (
        endpoint_ids(connection, account, task.resource.name, now)
        if connection is not None
        else (set[str](), set[str]())
    )
    return replace(task, ids=tuple(sorted((known | seen) - unknown)))


def _fencing_token(connection: sa.Connection | None) -> int:
    if connection is None:
        return 0
    return int(connection.execute(sa.select(WAREHOUSE.c.fencing_token)).scalar_one())


# --- Loading --------------------------------------------------------------------------------------


def _load_batch(settings: Settings, warehouse: Warehouse, batch: list[Staged], report: Report) -> None:
    with warehouse.lease(f"faletl load, run {report.run_id}") as lease:
        for staged in batch:
            outcome = replace_window(settings, warehouse, lease, staged)
            report.outcomes.append(_outcome(staged, outcome))
            window = staged.landed.manifest.window
            told = f"{staged.rows:,} rows, {outcome}, proof {staged.proof}"
            log.info("%s, window %s: %s", staged.resource.name, window, told)


def _outcome(staged: Staged, outcome: str) -> Outcome:
    window = staged.landed.manifest.window
    return Outcome(staged.resource.name, window, outcome, staged.rows, staged.landed.folder)


def _record_failures(warehouse: Warehouse, report: Report) -> None:
    """Keep what failed for `faletl status`; that it failed is in the report in any case."""
    failed = [(task, error) for task, error in report.failures if task is not None]
    if not failed or report.account is None:
        return
    with suppress(FaletlError), warehouse.lease(f"faletl, run {report.run_id}") as lease:
        for task, error in failed:
            record_failure(
                lease, error, account=report.account, resource=task.resource.name,
                window=task.window, run_id=report.run_id,
            )  # fmt: skip


def _not_loaded(settings: Settings, warehouse: Warehouse, report: Report) -> list[Landed]:
    """Complete reads that are newer than what is loaded; of a day only its newest."""
    with warehouse.reading() as connection:
        loaded = loaded_reads(connection) if connection is not None else {}
    newest: dict[tuple[str, ...], Landed] = {}
    for folder in landing.complete_reads(settings):
        try:
            landed = landing.open_read(folder)
        except FaletlError as error:
            report.failures.append((None, error))
            continue
        manifest = landed.manifest
        key = (manifest.account, manifest.resource, manifest.window.day.isoformat())
        read_at = loaded.get((manifest.account, manifest.resource, manifest.window.day))
        if read_at is None or manifest.started_at > read_at:
            newest[key if not manifest.window.is_snapshot else (*key, manifest.load_id)] = landed
    order = list(RESOURCES)
    return sorted(
        newest.values(),
        key=lambda landed: (order.index(landed.manifest.resource), landed.manifest.started_at),
    )


# --- What the steps have in common ----------------------------------------------------------------


def _check(start: date | None, end: date | None, resources: Collection[str]) -> None:
    """Raises UsageError for dates and resources that cannot mean anything."""
    if unknown := sorted(set(resources) - set(RESOURCES)):
        raise UsageError(
            f"there is no resource {', '.join(map(repr, unknown))}; there are {', '.join(RESOURCES)}"
        )
    if end is not None and start is None:
        raise UsageError("--end needs --start")
    if start is not None and end is not None and end <= start:
        raise UsageError(f"--end {end} is not after --start {start}; --end is exclusive")
    if start is not None and start > datetime.now(UTC).date():
        raise UsageError(f"--start {start} is in the future")


def _is_wanted(
    resource: str,
    window: Window,
    start: date | None,
    end: date | None,
    resources: Collection[str],
) -> bool:
    if resources and resource not in resources:
        return False
    return (start or date.min) <= window.day < (end or date.max)


def _new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"

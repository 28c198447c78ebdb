"""The steps of a run as functions: the command line and schedulers call only these.

    extract (fetch, land, stage, prove) → load → build → publish

Each step can run again at any time and ends in the same state. A window that fails does not stop the
others: what can be done is done, and the failures are told in the report.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import (
    AccessRefusedError,
    AccountLockedError,
    ContractError,
    DataRefusedError,
    FaletlError,
    HeldError,
    KeyRefusedError,
    UnprovenError,
)
from faletl.fal.bodies import forget_frames
from faletl.fal.client import FalClient, StoppedError
from faletl.landing import extracts
from faletl.landing.extracts import Landed, Part
from faletl.landing.storage import scratch_folder
from faletl.line import accounts, holds, relabel
from faletl.line.fetch import Origin, Retry, fetch_window
from faletl.line.overlap import SharedChargesError, charges_first, in_order, refuse_shared
from faletl.line.plan import Asked, Forecast, Task, first_planned, forecast, plan, with_ids
from faletl.line.replace import (
    Replaced,
    fence,
    is_already_loaded,
    loaded_reads,
    record_failure,
    replace_window,
    snapshots_taken_out,
    take_out_the_future,
)
from faletl.models import catalogue
from faletl.resources import MODELS, RESOURCES, USAGE, Resource
from faletl.staging.window import Staged, UnprovenPart, stage_window
from faletl.warehouse import Warehouse, alerts, open_warehouse
from faletl.warehouse.tables import BUILDS, LOADS, WAREHOUSE
from faletl.windows import CLOCK_TOLERANCE, Window

if TYPE_CHECKING:
    from faletl.gate.gate import Gate

log = logging.getLogger(__name__)

_READY = 16
"""So many windows may wait to be loaded: the more do, the less often the warehouse is opened."""

_PROCESSORS = os.cpu_count() or 1
_staging = threading.BoundedSemaphore(_PROCESSORS)
"""So many windows are staged at the same time: more would only take memory from each other."""

Progress = Callable[[str, int, int], None]
"""Told what is under way, how many of its windows are done, and of how many."""


DUE = Asked()
"""What is due, of every resource."""


def silent(_what: str, _done: int, _of: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one window: landed, loaded, unchanged (the same rows again), superseded or held."""

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
    build: catalogue.Build | None = None
    published: str | None = None

    @property
    def exit_code(self) -> int:
        """The highest of its failures' exit codes, 0 without any (README, "Exit codes")."""
        return max((error.exit_code for _, error in self.failures), default=0)


# --- The steps ------------------------------------------------------------------------------------


def run(settings: Settings, asked: Asked = DUE, progress: Progress = silent) -> Report:
    """The whole line, for what is due or for the UTC days that are named.

    Named days are always fetched again; without an end they go up to now. Models, prices and credits
    are read as of now, once. Nothing is raised that a scheduler could act upon: see the report.

    Raises:
        UsageError: settings that cannot mean anything; no key.
    """
    report = Report(new_run_id())
    warehouse = open_warehouse(settings)
    with _loader(settings, warehouse, report) as load:
        can_write = _extract_all(settings, warehouse, report, load, asked, progress)
    if can_write:
        record_failures(settings, report)
        try:
            build_and_publish(settings, report)
        except FaletlError as error:
            report.failures.append((None, error))
    return report


def extract(settings: Settings, asked: Asked = DUE, progress: Progress = silent) -> Report:
    """Land and prove the windows that `run` would; load nothing. Raises UsageError, as `run`."""
    report = Report(new_run_id())

    def take(batch: list[Staged]) -> None:
        report.outcomes.extend(outcome_of(staged, "landed") for staged in batch)

    _extract_all(settings, open_warehouse(settings), report, take, asked, progress)
    return report


def dry_run(settings: Settings, asked: Asked = DUE) -> list[Forecast]:
    """What `run` would read now. Asks fal for the account's name at most, and writes nothing.

    Raises:
        UsageError: settings that cannot mean anything; no key.
        ApiUnavailableError, ContractError: fal did not say whose the key is.
    """
    settings.require_key()
    warehouse = open_warehouse(settings)
    with FalClient(settings) as client:
        account = accounts.preview(client, settings, warehouse)
    with warehouse.reading() as connection:
        return forecast(
            settings, connection, account.label, asked, datetime.now(UTC), owners=account.owners
        )


def load(settings: Settings, asked: Asked = DUE, progress: Progress = silent) -> Report:
    """Stage, prove and load what has landed and is not loaded yet; asks fal nothing."""
    report = Report(new_run_id())
    load_waiting(settings, asked, report, progress)
    return report


def load_waiting(settings: Settings, asked: Asked, report: Report, progress: Progress = silent) -> None:
    """As `load`; what became of each window goes to the report."""
    waiting = [
        landed
        for landed in _not_loaded(settings, open_warehouse(settings), report)
        if asked.includes(landed.manifest.resource, landed.manifest.window)
    ]
    load_reads(settings, waiting, report, progress)


def load_reads(
    settings: Settings, reads: Sequence[Landed], report: Report, progress: Progress = silent
) -> None:
    """Stage and load complete reads, charges first; those that are refused go to the report."""
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        accepted = holds.accepted_rows(connection)
    with (
        scratch_folder() as scratch,
        _loader(settings, warehouse, report) as load,
    ):
        for done, landed in enumerate(in_order(reads)):
            progress("loading", done, len(reads))
            try:
                staged = stage_window(settings, landed, scratch, accepted)
            except FaletlError as error:
                task = Task(RESOURCES[landed.manifest.resource], landed.manifest.window)
                forget_frames(error)
                report.failures.append((task, error.at(account=landed.manifest.account)))
                continue
            load([staged])
            staged.discard()
        progress("loading", len(reads), len(reads))
    record_failures(settings, report)


def build(settings: Settings, *, full: bool = False) -> Report:
    """Build marts and reports if raw, the SQL or the seeds changed (`full`: in any case).

    Raises:
        CheckFailedError: a SQL check found rows; nothing was changed.
    """
    report = Report(new_run_id())
    build_and_publish(settings, report, builds="always" if full else "behind", publishes=False)
    return report


def publish(settings: Settings) -> Report:
    """Show the newest build to readers, if they do not have it yet.

    Raises:
        WarehouseError: something was loaded that is not built yet.
    """
    report = Report(new_run_id())
    build_and_publish(settings, report, builds="never")
    return report


def is_behind(settings: Settings) -> bool:
    """Whether something is loaded, or was set aside, that `build` would make news of."""
    with open_warehouse(settings).reading() as connection:
        return connection is not None and catalogue.is_behind(settings, connection)


def is_news(settings: Settings, resource: str) -> bool:
    """Whether something of the resource is loaded, or was set aside, that is not built yet."""
    with open_warehouse(settings).reading() as connection:
        return connection is not None and resource in catalogue.news(connection)


def is_published(settings: Settings, day: date) -> bool:
    """Whether readers see all usage of that UTC day, of each account read in the week before."""
    lately = sa.and_(
        LOADS.c.resource == USAGE.name,
        LOADS.c.is_current,
        LOADS.c.window_start > datetime.combine(day - timedelta(days=7), time(), UTC),
    )
    is_it = sa.and_(
        LOADS.c.window_start == datetime.combine(day, time(), UTC),
        ~LOADS.c.is_provisional,
        LOADS.c.data_version <= sa.select(sa.func.max(BUILDS.c.data_version)).scalar_subquery(),
    )
    with open_warehouse(settings).published() as connection:
        if connection is None:
            return False
        accounts = sa.select(LOADS.c.account, sa.func.max(sa.case((is_it, 1), else_=0)))
        found = connection.execute(accounts.where(lately).group_by(LOADS.c.account)).all()
    return bool(found) and all(is_there for _, is_there in found)


def build_and_publish(
    settings: Settings,
    report: Report,
    *,
    builds: Literal["changed", "behind", "always", "never"] = "changed",
    publishes: bool = True,
) -> None:
    """Under one lease, so that nobody loads in between; a warehouse that is not there stays so.

    `changed`: if something was loaded; `behind`: also if rows were only set aside.
    """
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None:
            return
    with warehouse.lease(f"faletl build and publish, run {report.run_id}") as lease:
        with lease.transaction():
            is_due = (builds == "changed" and catalogue.needs_build(settings, lease.connection)) or (
                builds == "behind" and catalogue.is_behind(settings, lease.connection)
            )
        if is_due or builds == "always":
            report.build = catalogue.build(
                settings, warehouse, lease, run_id=report.run_id, full=builds == "always"
            )
            warn_of_runaways(report.build)
        if publishes:
            report.published = warehouse.publish(lease)


MOST_ANNOUNCED = 5
"""Alerts of one kind that are sent one by one; of more, their number."""


def announce_alerts(settings: Settings, send: Callable[[str, str], None]) -> None:
    """Hand each open alert that was not sent yet to `send`, as its kind and its sentence; once each."""
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None or not alerts.unannounced(connection):
            return
    with warehouse.lease("faletl, alerts") as lease, lease.transaction():
        fence(lease, changes_data=False)
        found = alerts.unannounced(lease.connection)
        for kind, sentences in found.items():
            for sentence in sentences[:MOST_ANNOUNCED]:
                send(kind, sentence)
            if (more := len(sentences) - MOST_ANNOUNCED) > 0:
                send(kind, f"and {more:,} more: see ops.alerts")
        alerts.mark_announced(lease.connection, datetime.now(UTC))


def warn_of_runaways(build: catalogue.Build) -> None:
    """Tell each charge that ran away and was not known before; of many, the dearest."""
    for sentence in build.dearest_runaways:
        log.warning("runaway charge: %s", sentence)
    if more := build.runaways - len(build.dearest_runaways):
        log.warning("and %d more: see reports.rpt_runaway_requests", more)


# --- Extraction -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """Endpoint ids that a run has met: used, by UTC day, and listed in fal's catalogue."""

    used: dict[date, frozenset[str]] = field(default_factory=dict)
    catalogue: frozenset[str] = frozenset()

    def note(self, staged: Staged) -> None:
        """Remember the ids of a window."""
        if staged.resource is USAGE:
            self.used[staged.landed.manifest.window.day] = staged.endpoint_ids
        elif staged.resource is MODELS:
            self.catalogue |= staged.endpoint_ids


def _extract_all(
    settings: Settings,
    warehouse: Warehouse,
    report: Report,
    take: Callable[[list[Staged]], None],
    asked: Asked,
    progress: Progress,
) -> bool:
    """Hand over what was extracted, batch by batch; returns whether the warehouse can be written.

    A refused key or a locked account ends extraction, as does a warehouse that cannot take what was
    extracted.
    """
    settings.require_key()
    extracted = _extracted(settings, warehouse, report, asked, progress)
    try:
        with closing(extracted):
            for batch in extracted:
                take(batch)
                for staged in batch:
                    staged.discard()
    except FaletlError as error:
        report.failures.append((None, error))
        return isinstance(error, AccessRefusedError)
    return True


def _extracted(
    settings: Settings, warehouse: Warehouse, report: Report, asked: Asked, progress: Progress
) -> Generator[list[Staged]]:
    """Fetch, land, stage and prove several windows at a time; yield those that are done.

    Windows that fail go to the report. What is asked by ids comes last, when the ids are known.

    Raises:
        KeyRefusedError, AccountLockedError: fal refused the key, or locked the account; nothing more is
            asked.
        StorageError, WarehouseError: nothing more can be written.
    """
    now = datetime.now(UTC)
    extracts.root(settings)  # before fal is asked for what could not be kept
    with FalClient(settings) as client, scratch_folder() as scratch:
        account = accounts.sign_in(client, settings, warehouse, asked, now)
        label = report.account = account.label
        with warehouse.reading() as connection:
            warn_of_other_landing(settings, connection)
            tasks = plan(settings, connection, label, asked, now, owners=account.owners)
            first, tasks = charges_first(connection, label, tasks)
            token, accepted = fencing_token(connection), holds.accepted_rows(connection)
        unknown_ids = {name: set[str]() for name in RESOURCES}
        origin = Origin(
            label,
            report.run_id,
            now,
            token,
            first_planned([*first, *tasks]),
            unknown_ids,
            account.bound_at,
            accepted,
        )
        seen = Seen()
        refused = set[str]()

        def work(task: Task) -> Staged | None:
            resource = task.resource
            if resource.name in refused:
                return None
            try:
                return prove_or_reread(client, settings, task, scratch, origin)
            except KeyRefusedError as error:
                if not resource.is_optional or resource.name in asked.resources:
                    client.stop()  # no other thread needs to hear it too
                    raise
                if resource.name not in refused:
                    refused.add(resource.name)
                    log.warning("%s; %s is left out", error, resource.name)
                return None

        done = 0
        for wave in chain([first], _waves(warehouse, label, tasks, now, seen)):
            for batch, count in worked(client, settings, wave, work, report):
                done += count
                progress("extracting", done, len(first) + len(tasks))
                for staged in batch:
                    seen.note(staged)
                if batch:
                    yield batch


def _waves(
    warehouse: Warehouse,
    account: str,
    tasks: list[Task],
    now: datetime,
    seen: Seen,
) -> Iterator[list[Task]]:
    """First what needs no endpoint ids; then what is asked by ids, which are known by then."""
    yield [task for task in tasks if task.resource.ids_per_call is None]
    by_ids = [task for task in tasks if task.resource.ids_per_call is not None]
    if by_ids:
        with warehouse.reading() as connection:
            known = with_ids(connection, account, by_ids, now, used=seen.used, catalogue=seen.catalogue)
        for name in sorted({t.resource.name for t in by_ids} - {t.resource.name for t in known}):
            log.warning("%s: no endpoint is known yet to ask for; load usage or models first", name)
        by_ids = known
    yield by_ids


def worked(
    client: FalClient,
    settings: Settings,
    tasks: list[Task],
    work: Callable[[Task], Staged | None],
    report: Report,
) -> Iterator[tuple[list[Staged], int]]:
    """Work on several tasks at a time; yield what finished, with how many tasks ended.

    Only a few tasks are begun ahead of what was taken, so that finished windows do not pile up. Others
    are fetched while some are staged, so there are threads for both.
    """
    waiting, running = deque(tasks), dict[Future[Staged | None], Task]()
    threads = settings.parallel + min(settings.parallel, _PROCESSORS)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="extract")
    try:
        while waiting or running:
            while waiting and len(running) < settings.parallel + _READY:
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
                except AccessRefusedError:
                    raise
                except FaletlError as error:
                    forget_frames(error)  # a report is kept, and frames may hold pages
                    report.failures.append((task, error))
            yield [staged for staged in batch if staged is not None], len(ended)
    except BaseException:
        client.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prove_or_reread(
    client: FalClient,
    settings: Settings,
    task: Task,
    scratch: Path,
    origin: Origin,
    landed: Landed | None = None,
) -> Staged:
    """Fetch and stage; where the rows do not add up, once more, then in halves (`next_try`).

    A read that `landed` before takes the place of the first one.

    Raises: as `fetch_window` and `stage_window`.
    """
    retry: Retry | None = None
    while True:
        if landed is None:
            with client.turns:
                landed = fetch_window(
                    client, settings, task.resource, task.window,
                    origin=origin, ids=task.ids, is_whole_catalogue=task.is_whole_catalogue,
                    ahead=task.ahead, retry=retry,
                )  # fmt: skip
            if retry is not None:
                extracts.drop(retry.landed.folder)  # what is needed of it was taken over
        try:
            with _staging:
                return stage_window(settings, landed, scratch, origin.accepted)
        except (ContractError, DataRefusedError, UnprovenError) as error:
            following = next_try(task.resource, landed, error.unproven, is_first=retry is None)
            if following is None:
                extracts.refuse(landed.folder)
                if isinstance(error, UnprovenError) or landed.manifest.started_at >= origin.at:
                    raise
                # Pages that an earlier run had landed: fal may have mended them since.
            log.info("%s; asking for the window again", error)
            retry, landed = following, None


def next_try(
    resource: Resource, landed: Landed, unproven: Sequence[UnprovenPart], *, is_first: bool
) -> Retry | None:
    """How to ask for a window again whose parts are not all proven; None where that is of no use.

    At first, each of these once more, as pages may have shifted. Then in halves where a page's edge may
    have lost rows, down to one page or to the smallest part. Two equal walks decide of what is left.
    """
    asked, compared = list[Window](), list[Part]()
    if not unproven:
        return None
    for one in unproven:
        part = one.part
        halves = part.window.halves(resource.smallest_part) if part.pages > 1 else ()
        if one.has_lost and halves:
            asked += [part.window] if is_first else halves
        elif not part.has("again") or (one.has_moved and is_first):
            compared.append(part)
        elif one.has_moved and halves:
            asked += halves
        else:
            return None
    left = {one.part.window for one in unproven}
    kept = [part for part in landed.manifest.parts if part.window not in left]
    return Retry(landed, kept, asked, compared)


def fencing_token(connection: sa.Connection | None) -> int:
    """The newest token that was given out, 0 without a warehouse."""
    if connection is None:
        return 0
    return int(connection.execute(sa.select(WAREHOUSE.c.fencing_token)).scalar_one())


# --- Loading --------------------------------------------------------------------------------------


@contextmanager
def _loader(
    settings: Settings, warehouse: Warehouse, report: Report
) -> Iterator[Callable[[list[Staged]], None]]:
    """What loads staged windows that pass the gate; those that do not go to the report.

    The gate takes seconds to make, so it is made when there is news to look at, and without the lease;
    FALETL_GATE may say that there is none.
    """
    made: Gate | None = None
    staged_in: Path | None = None
    is_told = settings.gate
    with ExitStack() as stack:

        def gate() -> Gate:
            nonlocal made
            if made is None:
                from faletl.gate.gate import Gate

                made = Gate(settings, stack.enter_context(scratch_folder()), staged_in)
            return made

        def load(batch: list[Staged]) -> None:
            nonlocal is_told, staged_in
            staged_in = next((file.parent for staged in batch for file in staged.files), staged_in)
            if not is_told:
                is_told = True
                log.warning("FALETL_GATE is off: windows are loaded without what the gate would find")
            if settings.gate and made is None and _has_news(warehouse, batch):
                gate()
            _load_batch(settings, warehouse, gate, batch, report)

        yield load


def _warn_of_the_future(sentence: str, windows: Sequence[str]) -> None:
    """One warning for all that a clock that was ahead left; without any, nothing."""
    if windows:
        more = f" and {len(windows) - 1:,} more windows were" if len(windows) > 1 else " was"
        log.warning(sentence, f"{windows[-1]}{more}")


def _has_news(warehouse: Warehouse, batch: list[Staged]) -> bool:
    with warehouse.reading() as connection:
        return connection is None or not all(is_already_loaded(connection, staged) for staged in batch)


def _load_batch(
    settings: Settings,
    warehouse: Warehouse,
    gate: Callable[[], Gate],
    batch: list[Staged],
    report: Report,
) -> None:
    with warehouse.lease(f"faletl load, run {report.run_id}") as lease:
        with lease.transaction():
            accounts.require_known(lease.connection, report.account)
            manifests = [staged.landed.manifest for staged in batch]
            ahead = take_out_the_future(settings, lease, manifests, datetime.now(UTC))
        _warn_of_the_future("%s loaded by a clock that was ahead: taken out of the tables", ahead)
        for staged in batch:
            resource, window = staged.resource, staged.landed.manifest.window
            judged = staged
            try:
                with lease.transaction():
                    if not is_already_loaded(lease.connection, staged):
                        refused = _shared_days(report)
                        refuse_shared(settings, warehouse, lease.connection, staged, refused)
                        judged = gate().passed(lease.connection, staged) if settings.gate else staged
            except DataRefusedError as error:
                extracts.refuse(staged.landed.folder)
                error.at(account=staged.landed.manifest.account)
                report.failures.append((Task(resource, window), error))
                continue
            replaced = replace_window(settings, warehouse, lease, judged)
            note_outcome(report, staged, replaced)


def note_outcome(report: Report, staged: Staged, replaced: Replaced) -> None:
    """Enter what became of a window; what it lost is a warning, and a failure if a person must look."""
    manifest = staged.landed.manifest
    name, window = manifest.resource, manifest.window
    report.outcomes.append(outcome_of(staged, replaced.outcome))
    log.info("%s, window %s: %s rows, %s, proof %s", name, window, f"{staged.rows:,}", replaced.outcome,
             staged.proof)  # fmt: skip
    loss = replaced.loss
    if loss is None:
        return
    if replaced.outcome != "held":
        log.warning("%s, window %s: fal took rows or charges back: there were %s, and now %s are loaded "
                    "(see ops.restatements)", name, window, loss.before, loss.after)  # fmt: skip
        return
    sentence = holds.sentence(manifest, loss)
    if loss.is_final:
        log.warning("%s, window %s: %s", name, window, sentence)
        return
    error = HeldError(sentence, resource=name, window=str(window), account=manifest.account)
    report.failures.append((Task(RESOURCES[name], window), error))


def _shared_days(report: Report) -> set[tuple[str, date]]:
    """The accounts and days refused because their charges are loaded under another label."""
    return {
        (str(error.facts["account"]), task.window.day)
        for task, error in report.failures
        if task and isinstance(error, SharedChargesError)
    }


def outcome_of(staged: Staged, outcome: str) -> Outcome:
    """What became of the staged window."""
    window = staged.landed.manifest.window
    return Outcome(staged.resource.name, window, outcome, staged.rows, staged.landed.folder)


def record_failures(settings: Settings, report: Report) -> None:
    """Keep what failed for `faletl status`; that it failed is in the report in any case."""
    warehouse = open_warehouse(settings)
    failed = list(_recordable(settings, warehouse, report))
    if not failed:
        return
    with suppress(FaletlError), warehouse.lease(f"faletl, run {report.run_id}") as lease:
        with lease.transaction():
            accounts.require_known(lease.connection, report.account)
        for task, error, account in failed:
            record_failure(
                settings, lease, error, account=account, resource=task.resource.name,
                window=task.window, run_id=report.run_id,
            )  # fmt: skip


def _recordable(
    settings: Settings, warehouse: Warehouse, report: Report
) -> Iterator[tuple[Task, FaletlError, str]]:
    """What failed of a window, with its account. A locked account is recorded as usage of today.

    A held window is in ops.holds.
    """
    for task, error in report.failures:
        account = error.facts.get("account") or report.account
        if task is None and isinstance(error, AccountLockedError):
            task = Task(USAGE, Window.of_day(datetime.now(UTC).date()))
            account = account or accounts.label_of_key(warehouse, settings)
        if task is not None and account and not isinstance(error, HeldError):
            yield task, error, str(account)


def warn_of_other_landing(settings: Settings, connection: sa.Connection | None) -> None:
    """Warn where the landing folder lacks what was loaded last: it may be another, or not mounted."""
    newest = sa.select(LOADS.c.landing_path).where(LOADS.c.is_current)
    newest = newest.order_by(LOADS.c.fencing_token.desc(), LOADS.c.load_id.desc()).limit(1)
    path = connection.execute(newest).scalar() if connection is not None else None
    folder = extracts.root(settings)
    if path is not None and not extracts.is_complete(folder / path):
        log.warning(
            "the landing folder %s lacks the pages of what was loaded last (%s): is FALETL_LANDING "
            "right, and its disk mounted? faletl verify counts what is gone; faletl rebuild needs it",
            folder,
            path,
        )


def _not_loaded(settings: Settings, warehouse: Warehouse, report: Report) -> list[Landed]:
    """Complete reads that are newer than what is loaded; of a day only its newest.

    Those that cannot be opened go to the report. What a clock that was ahead landed of windows that have
    not ended is left until they have.
    """
    now = datetime.now(UTC)
    with warehouse.reading() as connection:
        warn_of_other_landing(settings, connection)
        loaded = loaded_reads(connection) if connection is not None else {}
        taken_out = snapshots_taken_out(connection) if connection is not None else set[str]()
        open_read = relabel.opener(settings, connection)
    newest: dict[tuple[str, ...], Landed] = {}
    ahead = list[str]()
    for folder in extracts.complete_reads(settings):
        try:
            landed = open_read(folder)
        except FaletlError as error:
            report.failures.append((None, error))
            continue
        if landed is None or landed.folder.name in taken_out:
            continue
        manifest = landed.manifest
        key: tuple[str, ...] = (manifest.account, manifest.resource, manifest.window.day.isoformat())
        read_at = loaded.get((manifest.account, manifest.resource, manifest.window.day))
        if not _is_after(manifest.started_at, read_at, now):
            continue
        if manifest.window.end > now + CLOCK_TOLERANCE:
            ahead.append(f"{manifest.resource} {manifest.window}")
            continue
        if manifest.window.is_snapshot:
            key = (*key, manifest.load_id)
        newest[key] = max(newest.get(key, landed), landed, key=lambda one: _newness(one, now))
    _warn_of_the_future("%s landed by a clock that was ahead: not loaded before that instant", ahead)
    order = list(RESOURCES)
    return sorted(
        newest.values(),
        key=lambda landed: (order.index(landed.manifest.resource), landed.manifest.began_at),
    )


def _is_after(started_at: datetime, read_at: datetime | None, now: datetime) -> bool:
    """Whether an extract is newer than the loaded one, or may be, as a clock was ahead for that one."""
    return read_at is None or started_at > read_at or (started_at != read_at and read_at > now)


def _newness(landed: Landed, now: datetime) -> tuple[bool, datetime, datetime]:
    """Of two attempts at the same read, the one that ended later took over the pages of the other.

    An extract that seems to be of the future may be of any age, unless fal's clock vouches for it.
    """
    manifest = landed.manifest
    return manifest.began_at <= now, manifest.began_at, manifest.finished_at


def new_run_id() -> str:
    """When it began, and chance."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"

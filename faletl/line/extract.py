"""Extract all planned windows, several at a time, until each is proven."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from itertools import chain
from pathlib import Path

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import (
    AccessRefusedError,
    ContractError,
    DataRefusedError,
    FaletlError,
    KeyRefusedError,
    UnprovenError,
)
from faletl.fal.bodies import forget_frames
from faletl.fal.client import FalClient
from faletl.fal.transport import StoppedError
from faletl.files import scratch_folder
from faletl.landing import extracts
from faletl.landing.extracts import Part, SealedExtract
from faletl.line import accounts, holds
from faletl.line.fetch import Retry, RunContext, fetch_window
from faletl.line.load import warn_of_other_landing
from faletl.line.overlap import charges_first
from faletl.line.plan import Task, first_planned, plan, with_ids
from faletl.line.report import Progress, Report
from faletl.resources import MODELS, RESOURCES, USAGE, Resource
from faletl.selection import Asked
from faletl.staging.proof import UnprovenPart
from faletl.staging.window import Staged, stage_window
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.tables import WAREHOUSE
from faletl.windows import Window

log = logging.getLogger(__name__)

_MAX_STAGED_AHEAD = 16
"""Windows that may wait to be loaded; with more of them, the warehouse is opened less often."""

_PROCESSORS = os.cpu_count() or 1


_staging = threading.BoundedSemaphore(_PROCESSORS)
"""Limits how many windows are staged at the same time: more would compete for memory."""


@dataclass(slots=True)
class SeenIds:
    """Endpoint ids that a run has seen: used, by UTC day, and listed in fal's catalogue."""

    used: dict[date, frozenset[str]] = field(default_factory=dict)
    catalogue: frozenset[str] = frozenset()

    def add(self, staged: Staged) -> None:
        """Add the ids of a window."""
        if staged.resource is USAGE:
            self.used[staged.landed.manifest.window.day] = staged.endpoint_ids
        elif staged.resource is MODELS:
            self.catalogue |= staged.endpoint_ids


def extract_all(
    settings: Settings,
    warehouse: Warehouse,
    report: Report,
    take: Callable[[list[Staged]], None],
    selection: Asked,
    progress: Progress,
) -> bool:
    """Extract, and pass each batch of staged windows to `take`; return if the warehouse is writable.

    A refused key, a locked account, or a warehouse that cannot be written ends the extraction.
    """
    settings.require_key()
    extracted = staged_windows(settings, warehouse, report, selection, progress)
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


def staged_windows(
    settings: Settings, warehouse: Warehouse, report: Report, selection: Asked, progress: Progress
) -> Generator[list[Staged]]:
    """Fetch, land, stage and prove several windows at a time; yield them as they finish.

    Failed windows go to the report. Resources that are asked by ids come last, when the ids are known.

    Raises:
        KeyRefusedError, AccountLockedError: fal refused the key, or locked the account; no further
            request is sent.
        StorageError, WarehouseError: landing folder or warehouse cannot be written.
    """
    now = datetime.now(UTC)
    extracts.root(settings)  # fails before fal is asked, if nothing can be stored
    with FalClient(settings) as client, scratch_folder() as scratch:
        account = accounts.sign_in(client, settings, warehouse, selection, now)
        label = report.account = account.label
        with warehouse.reading() as connection:
            warn_of_other_landing(settings, connection)
            tasks = plan(settings, connection, label, selection, now, owners=account.owners)
            first, tasks = charges_first(connection, label, tasks)
            token, accepted = fencing_token(connection), holds.accepted_rows(connection)
        unknown_ids = {name: set[str]() for name in RESOURCES}
        origin = RunContext(
            label,
            report.run_id,
            now,
            token,
            first_planned([*first, *tasks]),
            unknown_ids,
            account.bound_at,
            accepted,
        )
        seen = SeenIds()
        refused = set[str]()

        def work(task: Task) -> Staged | None:
            resource = task.resource
            if resource.name in refused:
                return None
            try:
                return fetch_until_proven(client, settings, task, scratch, origin)
            except KeyRefusedError as error:
                if not resource.is_optional or resource.name in selection.resources:
                    client.stop()  # so that other threads do not get the same refusal
                    raise
                if resource.name not in refused:
                    refused.add(resource.name)
                    log.warning("%s; %s is left out", error, resource.name)
                return None

        done = 0
        for wave in chain([first], _waves(warehouse, label, tasks, now, seen)):
            for batch, count in run_concurrently(client, settings, wave, work, report):
                done += count
                progress("extracting", done, len(first) + len(tasks))
                for staged in batch:
                    seen.add(staged)
                if batch:
                    yield batch


def _waves(
    warehouse: Warehouse,
    account: str,
    tasks: list[Task],
    now: datetime,
    seen: SeenIds,
) -> Iterator[list[Task]]:
    """Yield the tasks without endpoint ids, then those asked by ids, which are known by then."""
    yield [task for task in tasks if task.resource.ids_per_call is None]
    by_ids = [task for task in tasks if task.resource.ids_per_call is not None]
    if by_ids:
        with warehouse.reading() as connection:
            known = with_ids(connection, account, by_ids, now, used=seen.used, catalogue=seen.catalogue)
        for name in sorted({t.resource.name for t in by_ids} - {t.resource.name for t in known}):
            log.warning("%s: no endpoint ids are known yet; load usage or models first", name)
        by_ids = known
    yield by_ids


def run_concurrently(
    client: FalClient,
    settings: Settings,
    tasks: list[Task],
    work: Callable[[Task], Staged | None],
    report: Report,
) -> Iterator[tuple[list[Staged], int]]:
    """Run tasks on a thread pool; yield each finished batch and the number of tasks that ended.

    Only a few tasks start before earlier ones are consumed, so that finished windows do not pile up.
    Some windows are fetched while others are staged, so there are threads for both.
    """
    waiting, running = deque(tasks), dict[Future[Staged | None], Task]()
    threads = settings.parallel + min(settings.parallel, _PROCESSORS)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="extract")
    try:
        while waiting or running:
            while waiting and len(running) < settings.parallel + _MAX_STAGED_AHEAD:
                task = waiting.popleft()
                running[pool.submit(work, task)] = task
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            batch = []
            for future in ended:
                task = running.pop(future)
                try:
                    batch.append(future.result())
                except StoppedError:
                    continue  # the window whose key was refused reports it
                except AccessRefusedError:
                    raise
                except FaletlError as error:
                    forget_frames(error)  # a report is kept, and frames may reference pages
                    report.failures.append((task, error))
            yield [staged for staged in batch if staged is not None], len(ended)
    except BaseException:
        client.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def fetch_until_proven(
    client: FalClient,
    settings: Settings,
    task: Task,
    scratch: Path,
    origin: RunContext,
    landed: SealedExtract | None = None,
) -> Staged:
    """Fetch and stage a window; if its rows do not add up, fetch again, then in halves (`next_try`).

    With `landed`, an extract that landed before, the first fetch is skipped.

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
                extracts.drop(retry.landed.folder)  # the needed parts were taken over
        try:
            with _staging:
                return stage_window(settings, landed, scratch, origin.accepted)
        except (ContractError, DataRefusedError, UnprovenError) as error:
            unproven = [part for part in error.unproven if isinstance(part, UnprovenPart)]
            following = next_try(task.resource, landed, unproven, is_first=retry is None)
            if following is None:
                extracts.refuse(landed.folder)
                if isinstance(error, UnprovenError) or landed.manifest.started_at >= origin.at:
                    raise
                # An earlier run landed these pages: fal may have corrected them since.
            log.info("%s; fetching the window again", error)
            retry, landed = following, None


def next_try(
    resource: Resource, landed: SealedExtract, unproven: Sequence[UnprovenPart], *, is_first: bool
) -> Retry | None:
    """Return how to fetch a window again whose parts are not all proven; None if that is of no use.

    First, each unproven part is fetched again, because pages may have shifted. Then parts that may have
    lost rows between pages are halved, down to one page or to the smallest part. Of the rest, two equal
    walks decide.
    """
    requested, compared = list[Window](), list[Part]()
    if not unproven:
        return None
    for failure in unproven:
        part = failure.part
        halves = part.window.halves(resource.smallest_part) if part.pages > 1 else ()
        if failure.has_lost and halves:
            requested += [part.window] if is_first else halves
        elif not part.has("again") or (failure.has_moved and is_first):
            compared.append(part)
        elif failure.has_moved and halves:
            requested += halves
        else:
            return None
    unproven_windows = {failure.part.window for failure in unproven}
    kept = [part for part in landed.manifest.parts if part.window not in unproven_windows]
    return Retry(landed, kept, requested, compared)


def fencing_token(connection: sa.Connection | None) -> int:
    """Return the newest fencing token, 0 without a warehouse."""
    if connection is None:
        return 0
    return int(connection.execute(sa.select(WAREHOUSE.c.fencing_token)).scalar_one())

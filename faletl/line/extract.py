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
from typing import TYPE_CHECKING

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
from faletl.line.fetch import Origin, Retry, fetch_window
from faletl.line.overlap import charges_first
from faletl.line.plan import Task, first_planned, plan, with_ids
from faletl.resources import MODELS, RESOURCES, USAGE, Resource
from faletl.selection import Asked
from faletl.staging.proof import UnprovenPart
from faletl.staging.window import Staged, stage_window
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.tables import WAREHOUSE
from faletl.windows import Window

if TYPE_CHECKING:
    pass
from faletl.line.load import warn_of_other_landing
from faletl.line.report import Progress, Report

log = logging.getLogger(__name__)

_READY = 16
"""So many windows may wait to be loaded: the more do, the less often the warehouse is opened."""


_PROCESSORS = os.cpu_count() or 1


_staging = threading.BoundedSemaphore(_PROCESSORS)
"""So many windows are staged at the same time: more would only take memory from each other."""


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


def extract_all(
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
    extracted = staged_windows(settings, warehouse, report, asked, progress)
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
    landed: SealedExtract | None = None,
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
            unproven = [part for part in error.unproven if isinstance(part, UnprovenPart)]
            following = next_try(task.resource, landed, unproven, is_first=retry is None)
            if following is None:
                extracts.refuse(landed.folder)
                if isinstance(error, UnprovenError) or landed.manifest.started_at >= origin.at:
                    raise
                # Pages that an earlier run had landed: fal may have mended them since.
            log.info("%s; asking for the window again", error)
            retry, landed = following, None


def next_try(
    resource: Resource, landed: SealedExtract, unproven: Sequence[UnprovenPart], *, is_first: bool
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

"""Extract one window of one resource: request, land and seal all of its pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from faletl import __version__
from faletl.config import Settings
from faletl.errors import (
    AstrayError,
    ContractError,
    CursorRefusedError,
    FaletlError,
    KeyRefusedError,
    NotFoundError,
)
from faletl.fal.client import FalClient
from faletl.fal.pages import read_envelope, walk
from faletl.fal.questions import ask_in_either_form, bounds, first_endpoint
from faletl.files import storage_error
from faletl.landing import extracts
from faletl.landing.extracts import Call, LandedPage, Manifest, OpenExtract, Part, SealedExtract
from faletl.resources import MAKE_A_KEY, MODELS, Question, Resource
from faletl.windows import HOUR, LONG_AGO, Window
from faletl.wire import Params

log = logging.getLogger(__name__)

RESUME_WITHIN = timedelta(hours=1)
"""Maximum age of an interrupted extract of a closed window that is resumed."""

SUSPICIOUS_IDS = 10
"""If fal knows none of the ids of a first batch of at least this size, its path may be gone."""

SAMPLED_IDS = 10
"""Then this many ids of other batches are tried one by one, and one from fal's catalogue."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """The context that all extracts of a run share.

    The run, or this task of it, began `at`. `planned_from` is the first day of the plan, per resource;
    `fencing_token` is the newest one when the run was planned. `unknown_ids` are the ids that fal
    answered with 404, per resource; each extract adds its own. Extracts that landed before the label was
    bound (`bound_at`) may be of another account and are not resumed. `accepted` are keys of rows that
    violate fal's contract and that people accepted.
    """

    account: str
    run_id: str
    at: datetime
    fencing_token: int
    planned_from: Mapping[str, date]
    unknown_ids: Mapping[str, set[str]]
    bound_at: datetime = LONG_AGO
    accepted: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Retry:
    """Instructions to fetch a window again whose earlier extract did not add up.

    `kept` are the parts that did; `requested` are parts to fetch, for example halves of others;
    `compared` are parts to fetch again, so that two equal walks can decide.
    """

    landed: SealedExtract
    kept: Sequence[Part] = ()
    requested: Sequence[Window] = ()
    compared: Sequence[Part] = ()


class _SeveralPagesError(Exception):
    """Fal answers in several pages, and no total would show rows lost between them."""


def fetch_window(
    client: FalClient,
    settings: Settings,
    resource: Resource,
    window: Window,
    *,
    origin: RunContext,
    ids: Sequence[str] = (),
    is_whole_catalogue: bool = False,
    ahead: Sequence[str] = (),
    retry: Retry | None = None,
) -> SealedExtract:
    """Land every page of the window, and of its control total if the resource has one.

    `ids` are the endpoint ids to request, for a resource that is asked by ids; batches of them may have
    landed `ahead`, in these extracts (`ask_ahead`). A `retry` never resumes an interrupted extract.

    Raises:
        KeyRefusedError, AccountLockedError, ContractError, ApiUnavailableError, StorageError: see
            `FalClient`; every error names resource and window. Landed pages stay for the next attempt.
    """
    with _naming_window(settings, resource, window):
        client.require_open()  # fails before an empty folder is created
        for is_second_try in (False, True):
            attempt, now = None, datetime.now(UTC)
            is_first = not (retry or is_second_try)
            window_of_account = (settings, origin.account, resource.name, window)
            since = max(now - RESUME_WITHIN, origin.bound_at)
            if is_first and ahead:
                attempt = extracts.gather(*window_of_account, ahead, since=since)
            elif is_first and not (window.is_snapshot or window.is_provisional):
                attempt = extracts.resume(*window_of_account, since=since)
            attempt = attempt or extracts.begin(*window_of_account, now=now)
            try:
                asker = _Asker(client, resource, window, attempt)
                unknown = origin.unknown_ids.get(resource.name, set[str]())
                _ask_all(asker, ids, unknown, retry)
                return attempt.seal(
                    Manifest(
                        load_id=attempt.load_id,
                        run_id=origin.run_id,
                        account=origin.account,
                        resource=resource.name,
                        window_start=window.start,
                        window_end=window.end,
                        started_at=_started_at(attempt, retry),
                        finished_at=datetime.now(UTC),
                        planned_from=origin.planned_from.get(resource.name, window.day),
                        fencing_token=origin.fencing_token,
                        calls=asker.calls,
                        unknown_ids=sorted(unknown.intersection(ids)),
                        is_whole_catalogue=is_whole_catalogue,
                        faletl_version=__version__,
                        fal_started_at=_fal_started_at(asker, attempt, retry),
                    )
                )
            except AstrayError as error:
                attempt.discard()  # these pages would mislead the next run, too
                if is_second_try or not isinstance(error, CursorRefusedError):
                    raise
                log.warning(
                    "%s, window %s: the cursor expired; fetching from the first page",
                    resource.name,
                    window,
                )
            finally:
                attempt.close()
        raise AssertionError("unreachable")


def ask_ahead(
    client: FalClient,
    settings: Settings,
    account: str,
    resource: Resource,
    window: Window,
    ids: Sequence[str],
    load_id: str,
) -> bool:
    """Land fal's answers for these ids, for `fetch_window` to find; it requests what is missing.

    Returns False if that was done before, or another task is doing it.

    Raises: as `fetch_window`.
    """
    with _naming_window(settings, resource, window):
        attempt = extracts.open_ahead(settings, account, resource.name, window, load_id)
        if attempt is None:
            return False
        try:
            asker = _Asker(client, resource, window, attempt)
            for number in range(len(resource.params)):
                _ask_by_ids(asker, number, ids, set())
        finally:
            attempt.close()
        return True


@contextmanager
def _naming_window(settings: Settings, resource: Resource, window: Window) -> Iterator[None]:
    """Add resource and window to errors, and to a refused key the permissions that it needs."""
    try:
        yield
    except KeyRefusedError as error:
        name = settings.key_name(metrics=resource.uses_metrics_key)
        raise KeyRefusedError(
            f"{error.message}; check {name}: {resource.name} needs {resource.needs}; {MAKE_A_KEY}",
            **error.facts,
        ).at(resource=resource.name, window=str(window)) from None
    except FaletlError as error:
        raise error.at(resource=resource.name, window=str(window)) from None
    except OSError as error:
        failed = storage_error(error, Path(error.filename or settings.landing))
        raise failed.at(resource=resource.name, window=str(window)) from None


def _started_at(attempt: OpenExtract, retry: Retry | None) -> datetime:
    """Return when the first page of the extract, including kept parts, was requested."""
    if retry and retry.kept:
        return min(attempt.started_at, retry.landed.manifest.started_at)
    return attempt.started_at


def _fal_started_at(asker: _Asker, attempt: OpenExtract, retry: Retry | None) -> datetime | None:
    """Return that time by fal's clock; None if fal did not send it.

    For a resumed extract, our own clock shows how much earlier its first pages were requested.
    """
    at = asker.first_date
    if at and attempt.earlier:
        at -= max(asker.first_answer_at - attempt.started_at, timedelta(0))
    before = retry.landed.manifest.fal_started_at if retry and retry.kept else None
    return min(filter(None, (at, before)), default=None)


def _ask_all(asker: _Asker, ids: Sequence[str], unknown: set[str], retry: Retry | None) -> None:
    """Send all questions of the resource, and request its control total."""
    if asker.resource.ids_per_call is not None:
        for number in range(len(asker.resource.params)):
            _ask_by_ids(asker, number, ids, unknown)
    elif retry is None:
        _ask_part(asker, asker.window)
    else:
        for part in retry.kept:
            asker.keep(retry.landed, part)
        for window in retry.requested:
            _ask_part(asker, window)
        for part in retry.compared:
            _ask_part(asker, part.window, retry.landed, part)
        asker.calls.sort(key=lambda call: call.bounds or asker.window)
        if any(call.bounds != asker.window for call in asker.calls):
            asker.total("proof", asker.window)  # rows may have moved between parts meanwhile


def _ask_part(
    asker: _Asker, window: Window, earlier: SealedExtract | None = None, part: Part | None = None
) -> None:
    """Request the rows of a part of the window (or all of it) and their control total.

    Where fal refuses the total to this key, rows of several pages are requested in halves, and twice.
    The rows of an `earlier` extract of the part are stored next to the new ones, for comparison.
    """
    resource = asker.resource
    if resource.proof is None:
        asker.walk_all("rows", window)
        return
    halves = window.halves(resource.smallest_part)

    def before() -> bool:
        if asker.total("before", window):
            return True
        if halves:
            raise _SeveralPagesError
        return False

    try:
        # Rows of an open day may change during any walk: differences there are only a warning.
        asker.walk_all("rows", window, None if asker.window.is_provisional else before)
    except _SeveralPagesError:
        for half in halves:
            _ask_part(asker, half)
        return
    if not asker.total("proof", window) and earlier is None:
        asker.walk_all("again", window)
    if earlier is not None and part is not None:
        asker.adopt(earlier, part)


def _ask_by_ids(asker: _Asker, number: int, ids: Sequence[str], unknown: set[str]) -> None:
    """Send one question in batches of ids that fal may know; add those it does not to `unknown`."""
    size = asker.resource.ids_per_call or len(ids)
    for first in range(0, len(ids), size):
        # Batches are cut before unknown ids are removed, so that these do not shift other batches.
        batch = [endpoint_id for endpoint_id in ids[first : first + size] if endpoint_id not in unknown]
        if not batch:
            continue
        asker.walk_ids(number, asker.window, batch, unknown)
        if not first and len(batch) >= SUSPICIOUS_IDS and unknown.issuperset(batch):
            rest = [endpoint_id for endpoint_id in ids[size:] if endpoint_id not in unknown]
            sample = rest[-1 :: -max(1, len(rest) // SAMPLED_IDS)][:SAMPLED_IDS]
            asker.refuse_gone_path(number, sample, unknown)


class _Asker:
    """Makes the calls of one extract of a window, and collects them."""

    def __init__(
        self, client: FalClient, resource: Resource, window: Window, attempt: OpenExtract
    ) -> None:
        self.calls: list[Call] = []
        self.resource = resource
        self.window = window
        self.first_date: datetime | None = None
        """Fal's clock at the first answer; `first_answer_at` is ours."""
        self.first_answer_at = attempt.started_at
        self._client = client
        self._attempt = attempt
        self._is_older = False
        self._is_total_refused = False

    def walk_all(self, label: str, window: Window, before: Callable[[], bool] | None = None) -> None:
        """Land all pages of all questions of the resource; see `land`."""
        for number in range(len(self.resource.params)):
            self.walk(label, number, bounds(window), before)

    def walk(
        self, label: str, number: int, more: Params, before: Callable[[], bool] | None = None
    ) -> None:
        """Land all pages of the resource's question of that number, in its older form if necessary."""

        def ask(question: Question) -> None:
            resource = self.resource
            try:
                self.land(label, resource.path, {**question, **more}, resource.rows_path, before)
            except _SeveralPagesError:
                self._is_older = question is not resource.params[number]
                raise

        self._is_older = ask_in_either_form(self.resource, number, ask, is_older=self._is_older)

    def total(self, label: str, window: Window) -> bool:
        """Land fal's control total of a part of the window; return False if the key may not read it."""
        proof = self.resource.proof
        assert proof is not None  # noqa: S101  # checked by the callers
        if self._is_total_refused:
            return False
        params = {**proof.params, **bounds(window)}
        if window != self.window and self.resource.smallest_part < HOUR:
            params["timeframe"] = "minute"
        try:
            self.land(label, proof.path, params, proof.rows_path)
        except KeyRefusedError:
            self._is_total_refused = True
            log.warning("%s, window %s: fal refuses the control total to this key; "
                        "two equal walks replace it", self.resource.name, self.window)  # fmt: skip
            return False
        return True

    def land(
        self,
        label: str,
        path: str,
        params: Params,
        rows_path: tuple[str, ...],
        before: Callable[[], bool] | None = None,
    ) -> None:
        """Land all pages of one question.

        Rows may move between several pages during a walk. So `before` is called after the first of
        several pages; if it returns True, the walk starts again after it. It may raise
        `_SeveralPagesError` instead.
        """
        # A control total is always requested again: it must be of the rows at the end of the walk.
        is_kept = label in ("rows", "before")
        landed = self._attempt.resumable_pages(label, params) if is_kept else iter(())
        pages = self._walked(label, path, params, rows_path, landed, before)
        if pages is None:
            pages = self._walked(label, path, params, rows_path, landed)
        query = {name: [v] if isinstance(v, str) else list(v) for name, v in params.items()}
        self.calls.append(Call(label, path, query, pages or []))

    def _walked(
        self,
        label: str,
        path: str,
        params: Params,
        rows_path: tuple[str, ...],
        landed: Iterator[bytes],
        before: Callable[[], bool] | None = None,
    ) -> list[LandedPage] | None:
        """Land all pages of a walk; return None if `before` returned True: then it must start again."""
        pages = list[LandedPage]()
        walked = walk(
            self._client, path, params, rows_path, landed, metrics=self.resource.uses_metrics_key
        )
        try:
            with closing(walked):
                for page, is_new in walked:
                    if is_new and self.first_date is None and page.date:
                        self.first_date, self.first_answer_at = page.date, datetime.now(UTC)
                    is_first_of_many = page.number == 1 and page.next_cursor is not None
                    if before and is_first_of_many and before() and is_new:
                        return None
                    record = self._attempt.land if is_new else self._attempt.describe_existing
                    pages.append(record(label, params, page))
                    del page  # before the next page is requested
        except FaletlError as error:
            raise error.at(page=len(pages) + 1) from None
        return pages

    def keep(self, landed: SealedExtract, part: Part) -> None:
        """Copy a part of an earlier extract into this one."""
        self.calls += self._attempt.keep(landed, part)

    def adopt(self, landed: SealedExtract, part: Part) -> None:
        """Store the rows of an earlier extract of a part next to those of this one."""
        self.calls += self._attempt.copy_rows_of(landed, part)

    def refuse_gone_path(self, number: int, sample: Sequence[str], unknown: Collection[str]) -> None:
        """Raise ContractError if fal answers 404 to a sample and to an id of its own catalogue."""
        metrics, resource = self.resource.uses_metrics_key, self.resource
        page, _ = self._client.get(
            MODELS.path, {"limit": "1"}, lambda b: read_envelope(b, MODELS.rows_path), metrics=metrics
        )
        listed = first_endpoint(page.body)
        question = {**self._question(number), **bounds(self.window)}
        for endpoint_id in [*listed, *sample]:
            if endpoint_id not in unknown:
                with suppress(NotFoundError):
                    params = {**question, "endpoint_id": (endpoint_id,)}
                    self._client.get(resource.path, params, self._envelope, metrics=metrics)
                    return
        if listed:
            raise ContractError(
                f"fal answers 404 even for {listed[0]!a}: {resource.path} seems to be gone"
            )

    def _question(self, number: int) -> Question:
        return (self.resource.older_params if self._is_older else self.resource.params)[number]

    def _envelope(self, body: bytes) -> tuple[int, str | None]:
        return read_envelope(body, self.resource.rows_path)

    def walk_ids(self, number: int, window: Window, ids: Sequence[str], unknown: set[str]) -> None:
        """Land fal's answers for a batch of ids.

        If fal does not know one of the ids, the batch is halved until that id is alone. The batch is
        also halved if the answer has several pages, because no total would show rows lost between them.
        If one id alone has several pages, the window is halved.
        """
        middle = len(ids) // 2
        halves = [(window, ids[:middle]), (window, ids[middle:])] if middle else [
            (half, ids) for half in self._halves(number, window)
        ]  # fmt: skip

        def refuse() -> bool:
            raise _SeveralPagesError

        try:
            question = {**bounds(window), "endpoint_id": tuple(ids)}
            self.walk("rows", number, question, refuse if halves else None)
        except NotFoundError:
            if middle:
                self._walk_halves(number, halves, unknown)
            else:
                unknown.add(ids[0])
        except _SeveralPagesError:
            self._walk_halves(number, halves, unknown)

    def _walk_halves(
        self, number: int, halves: Sequence[tuple[Window, Sequence[str]]], unknown: set[str]
    ) -> None:
        for window, ids in halves:
            self.walk_ids(number, window, ids, unknown)

    def _halves(self, number: int, window: Window) -> tuple[Window, ...]:
        """Return the halves of an hourly window; none for daily percentiles, which cover a whole day."""
        is_hourly = self._question(number).get("timeframe") == "hour"
        return window.halves(self.resource.smallest_part) if is_hourly else ()

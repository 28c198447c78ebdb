"""Extract: ask fal for one window of one resource until the landed pages are complete."""

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
"""How old an interrupted read of a closed window may be to be taken up where it ended."""


SUSPICIOUS_IDS = 10
"""After a first batch of at least so many ids, all of them unknown, others are tried one by one."""

SAMPLED_IDS = 10
"""So many of the other batches' ids, and one that fal's catalogue lists."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What all reads of a run have in common.

    The run, or this task of it, began `at`. `planned_from` is, per resource, the first day of the plan;
    `fencing_token` the newest one that was known when the run was planned. `unknown_ids` are, per
    resource, those that fal answered 404 for, added by whichever read found them. What landed before
    the label was bound (`bound_at`) may be of another account: it is not taken up. `accepted` are
    keys of what people accepted of rows that break their contract.
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
    """How a window is to be asked for again whose earlier extract did not add up.

    `kept` are the parts that did, `asked` those to ask for (halves of others, say), and `compared` those
    to ask for once more, so that two equal walks can decide.
    """

    landed: SealedExtract
    kept: Sequence[Part] = ()
    asked: Sequence[Window] = ()
    compared: Sequence[Part] = ()


class _SeveralPagesError(Exception):
    """Fal answers in several pages, and no total would show whether rows are lost between them."""


def fetch_window(
    client: FalClient,
    settings: Settings,
    resource: Resource,
    window: Window,
    *,
    origin: Origin,
    ids: Sequence[str] = (),
    is_whole_catalogue: bool = False,
    ahead: Sequence[str] = (),
    retry: Retry | None = None,
) -> SealedExtract:
    """Land every page of the window, and of its control total where the resource has one.

    `ids` are the endpoint ids to ask for, where a resource is asked by ids; batches of them may have
    been asked `ahead`, in these reads (`ask_ahead`). A `retry` starts over even if an interrupted read
    could be taken up.

    Raises:
        KeyRefusedError, AccountLockedError, ContractError, ApiUnavailableError, StorageError: see
            `FalClient`; every error names resource and window. What landed so far stays for the next
            attempt.
    """
    with _placed(settings, resource, window):
        client.require_open()  # before a folder is made that would stay empty
        for is_second_try in (False, True):
            attempt, now = None, datetime.now(UTC)
            is_first = not (retry or is_second_try)
            mine = (settings, origin.account, resource.name, window)
            since = max(now - RESUME_WITHIN, origin.bound_at)
            if is_first and ahead:
                attempt = extracts.gather(*mine, ahead, since=since)
            elif is_first and not (window.is_snapshot or window.is_provisional):
                attempt = extracts.resume(*mine, since=since)
            attempt = attempt or extracts.begin(*mine, now=now)
            try:
                asking = _Asking(client, resource, window, attempt)
                unknown = origin.unknown_ids.get(resource.name, set[str]())
                _ask_all(asking, ids, unknown, retry)
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
                        calls=asking.calls,
                        unknown_ids=sorted(unknown.intersection(ids)),
                        is_whole_catalogue=is_whole_catalogue,
                        faletl_version=__version__,
                        fal_started_at=_fal_started_at(asking, attempt, retry),
                    )
                )
            except AstrayError as error:
                attempt.discard()  # what was landed so far would lead the next run astray, too
                if is_second_try or not isinstance(error, CursorRefusedError):
                    raise
                log.warning("%s, window %s: the cursor expired, starting over", resource.name, window)
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
    """Land what fal answers for these ids, for `fetch_window` to find; it asks for what is missing.

    False if it was done before, or somebody is at it.

    Raises: as `fetch_window`.
    """
    with _placed(settings, resource, window):
        attempt = extracts.open_ahead(settings, account, resource.name, window, load_id)
        if attempt is None:
            return False
        try:
            asking = _Asking(client, resource, window, attempt)
            for number in range(len(resource.params)):
                _ask_by_ids(asking, number, ids, set())
        finally:
            attempt.close()
        return True


@contextmanager
def _placed(settings: Settings, resource: Resource, window: Window) -> Iterator[None]:
    """Errors name resource and window; a refused key, what it would need."""
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
    """When the first page of the extract was asked for, that of a kept part included."""
    if retry and retry.kept:
        return min(attempt.started_at, retry.landed.manifest.started_at)
    return attempt.started_at


def _fal_started_at(asking: _Asking, attempt: OpenExtract, retry: Retry | None) -> datetime | None:
    """When that was by fal's own clock; None where fal did not say.

    If the extract goes on with earlier pages, our own clock shows how much earlier these were asked for.
    """
    at = asking.first_date
    if at and attempt.earlier:
        at -= max(asking.first_answer_at - attempt.started_at, timedelta(0))
    before = retry.landed.manifest.fal_started_at if retry and retry.kept else None
    return min(filter(None, (at, before)), default=None)


def _ask_all(asking: _Asking, ids: Sequence[str], unknown: set[str], retry: Retry | None) -> None:
    """Ask every question of the resource and for its control total."""
    if asking.resource.ids_per_call is not None:
        for number in range(len(asking.resource.params)):
            _ask_by_ids(asking, number, ids, unknown)
    elif retry is None:
        _ask_part(asking, asking.window)
    else:
        for part in retry.kept:
            asking.keep(retry.landed, part)
        for window in retry.asked:
            _ask_part(asking, window)
        for part in retry.compared:
            _ask_part(asking, part.window, retry.landed, part)
        asking.calls.sort(key=lambda call: call.bounds or asking.window)
        if any(call.bounds != asking.window for call in asking.calls):
            asking.total("proof", asking.window)  # rows may have moved from part to part meanwhile


def _ask_part(
    asking: _Asking, window: Window, earlier: SealedExtract | None = None, part: Part | None = None
) -> None:
    """Ask for the rows of a part of the window, or of all of it, and for their control total.

    Where fal refuses the total to this key, rows of several pages are asked for in halves, and twice.
    The rows of an `earlier` extract of the part are kept next to the new ones, to be compared.
    """
    resource = asking.resource
    if resource.proof is None:
        asking.walk_all("rows", window)
        return
    halves = window.halves(resource.smallest_part)

    def before() -> bool:
        if asking.total("before", window):
            return True
        if halves:
            raise _SeveralPagesError
        return False

    try:
        # The rows of a day that is still open may change under any walk: it is only warned about.
        asking.walk_all("rows", window, None if asking.window.is_provisional else before)
    except _SeveralPagesError:
        for half in halves:
            _ask_part(asking, half)
        return
    if not asking.total("proof", window) and earlier is None:
        asking.walk_all("again", window)
    if earlier is not None and part is not None:
        asking.adopt(earlier, part)


def _ask_by_ids(asking: _Asking, number: int, ids: Sequence[str], unknown: set[str]) -> None:
    """Ask one question in batches of ids that fal may know; add those it does not to `unknown`."""
    size = asking.resource.ids_per_call or len(ids)
    for first in range(0, len(ids), size):
        # Cut first, so that an id that turns out to be unknown leaves the other batches as they are.
        batch = [endpoint_id for endpoint_id in ids[first : first + size] if endpoint_id not in unknown]
        if not batch:
            continue
        asking.walk_ids(number, asking.window, batch, unknown)
        if not first and len(batch) >= SUSPICIOUS_IDS and unknown.issuperset(batch):
            rest = [endpoint_id for endpoint_id in ids[size:] if endpoint_id not in unknown]
            sample = rest[-1 :: -max(1, len(rest) // SAMPLED_IDS)][:SAMPLED_IDS]
            asking.refuse_gone_path(number, sample, unknown)


class _Asking:
    """The calls of one extract of a window, as they are made."""

    def __init__(
        self, client: FalClient, resource: Resource, window: Window, attempt: OpenExtract
    ) -> None:
        self.calls: list[Call] = []
        self.resource = resource
        self.window = window
        self.first_date: datetime | None = None
        """Fal's clock at the first answer, and ours."""
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
        """Land all pages of the resource's question of that number; of its older form if need be."""

        def ask(question: Question) -> None:
            resource = self.resource
            try:
                self.land(label, resource.path, {**question, **more}, resource.rows_path, before)
            except _SeveralPagesError:
                self._is_older = question is not resource.params[number]
                raise

        self._is_older = ask_in_either_form(self.resource, number, ask, is_older=self._is_older)

    def total(self, label: str, window: Window) -> bool:
        """Land fal's control total of a part of the window; false where fal refuses it to this key."""
        proof = self.resource.proof
        assert proof is not None  # noqa: S101  # who asks has looked
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
                        "two equal walks stand in for it", self.resource.name, self.window)  # fmt: skip
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

        Where there are several, rows may move between them while they are walked. So `before` is
        asked in front of them; if it was answered, the walk begins anew behind it. It may raise
        `_SeveralPagesError` instead.
        """
        # A control total is always asked anew: it must be that of the rows as they are at the end.
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
        """Land all pages of a walk; None where `before` was answered, so that it begins anew."""
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
                    del page  # before the next one is asked for
        except FaletlError as error:
            raise error.at(page=len(pages) + 1) from None
        return pages

    def keep(self, landed: SealedExtract, part: Part) -> None:
        """Take over a part of an earlier extract."""
        self.calls += self._attempt.keep(landed, part)

    def adopt(self, landed: SealedExtract, part: Part) -> None:
        """Keep the rows of an earlier extract of a part next to those of this one."""
        self.calls += self._attempt.copy_rows_of(landed, part)

    def refuse_gone_path(self, number: int, sample: Sequence[str], unknown: Collection[str]) -> None:
        """Raises ContractError where fal answers 404 to all of a sample and of its own catalogue."""
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
        """Land what fal answers for a batch of ids.

        Where fal does not know one of them, the batch is halved until that one is alone. It is halved,
        too, where the answer takes several pages: no total would show what is lost between these. What
        is too much of one id is asked for in halves of the window.
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
        """Two parts of a window of hours; a day's percentiles are those of all of it."""
        is_hourly = self._question(number).get("timeframe") == "hour"
        return window.halves(self.resource.smallest_part) if is_hourly else ()

"""Extract: ask fal for one window of one resource until the landed pages are complete."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path

import msgspec

from faletl import __version__, landing
from faletl.client import FalClient, Params
from faletl.config import Settings
from faletl.errors import (
    AstrayError,
    ContractError,
    CursorRefusedError,
    FaletlError,
    KeyRefusedError,
    NotFoundError,
)
from faletl.landing import Attempt, Call, Landed, Manifest
from faletl.pages import UNREADABLE, as_json, read_envelope, walk
from faletl.places import storage_error
from faletl.resources import MAKE_A_KEY, MODELS, Question, Resource
from faletl.windows import LONG_AGO, Window, instant

log = logging.getLogger(__name__)

RESUME_WITHIN = timedelta(hours=1)
"""How old an interrupted read of a closed window may be to be taken up where it ended."""

BAD_REQUEST = 400

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
    the label was bound (`bound_at`) may be of another account: it is not taken up.
    """

    account: str
    run_id: str
    at: datetime
    fencing_token: int
    planned_from: Mapping[str, date]
    unknown_ids: Mapping[str, set[str]]
    bound_at: datetime = LONG_AGO


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
    unproven: Landed | None = None,
) -> Landed:
    """Land every page of the window, and of its control total where the resource has one.

    `ids` are the endpoint ids to ask for, where a resource is asked by ids; batches of them may have
    been asked `ahead`, in these reads (`ask_ahead`). After an `unproven` read of the window this one
    starts over even if an interrupted one could be taken up, and keeps the rows of that one beside its
    own.

    Raises:
        KeyRefusedError, ContractError, ApiUnavailableError, StorageError: see `FalClient`; every
            error names resource and window. What landed so far stays for the next attempt.
    """
    with _placed(settings, resource, window):
        for is_second_try in (False, True):
            attempt, now = None, datetime.now(UTC)
            is_first = not (unproven or is_second_try)
            mine = (settings, origin.account, resource.name, window)
            since = max(now - RESUME_WITHIN, origin.bound_at)
            if is_first and ahead:
                attempt = landing.gather(*mine, ahead, since=since)
            elif is_first and not (window.is_snapshot or window.is_provisional):
                attempt = landing.resume(*mine, since=since)
            attempt = attempt or landing.begin(*mine, now=now)
            try:
                asking = _Asking(client, resource, attempt)
                unknown = origin.unknown_ids.get(resource.name, set[str]())
                _ask_all(asking, resource, window, ids, unknown, unproven)
                return attempt.seal(
                    Manifest(
                        load_id=attempt.load_id,
                        run_id=origin.run_id,
                        account=origin.account,
                        resource=resource.name,
                        window_start=window.start,
                        window_end=window.end,
                        started_at=attempt.started_at,
                        finished_at=datetime.now(UTC),
                        planned_from=origin.planned_from.get(resource.name, window.day),
                        fencing_token=origin.fencing_token,
                        calls=asking.calls,
                        unknown_ids=sorted(unknown.intersection(ids)),
                        is_whole_catalogue=is_whole_catalogue,
                        faletl_version=__version__,
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
        attempt = landing.open_ahead(settings, account, resource.name, window, load_id)
        if attempt is None:
            return False
        try:
            asking = _Asking(client, resource, attempt)
            for number in range(len(resource.params)):
                _ask_by_ids(asking, number, window, ids, set())
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


def _ask_all(
    asking: _Asking,
    resource: Resource,
    window: Window,
    ids: Sequence[str],
    unknown: set[str],
    unproven: Landed | None,
) -> None:
    """Ask every question of the resource and for its control total."""
    if resource.ids_per_call is not None:
        for number in range(len(resource.params)):
            _ask_by_ids(asking, number, window, ids, unknown)
    else:
        is_closing = resource.proof is not None and not window.is_provisional
        asking.walk_all("rows", window, partial(asking.total, "before", window) if is_closing else None)
    if resource.proof is None:
        return
    if not asking.total("proof", window):
        log.warning("%s, window %s: fal refuses the control total to this key; "
                    "two equal walks stand in for it", resource.name, window)  # fmt: skip
        if unproven is None:
            asking.walk_all("again", window)
    if unproven is not None:
        asking.adopt(unproven)


def ask_in_either_form(
    resource: Resource, number: int, ask: Callable[[Question], None], *, is_older: bool
) -> bool:
    """Ask the resource's question of that number; where fal refuses it (400), in its older form.

    `is_older` is whether fal took the older form of an earlier question; returned is whether it is the
    form that fal takes.
    """
    if is_older:
        ask(resource.older_params[number])
        return True
    try:
        ask(resource.params[number])
    except ContractError as error:
        is_refused = error.facts.get("status") == BAD_REQUEST
        if not is_refused or isinstance(error, CursorRefusedError) or not resource.older_params:
            raise
        log.info("%s: %s; asking as before fal had all of these values", resource.name, error)
        ask(resource.older_params[number])
        return True
    return False


def _ask_by_ids(
    asking: _Asking, number: int, window: Window, ids: Sequence[str], unknown: set[str]
) -> None:
    """Ask one question in batches of ids that fal may know; add those it does not to `unknown`."""
    size = asking.resource.ids_per_call or len(ids)
    for first in range(0, len(ids), size):
        # Cut first, so that an id that turns out to be unknown leaves the other batches as they are.
        batch = [endpoint_id for endpoint_id in ids[first : first + size] if endpoint_id not in unknown]
        if not batch:
            continue
        asking.walk_ids(number, bounds(window), batch, unknown)
        if not first and len(batch) >= SUSPICIOUS_IDS and unknown.issuperset(batch):
            rest = [endpoint_id for endpoint_id in ids[size:] if endpoint_id not in unknown]
            sample = rest[-1 :: -max(1, len(rest) // SAMPLED_IDS)][:SAMPLED_IDS]
            asking.refuse_gone_path(number, bounds(window), sample, unknown)


class _Asking:
    """The calls of one read, as they are made."""

    def __init__(self, client: FalClient, resource: Resource, attempt: Attempt) -> None:
        self.calls: list[Call] = []
        self.resource = resource
        self._client = client
        self._attempt = attempt
        self._is_older = False

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
            self.land(label, resource.path, {**question, **more}, resource.rows_path, before)

        self._is_older = ask_in_either_form(self.resource, number, ask, is_older=self._is_older)

    def total(self, label: str, window: Window) -> bool:
        """Land fal's control total of the window; false where fal refuses it to this key."""
        proof = self.resource.proof
        assert proof is not None  # noqa: S101  # who asks has looked
        try:
            self.land(label, proof.path, {**proof.params, **bounds(window)}, proof.rows_path)
        except KeyRefusedError:
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
        asked in front of them; if it was answered, the walk begins anew behind it.
        """
        # A control total is always asked anew: it must be that of the rows as they are at the end.
        is_kept = label in ("rows", "before")
        landed = self._attempt.landed(label, params) if is_kept else iter(())
        pages = []
        try:
            for page, is_new in walk(
                self._client, path, params, rows_path, landed,
                metrics=self.resource.uses_metrics_key,
            ):  # fmt: skip
                is_first_of_many = page.number == 1 and page.next_cursor is not None
                if before and is_first_of_many and before() and is_new:
                    self.land(label, path, params, rows_path)
                    return
                record = self._attempt.land if is_new else self._attempt.described
                pages.append(record(label, params, page))
        except FaletlError as error:
            raise error.at(page=len(pages) + 1) from None
        query = {name: [v] if isinstance(v, str) else list(v) for name, v in params.items()}
        self.calls.append(Call(label, path, query, pages))

    def adopt(self, landed: Landed) -> None:
        """Keep the rows of an earlier read beside those of this one."""
        self.calls += self._attempt.adopt(landed)

    def refuse_gone_path(
        self, number: int, more: Params, sample: Sequence[str], unknown: Collection[str]
    ) -> None:
        """Raises ContractError where fal answers 404 to all of a sample and of its own catalogue."""
        metrics, resource = self.resource.uses_metrics_key, self.resource
        page, _ = self._client.get(
            MODELS.path, {"limit": "1"}, lambda b: read_envelope(b, MODELS.rows_path), metrics=metrics
        )
        listed = first_endpoint(page.body)
        question = (resource.older_params if self._is_older else resource.params)[number]
        for endpoint_id in [*listed, *sample]:
            if endpoint_id not in unknown:
                params = {**question, **more, "endpoint_id": (endpoint_id,)}
                with suppress(NotFoundError):
                    self._client.get(resource.path, params, self._envelope, metrics=metrics)
                    return
        if listed:
            raise ContractError(
                f"fal answers 404 even for {listed[0]!a}: {resource.path} seems to be gone"
            )

    def _envelope(self, body: bytes) -> tuple[int, str | None]:
        return read_envelope(body, self.resource.rows_path)

    def walk_ids(self, number: int, more: Params, ids: Sequence[str], unknown: set[str]) -> None:
        """Land one batch of ids; where fal knows one of them not, halve it until that one is alone."""
        try:
            self.walk("rows", number, {**more, "endpoint_id": tuple(ids)})
        except NotFoundError:
            if len(ids) == 1:
                unknown.add(ids[0])
                return
            middle = len(ids) // 2
            self.walk_ids(number, more, ids[:middle], unknown)
            self.walk_ids(number, more, ids[middle:], unknown)


def bounds(window: Window) -> Params:
    """The window as parameters of a question; a snapshot has none."""
    if window.is_snapshot:
        return {}
    return {"start": instant(window.start), "end": instant(window.end)}


def first_endpoint(body: bytes) -> list[str]:
    """The id of the first endpoint on a page of the catalogue, where it has one."""
    try:
        page = msgspec.json.decode(as_json(body), type=_Catalogue)
    except UNREADABLE:  # what a record must hold is for staging to judge
        return []
    return [model.endpoint_id for model in page.models[:1]]


class _Model(msgspec.Struct):
    endpoint_id: str


class _Catalogue(msgspec.Struct):
    models: list[_Model]

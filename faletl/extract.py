"""Extract: ask fal for one window of one resource until the landed pages are complete."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from faletl import __version__, landing
from faletl.client import FalClient, Params
from faletl.config import Settings
from faletl.errors import (
    ContractError,
    CursorRefusedError,
    FaletlError,
    KeyRefusedError,
    NotFoundError,
)
from faletl.landing import Attempt, Call, Landed, Manifest
from faletl.pages import walk
from faletl.resources import Resource
from faletl.windows import Window, instant

log = logging.getLogger(__name__)

RESUME_WITHIN = timedelta(hours=1)
"""How old an interrupted read of a closed window may be to be taken up where it ended."""

SUSPICIOUS_IDS = 10
"""A first batch of at least so many ids, all of them unknown, means that something else is wrong."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What all reads of a run have in common.

    `planned_from` is, per resource, the first day of the plan; `fencing_token` the newest one that
    was known when the run was planned.
    """

    account: str
    run_id: str
    fencing_token: int
    planned_from: Mapping[str, date]


def fetch_window(
    client: FalClient,
    settings: Settings,
    resource: Resource,
    window: Window,
    *,
    origin: Origin,
    ids: Sequence[str] = (),
    again: bool = False,
) -> Landed:
    """Land every page of the window, and of its control total where the resource has one.

    `ids` are the endpoint ids to ask for, where a resource is asked by ids. `again` starts over even
    if an interrupted read could be taken up.

    Raises:
        KeyRefusedError, ContractError, ApiUnavailableError, StorageError: see `FalClient`; every
            error names resource and window. What landed so far stays for the next attempt.
    """
    try:
        for is_second_try in (False, True):
            attempt, now = None, datetime.now(UTC)
            if not (again or is_second_try or window.is_snapshot or window.is_provisional):
                attempt = landing.resume(
                    settings, origin.account, resource.name, window, since=now - RESUME_WITHIN
                )
            attempt = attempt or landing.begin(settings, origin.account, resource.name, window, at=now)
            try:
                return _fetch(client, resource, window, attempt, ids, origin)
            except ContractError as error:
                attempt.discard()  # what was landed so far would lead the next run astray, too
                if is_second_try or not isinstance(error, CursorRefusedError):
                    raise
                log.warning("%s, window %s: the cursor expired, starting over", resource.name, window)
            finally:
                attempt.close()
        raise AssertionError("unreachable")
    except KeyRefusedError as error:
        is_metrics = resource.uses_metrics_key and settings.metrics_key
        raise KeyRefusedError(
            f"{error.message}; check {'FAL_METRICS_KEY' if is_metrics else 'FAL_KEY'}: {resource.name} "
            f"needs {resource.permission} (preset {resource.presets})",
            **error.facts,
        ).at(resource=resource.name, window=str(window)) from None
    except FaletlError as error:
        raise error.at(resource=resource.name, window=str(window)) from None
    except OSError as error:
        failed = landing.storage_error(error, Path(error.filename or settings.landing))
        raise failed.at(resource=resource.name, window=str(window)) from None


def _fetch(
    client: FalClient,
    resource: Resource,
    window: Window,
    attempt: Attempt,
    ids: Sequence[str],
    origin: Origin,
) -> Landed:
    asking = _Asking(client, resource, attempt)
    unknown: list[str] = []
    rows = {**(resource.params or {}), **_bounds(window)}
    if resource.ids_per_call is None:
        asking.walk("rows", rows, resource.rows_path)
    else:
        batches = _batches(ids, resource.ids_per_call)
        for batch in batches:
            asking.walk_ids(rows, batch, unknown)
            if batch is batches[0] and len(unknown) == len(batch) >= SUSPICIOUS_IDS:
                raise ContractError("fal knows none of the endpoint ids asked for: is the path gone?")
    if resource.proof is not None:
        try:
            proof = {**resource.proof.params, **_bounds(window)}
            asking.walk("proof", proof, resource.proof.rows_path)
        except KeyRefusedError:
            log.warning("%s, window %s: fal refuses the control total to this key; "
                        "two equal walks stand in for it", resource.name, window)  # fmt: skip
            asking.walk("again", rows, resource.rows_path)
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
            unknown_ids=sorted(unknown),
            faletl_version=__version__,
        )
    )


class _Asking:
    """The calls of one read, as they are made."""

    def __init__(self, client: FalClient, resource: Resource, attempt: Attempt) -> None:
        self.calls: list[Call] = []
        self._client = client
        self._resource = resource
        self._attempt = attempt

    def walk(self, label: str, params: Params, rows_path: tuple[str, ...]) -> None:
        """Land all pages of one question."""
        path = self._resource.path
        # A control total is always asked anew: it must be that of the rows as they are at the end.
        landed = self._attempt.landed(label, params) if label == "rows" else iter(())
        pages = []
        try:
            for page, is_new in walk(
                self._client, path, params, rows_path, landed,
                metrics=self._resource.uses_metrics_key,
            ):  # fmt: skip
                record = self._attempt.land if is_new else self._attempt.described
                pages.append(record(label, params, page))
        except FaletlError as error:
            raise error.at(page=len(pages) + 1) from None
        query = {name: [v] if isinstance(v, str) else list(v) for name, v in params.items()}
        self.calls.append(Call(label, path, query, pages))

    def walk_ids(self, params: Params, ids: Sequence[str], unknown: list[str]) -> None:
        """Land one batch of ids; where fal knows one of them not, halve it until that one is alone."""
        try:
            self.walk("rows", {**params, "endpoint_id": tuple(ids)}, self._resource.rows_path)
        except NotFoundError:
            if len(ids) == 1:
                unknown.append(ids[0])
                return
            middle = len(ids) // 2
            self.walk_ids(params, ids[:middle], unknown)
            self.walk_ids(params, ids[middle:], unknown)


def _bounds(window: Window) -> Params:
    if window.is_snapshot:
        return {}
    return {"start": instant(window.start), "end": instant(window.end)}


def _batches(ids: Sequence[str], size: int) -> list[Sequence[str]]:
    return [ids[first : first + size] for first in range(0, len(ids), size)]

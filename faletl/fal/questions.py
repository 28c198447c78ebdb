"""The questions of a resource: bounds, the older form, the first endpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from faletl.errors import ContractError, CursorRefusedError
from faletl.resources import Question, Resource
from faletl.windows import Window, instant
from faletl.wire import UNREADABLE, Params, as_json

log = logging.getLogger(__name__)

BAD_REQUEST = 400


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

"""The questions that a resource asks fal: their bounds, their older form, the first endpoint."""

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
    """Ask the resource's question of this number; if fal refuses it (400), ask its older form.

    `is_older` says whether fal accepted only the older form of an earlier question. Returns the same for
    this question.
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
        log.info("%s: %s; faletl asks again in the older form of the question", resource.name, error)
        ask(resource.older_params[number])
        return True
    return False


def bounds(window: Window) -> Params:
    """Return the window as parameters of a question; none for a snapshot."""
    if window.is_snapshot:
        return {}
    return {"start": instant(window.start), "end": instant(window.end)}


def first_endpoint(body: bytes) -> list[str]:
    """Return the id of the first endpoint on a page of the catalogue; an empty list if it has none."""
    try:
        page = msgspec.json.decode(as_json(body), type=_Catalogue)
    except UNREADABLE:  # staging checks the records
        return []
    return [model.endpoint_id for model in page.models[:1]]


class _Model(msgspec.Struct):
    endpoint_id: str


class _Catalogue(msgspec.Struct):
    models: list[_Model]

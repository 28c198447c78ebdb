"""What was noticed of a read: rows set aside, drift of fal's contract, what the gate found.

It is kept in tables of ops, for reads that were loaded and for reads that were refused.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

import msgspec

from faletl.windows import ExtractRef
from faletl.wire import UNREADABLE

log = logging.getLogger(__name__)

Severity = Literal["critical", "warning", "info"]

_LONGEST = 65_536  # characters of a row that are kept; its landed page has all
_LONGEST_ID = 1000  # and of its endpoint id


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A row that broke its contract: where it stands, why, and the row as fal sent it."""

    page: int
    row: int
    reason: str
    raw_json: str
    endpoint_id: str | None

    @classmethod
    def of(cls, page: int, row: int, reason: str, record: bytes) -> Self:
        """From the record's bytes; they are JSON, but may be anything else than a record."""
        try:
            endpoint_id = msgspec.json.decode(record, type=_WithEndpoint).endpoint_id[:_LONGEST_ID]
        except UNREADABLE:
            endpoint_id = None
        text = record[: 4 * _LONGEST].decode("utf-8", "replace")[:_LONGEST]
        return cls(page, row, reason, text, endpoint_id)


class _WithEndpoint(msgspec.Struct):
    endpoint_id: str


@dataclass(frozen=True, slots=True)
class Drift:
    """A field that fal added, dropped or gave another type; with one such value, if there is one."""

    field: str
    kind: Literal["new", "missing", "retyped"]
    sample: str | None


@dataclass(frozen=True, slots=True)
class Validation:
    """What the gate found of one expectation. `sample_keys` is JSON: keys of some unexpected rows."""

    expectation: str
    severity: Severity
    success: bool
    observed: str
    unexpected_count: int
    sample_keys: str
    validated_at: datetime


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was noticed of one read. `breaches` counts the rows that were set aside, also those
    that are too many to be kept in `set_aside`.
    """

    extract: ExtractRef
    breaches: int = 0
    set_aside: tuple[QuarantinedRow, ...] = ()
    drifts: tuple[Drift, ...] = ()
    validations: tuple[Validation, ...] = ()

    @property
    def rows_digest(self) -> str:
        """A fingerprint of the window's quarantined rows, in whatever order they came.

        An account's label is not in it, so that what a person accepted holds after a rename.
        """
        key = self.extract.key
        rows = sorted(one.raw_json for one in self.quarantined)
        whole = (key.resource, str(key.window.day), self.breaches, rows)
        return hashlib.sha256(repr(whole).encode()).hexdigest()


def acceptance_key(account: str, rows_digest: str) -> str:
    """The key of one acceptance of refused rows, among those of all accounts."""
    return f"{rows_digest} {account}"

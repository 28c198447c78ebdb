"""The findings in an extract: quarantined rows, drift of fal's contract, results of the gate.

Tables of ops keep them, for extracts that were loaded and for extracts that were refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

import msgspec

from faletl.windows import ExtractRef
from faletl.wire import UNREADABLE

Severity = Literal["critical", "warning", "info"]

_MAX_ROW_CHARACTERS = 65_536  # kept of a row; its landed page has all
_MAX_ID_CHARACTERS = 1000  # kept of its endpoint id


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A row that violates fal's contract: its place, the reason, and the row as fal sent it."""

    page: int
    row: int
    reason: str
    raw_json: str
    endpoint_id: str | None

    @classmethod
    def of(cls, page: int, row: int, reason: str, record: bytes) -> Self:
        """Make one from the bytes of a record; they are JSON, but maybe not an object."""
        try:
            endpoint_id = msgspec.json.decode(record, type=_WithEndpoint).endpoint_id[
                :_MAX_ID_CHARACTERS
            ]
        except UNREADABLE:
            endpoint_id = None
        text = record[: 4 * _MAX_ROW_CHARACTERS].decode("utf-8", "replace")[:_MAX_ROW_CHARACTERS]
        return cls(page, row, reason, text, endpoint_id)


class _WithEndpoint(msgspec.Struct):
    endpoint_id: str


@dataclass(frozen=True, slots=True)
class Drift:
    """A field that fal added, dropped or gave another type; with a sample value, if there is one."""

    field: str
    kind: Literal["new", "missing", "retyped"]
    sample: str | None


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of one expectation in the gate. `sample_keys` is JSON: keys of some unexpected rows."""

    expectation: str
    severity: Severity
    success: bool
    observed: str
    unexpected_count: int
    sample_keys: str
    validated_at: datetime


@dataclass(frozen=True, slots=True)
class Findings:
    """All findings in one extract.

    `breaches` counts all quarantined rows; `quarantined` has the first of them.
    """

    extract: ExtractRef
    breaches: int = 0
    quarantined: tuple[QuarantinedRow, ...] = ()
    drifts: tuple[Drift, ...] = ()
    validations: tuple[Validation, ...] = ()

    @property
    def rows_digest(self) -> str:
        """A fingerprint of the window's quarantined rows, the same in any order of rows.

        It is free of the account's label, so that an acceptance stays valid after a rename.
        """
        key = self.extract.key
        rows = sorted(row.raw_json for row in self.quarantined)
        content = (key.resource, str(key.window.day), self.breaches, rows)
        return hashlib.sha256(repr(content).encode()).hexdigest()


def acceptance_key(account: str, rows_digest: str) -> str:
    """Return the key of an acceptance of refused rows, unique over all accounts."""
    return f"{rows_digest} {account}"

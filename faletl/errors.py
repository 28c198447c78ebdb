"""Every error faletl raises on purpose, as one tree.

A class says what to do about it: its exit code (README, "Exit codes") and whether trying again can
help. An error keeps its facts; whoever knows more of them (which window, which page) adds them with
`at` on the way up, so that the final sentence names the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

Fact = str | int | None

# Facts that the sentence names, in reading order; all others stand in `facts` only.
_NAMED = ("resource", "window", "page")


class FaletlError(Exception):
    """Something went wrong that a person or a scheduler can act upon."""

    exit_code: ClassVar[int] = 1
    is_retryable: ClassVar[bool] = False
    advice: ClassVar[str] = ""
    """What to do, where the message does not say it."""

    findings: object | None = None
    """What was found in an extract before it was refused (faletl/findings.py)."""

    unproven: Sequence[object] = ()
    """The parts of a window that do not add up (faletl/staging/proof.py), to be fetched again."""

    def __init__(self, message: str, **facts: Fact) -> None:
        super().__init__(message)
        self.message = message
        self.facts: dict[str, Fact] = facts

    def at(self, **facts: Fact) -> Self:
        """Add the facts that are not known yet, and return the same error."""
        for name, value in facts.items():
            if self.facts.get(name) is None:
                self.facts[name] = value
        return self

    @property
    def sentence(self) -> str:
        """What happened and what to do, without the place."""
        advice = f"; {self.advice}" if self.advice and self.advice not in self.message else ""
        return f"{self.message}{advice}"

    def __str__(self) -> str:
        place = ", ".join(f"{name} {self.facts[name]}" for name in _NAMED if self.facts.get(name))
        place = place.removeprefix("resource ")
        request_id = self.facts.get("request_id")
        told = f" (fal request {request_id})" if request_id else ""
        return f"{place}{': ' if place else ''}{self.sentence}{told}"

    def as_dict(self) -> dict[str, Fact | bool]:
        """The error for machines: class, sentence, exit code, whether to retry, and all facts."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "exit_code": self.exit_code,
            "is_retryable": self.is_retryable,
            "advice": self.advice,
            **self.facts,
        }


class UsageError(FaletlError):
    """Wrong use: a command, a date or a setting that cannot mean anything. Exit 2."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting is missing or cannot be right."""


class AccessRefusedError(FaletlError):
    """Fal answers nothing of all that is asked, until a person did something. Exit 2, never a retry."""

    exit_code = 2


class KeyRefusedError(AccessRefusedError):
    """Fal refused the key (401 or 403): another key or preset is needed."""


class AccountLockedError(AccessRefusedError):
    """Fal locked the account (403 that says so, 402): its balance, or its support, must unlock it."""

    advice = "another key will not help; do what fal says, then run again"


class ApiUnavailableError(FaletlError):
    """Fal could not be reached, or answered 429 or 5xx until we gave up. Exit 1, retry later."""

    is_retryable = True
    advice = "try again later"


class CircuitOpenError(ApiUnavailableError):
    """Fal answers nothing any more, or asks for too long a wait: the client stopped asking. Exit 1."""


class ContractError(FaletlError):
    """Fal answered with something its contract (docs/fal-api.md) does not allow. Exit 3."""

    exit_code = 3
    advice = "run again, and if it stays so, look for a newer faletl or ask fal"


class MalformedAnswerError(ContractError):
    """Status 2xx, but no whole JSON document, and none when asked again."""


class WebPageError(MalformedAnswerError):
    """Status 2xx, but a web page: a gateway's, or that of a host which is not fal's API."""


class NotFoundError(ContractError):
    """Fal answered 404: for a batch of ids this means that one of them is unknown."""


class AstrayError(ContractError):
    """The cursors that fal gave out lead nowhere: the pages landed so far are of no use."""


class CursorRefusedError(AstrayError):
    """Fal refused (400) a cursor it had given out itself: the walk has to start over."""


class UnprovenError(FaletlError):
    """What we hold is not what fal's own control total says. Exit 3."""

    exit_code = 3


class DataRefusedError(FaletlError):
    """Rows that cannot be right (type, sign, precision), or that the gate refuses. Exit 3."""

    exit_code = 3


class HeldError(FaletlError):
    """An extract lacks rows that were proven before, so what is loaded stays. Exit 3."""

    exit_code = 3


class WarehouseError(FaletlError):
    """The warehouse cannot be used right now: gone, broken or full. Exit 1."""

    is_retryable = True


class WarehouseBusyError(WarehouseError):
    """Somebody else writes to the warehouse, and did so for as long as we waited. Exit 1."""


class ExhaustedError(FaletlError):
    """There is no more memory, or no more threads: of the machine, or by a limit. Exit 1."""

    is_retryable = True

    @classmethod
    def of_engine(cls, what: str, error: Exception, **facts: Fact) -> Self:
        """The error where DuckDB has no memory: by its own setting, or because there is none."""
        said = str(error).splitlines()[0]
        is_none_left = "bad allocation" in said
        do = "raise the limit, or lower FALETL_PARALLEL" if is_none_left else "raise FALETL_MEMORY"
        return cls(f"{what} ran out of memory ({said}); {do}", **facts)


class LeaseLostError(FaletlError):
    """A newer run took the lease over: this one must not write any more. Exit 1."""


class CheckFailedError(FaletlError):
    """A SQL check found rows after a build: the build was undone. Exit 3."""

    exit_code = 3


class TamperedError(FaletlError):
    """Landed pages or the warehouse were changed behind our back: a person must look. Exit 4."""

    exit_code = 4


class DamagedExtractError(TamperedError):
    """The landed pages of an extract, or its manifest, are damaged or gone. Exit 4."""

    @classmethod
    def of_many(cls, first: DamagedExtractError, extracts: int) -> DamagedExtractError:
        """Return one error for several extracts that are damaged, with the first of them."""
        if extracts == 1:
            return first
        return cls(
            f"the landed pages of {extracts:,} extracts are damaged or gone: is FALETL_LANDING right, "
            f"and its disk mounted? The first: {first}",
            extracts=extracts,
        )


class StorageError(FaletlError):
    """The disk or the object store refused: full, no permission, no such bucket, no answer. Exit 1."""

    is_retryable = True


def how_to_install(extra: str) -> str:
    """Return what installs an extra of faletl, which no package index has (README, "Install it")."""
    return f"pip install '/path/to/faletl[{extra}]', from a checkout or a wheel of faletl"

"""Every error that faletl raises on purpose, as one tree.

A class states what to do: its exit code (README, "Exit codes") and whether another try can help. An
error keeps its facts. Callers that know more of them (which window, which page) add them with `at` on
the way up, so that the final sentence names the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

Fact = str | int | None

# Facts that the sentence names, in reading order; all others are in `facts` only.
_NAMED = ("resource", "window", "page")


class FaletlError(Exception):
    """An error that a person or a scheduler can act upon."""

    exit_code: ClassVar[int] = 1
    is_retryable: ClassVar[bool] = False
    advice: ClassVar[str] = ""
    """What to do, where the message does not name it."""

    findings: object | None = None
    """The findings in an extract that was refused (faletl/findings.py)."""

    unproven: Sequence[object] = ()
    """The parts of a window that do not add up (faletl/staging/proof.py), to be fetched again."""

    def __init__(self, message: str, **facts: Fact) -> None:
        super().__init__(message)
        self.message = message
        self.facts: dict[str, Fact] = facts

    def at(self, **facts: Fact) -> Self:
        """Add facts that are not known yet, and return this error."""
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
        request = f" (fal request {request_id})" if request_id else ""
        return f"{place}{': ' if place else ''}{self.sentence}{request}"

    def as_dict(self) -> dict[str, Fact | bool]:
        """Return the error for machines: class, sentence, exit code, whether to retry, and all facts."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "exit_code": self.exit_code,
            "is_retryable": self.is_retryable,
            "advice": self.advice,
            **self.facts,
        }


class UsageError(FaletlError):
    """Wrong use: a command, a date or a setting that is not valid. Exit 2."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting is missing or not valid."""


class AccessRefusedError(FaletlError):
    """Fal refuses every request until a person acts. Exit 2, never a retry."""

    exit_code = 2


class KeyRefusedError(AccessRefusedError):
    """Fal refused the key (401 or 403): another key or preset is needed."""


class AccountLockedError(AccessRefusedError):
    """Fal locked the account (402, or a 403 with that message): paying, or fal's support, unlocks it."""

    advice = "another key will not help; follow fal's message, then run again"


class ApiUnavailableError(FaletlError):
    """Fal could not be reached, or answered 429 or 5xx until we gave up. Exit 1, retry later."""

    is_retryable = True
    advice = "try again later"


class CircuitOpenError(ApiUnavailableError):
    """Fal no longer answers, or asks for too long a wait, so the client stopped asking. Exit 1."""


class ContractError(FaletlError):
    """Fal answered with something that its contract (docs/fal-api.md) does not allow. Exit 3."""

    exit_code = 3
    advice = "run again; if the error stays, look for a newer faletl or ask fal"


class MalformedAnswerError(ContractError):
    """Status 2xx, but no complete JSON document, also after retries."""


class WebPageError(MalformedAnswerError):
    """Status 2xx, but a web page: of a gateway, or of a host that is not fal's API."""


class NotFoundError(ContractError):
    """Fal answered 404: for a batch of ids, one of them is unknown."""


class AstrayError(ContractError):
    """The cursors that fal gave lead nowhere, so the pages landed so far are of no use."""


class CursorRefusedError(AstrayError):
    """Fal refused (400) a cursor that it had given itself: the walk must start again."""


class UnprovenError(FaletlError):
    """The rows do not add up to fal's own control total. Exit 3."""

    exit_code = 3


class DataRefusedError(FaletlError):
    """Rows violate fal's contract (type, sign, precision), or the gate refuses them. Exit 3."""

    exit_code = 3


class HeldError(FaletlError):
    """An extract lacks rows that were proven before, so the loaded rows stay. Exit 3."""

    exit_code = 3


class WarehouseError(FaletlError):
    """The warehouse cannot be used now: gone, broken or full. Exit 1."""

    is_retryable = True


class WarehouseBusyError(WarehouseError):
    """Another process was writing to the warehouse all the time that we waited. Exit 1."""


class ExhaustedError(FaletlError):
    """Memory or threads are exhausted: those of the machine, or by a limit. Exit 1."""

    is_retryable = True

    @classmethod
    def of_engine(cls, what: str, error: Exception, **facts: Fact) -> Self:
        """Return the error where DuckDB has no memory left: by its own limit, or on the machine."""
        reason = str(error).splitlines()[0]
        is_of_machine = "bad allocation" in reason
        cure = "raise the limit, or lower FALETL_PARALLEL" if is_of_machine else "raise FALETL_MEMORY"
        return cls(f"{what} ran out of memory ({reason}); {cure}", **facts)


class LeaseLostError(FaletlError):
    """A newer run took over the lease: this run must not write any more. Exit 1."""


class CheckFailedError(FaletlError):
    """A SQL check found rows after a build, so the build was undone. Exit 3."""

    exit_code = 3


class TamperedError(FaletlError):
    """Landed pages or the warehouse were changed from outside: a person must look. Exit 4."""

    exit_code = 4


class DamagedExtractError(TamperedError):
    """The landed pages of an extract, or its manifest, are damaged or gone. Exit 4."""

    @classmethod
    def of_many(cls, first: DamagedExtractError, extracts: int) -> DamagedExtractError:
        """Return one error for several damaged extracts, with the first of them."""
        if extracts == 1:
            return first
        return cls(
            f"the landed pages of {extracts:,} extracts are damaged or gone; check FALETL_LANDING, and "
            f"whether its disk is mounted. The first: {first}",
            extracts=extracts,
        )


class StorageError(FaletlError):
    """The disk or the object store failed: full, no permission, no such bucket, no answer. Exit 1."""

    is_retryable = True


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra; no package index has faletl (README, "Install it")."""
    return f"pip install '/path/to/faletl[{extra}]', from a checkout or a wheel of faletl"

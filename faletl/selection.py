"""Selection: which days and resources a command covers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date

from faletl.errors import UsageError
from faletl.resources import RESOURCES
from faletl.windows import Window, refuse_odd_day


@dataclass(frozen=True, slots=True)
class Asked:
    """The days and resources that a command covers: UTC days from `start` to before `end`.

    Without `start`, what is due (before `end`); without `end`, up to now; without `resources`, all.
    Days are from 2021-01-01 to tomorrow.

    Raises:
        UsageError: the dates or resources are not valid.
    """

    start: date | None = None
    end: date | None = None
    resources: Collection[str] = ()

    def __post_init__(self) -> None:
        start, end = self.start, self.end
        if unknown := sorted(set(self.resources) - set(RESOURCES)):
            raise UsageError(
                f"there is no resource {', '.join(map(repr, unknown))}; use {', '.join(RESOURCES)}"
            )
        for option, day in (("--start", start), ("--end", end)):
            if day is not None:
                refuse_odd_day(option, day)
        if start is not None and end is not None and end <= start:
            raise UsageError(f"--end {end} is not after --start {start}; --end is exclusive")

    def includes(self, resource: str, window: Window) -> bool:
        """Whether the selection covers this window of this resource."""
        if self.resources and resource not in self.resources:
            return False
        return (self.start or date.min) <= window.day < (self.end or date.max)


EVERYTHING_DUE = Asked()
"""Everything that is due, of every resource."""

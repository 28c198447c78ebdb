"""Windows: half-open spans of UTC time, and the rule that tells which of them are due."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
WEEK = timedelta(days=7)

SETTLE = timedelta(minutes=5)
"""How far behind now an hour must have ended before we read it (docs/fal-api.md, "Arrival")."""

WATCH = timedelta(days=90)
"""For how long after its end a window is read again for late and restated data."""


SETTLED_AFTER = timedelta(hours=24)
"""How long after a day's end its billing events and its usage may still differ."""


@dataclass(frozen=True, order=True, slots=True)
class Window:
    """`[start, end)` in UTC. A snapshot is the empty window at its instant: start = end."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if self.start.utcoffset() != timedelta(0) or self.end.utcoffset() != timedelta(0):
            raise ValueError("a window is in UTC")
        if self.end < self.start:
            raise ValueError("a window ends at or after its start")

    @classmethod
    def of_day(cls, day: date) -> Window:
        """The UTC day."""
        start = datetime.combine(day, time(), UTC)
        return cls(start, start + DAY)

    @classmethod
    def snapshot(cls, at: datetime) -> Window:
        """The instant of a snapshot."""
        return cls(at, at)

    @property
    def day(self) -> date:
        """The UTC day in which the window starts."""
        return self.start.date()

    @property
    def is_snapshot(self) -> bool:
        """Whether the window is an instant."""
        return self.start == self.end

    @property
    def is_provisional(self) -> bool:
        """Whether the window is a day that was cut because it had not ended yet."""
        return not self.is_snapshot and self.end < self.start + DAY

    def has_settled(self, read_at: datetime) -> bool:
        """Whether the window is a day whose figures should all be there in a read that began then."""
        is_whole = not self.is_snapshot and not self.is_provisional
        return is_whole and read_at - self.end >= SETTLED_AFTER

    def settled(self, now: datetime) -> Window | None:
        """The part of the window up to the last full hour that ended `SETTLE` ago; None if empty."""
        last = (now - SETTLE).replace(minute=0, second=0, microsecond=0)
        end = min(self.end, last)
        return Window(self.start, end) if end > self.start else None

    def halves(self, unit: timedelta) -> tuple[Window, ...]:
        """Two parts of about the same length, of whole units each; none where the window is one unit."""
        units = (self.end - self.start) // unit
        if units < 2:
            return ()
        middle = self.start + units // 2 * unit
        return Window(self.start, middle), Window(middle, self.end)

    def __str__(self) -> str:
        if self.is_snapshot:
            return instant(self.start)
        if self.end - self.start == DAY:
            return self.day.isoformat()
        return f"{instant(self.start)}/{instant(self.end)}"


def instant(at: datetime) -> str:
    """RFC 3339 in UTC with a Z, to the second where that is exact."""
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def utc_days(first: date, end: date) -> Iterator[Window]:
    """The UTC days from `first` to before `end`, in order."""
    for offset in range((end - first).days):
        yield Window.of_day(first + timedelta(days=offset))


@dataclass(frozen=True, slots=True)
class Read:
    """When a loaded window was last read, and whether it was still open then.

    `whole_catalogue_at` is when all of fal's endpoints were last asked for, where only some are.
    """

    read_at: datetime
    is_provisional: bool
    whole_catalogue_at: datetime | None = None


def next_due(window: Window, read: Read | None) -> datetime | None:
    """When the window should be read (again); None when it has been watched long enough.

    A window never read, or read while it was open, is due at once. A closed one is due when its age
    has doubled since the last read, and once more at the end of the watch: late and restated data
    is found for 90 days at a logarithmic number of calls.
    """
    if read is None or read.is_provisional:
        return window.start
    last_look = window.end + WATCH
    if read.read_at >= last_look:
        return None
    return min(window.end + max(HOUR, 2 * (read.read_at - window.end)), last_look)


def asks_whole_catalogue(window: Window, read: Read | None, now: datetime) -> bool:
    """Whether a read of the window is to ask for all endpoints, not only for those that were used.

    Requests that only fail leave no usage. So a closed day is asked for every endpoint at first, and
    weekly as far as it is read again; days that were long past when they were first read, from their
    second read on, to keep the first run short.
    """
    if window.is_provisional or window.is_snapshot:
        return False
    last = read.whole_catalogue_at if read else None
    if last is not None and last >= window.end:
        return now - last >= WEEK
    return read is not None or now - window.end < WEEK


def due_days(now: datetime, reads: Mapping[date, Read], first_day: date) -> Iterable[Window]:
    """The UTC days from `first_day` to today that are to be read now, in order."""
    for window in utc_days(first_day, now.date() + DAY):
        read = reads.get(window.day)
        if read is not None and read.read_at > now:
            read = None  # the clock was ahead when it was read; do not wait until it is right again
        due = next_due(window, read)
        if due is not None and due <= now:
            yield window

"""Windows: half-open spans of UTC time, and the rule that tells which of them are due."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from faletl.errors import UsageError

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
WEEK = timedelta(days=7)

LONG_AGO = datetime.min.replace(tzinfo=UTC)

FIRST_DAY = date(2021, 1, 1)
"""The first day that can be named: fal sold nothing before."""

SETTLE = timedelta(minutes=5)
"""How far behind now an hour must have ended before we read it (docs/fal-api.md, "Arrival")."""

CLOCK_TOLERANCE = timedelta(minutes=5)
"""How far two clocks may differ before one of them counts as wrong."""

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


@dataclass(frozen=True, slots=True)
class WindowKey:
    """The name of a window: of which account, of which resource, of which time."""

    account: str
    resource: str
    window: Window

    @property
    def columns(self) -> dict[str, Any]:
        """The same as columns of the tables of ops."""
        return {
            "account": self.account,
            "resource": self.resource,
            "window_start": self.window.start,
        }


@dataclass(frozen=True, slots=True)
class ExtractRef:
    """The name of an extract; `path` is relative to the landing folder, `started_at` by our clock."""

    key: WindowKey
    extract_id: str
    run_id: str
    path: str
    started_at: datetime
    finished_at: datetime

    @property
    def columns(self) -> dict[str, Any]:
        """The same as columns of the tables of ops."""
        return {"load_id": self.extract_id, **self.key.columns}


def instant(at: datetime) -> str:
    """RFC 3339 in UTC with a Z, to the second where that is exact."""
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def day_of(text: str) -> date:
    """Return the date that a person wrote as 2026-11-01; raises ValueError for anything else.

    `date.fromisoformat` takes weeks and omitted hyphens, `strptime` takes digits of any script.
    """
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            return date.fromisoformat(text)
    except ValueError:  # the 31st of November
        pass
    raise ValueError(f"{text!a} is not a date like 2026-11-01")


def refuse_odd_day(what: str, day: date) -> None:
    """Raises UsageError for a day that fal cannot have data of: before 2021, or after tomorrow."""
    tomorrow = datetime.now(UTC).date() + DAY
    if not FIRST_DAY <= day <= tomorrow:
        raise UsageError(
            f"{what} {day} is out of range; name a day from {FIRST_DAY}, when fal began to sell, to "
            f"tomorrow, {tomorrow}"
        )


def utc_days(first: date, end: date) -> Iterator[Window]:
    """The UTC days from `first` to before `end`, in order."""
    for offset in range((end - first).days):
        yield Window.of_day(first + timedelta(days=offset))


@dataclass(frozen=True, slots=True)
class Hold:
    """Since when a window is held, when it was last extracted, and whether that is the end of it."""

    since: datetime
    last_extracted_at: datetime
    is_final: bool


@dataclass(frozen=True, slots=True)
class LastExtract:
    """When a loaded window was last extracted, and whether it was still open then.

    `whole_catalogue_at` is when all of fal's endpoints were last asked for, where only some are;
    `changed_at` when the extract began that changed the window last after it had ended.
    """

    read_at: datetime
    is_provisional: bool
    whole_catalogue_at: datetime | None = None
    changed_at: datetime | None = None
    hold: Hold | None = None

    def as_of(self, now: datetime) -> LastExtract | None:
        """Return what a clock at `now` makes of the extract; None where it knows nothing of it yet.

        An extract of the future was made by a clock that was ahead. No instant that such a clock left
        delays anything.
        """
        if self.read_at > now or (self.hold is not None and self.hold.last_extracted_at > now):
            return None
        is_whole_known = self.whole_catalogue_at is not None and self.whole_catalogue_at <= now
        return replace(
            self,
            changed_at=min(self.changed_at, self.read_at) if self.changed_at else None,
            whole_catalogue_at=self.whole_catalogue_at if is_whole_known else None,
        )


def next_due(window: Window, read: LastExtract | None) -> datetime | None:
    """When the window should be extracted (again); None when it has been watched long enough.

    A window never extracted, or extracted while it was open, is due at once. A closed one is due when
    its age since its end, or since the extract that last changed it, has doubled since the last extract,
    and once more at the end of the watch: late and restated data is found for 90 days at a logarithmic
    number of calls. A held window is due 1, 2, 4 … hours after it was first held, unless fal may no
    longer serve it.
    """
    if read is not None and read.hold is not None:
        hold = read.hold
        return None if hold.is_final else _doubled(hold.since, hold.last_extracted_at)
    if read is None or read.is_provisional:
        return window.start
    last_look = window.end + WATCH
    if read.read_at >= last_look:
        return None
    return min(_doubled(max(window.end, read.changed_at or window.end), read.read_at), last_look)


def _doubled(anchor: datetime, last: datetime) -> datetime:
    """When as much time has gone since `anchor` twice as had gone by `last`; an hour at least."""
    return anchor + max(HOUR, 2 * (last - anchor))


def asks_whole_catalogue(window: Window, read: LastExtract | None, now: datetime) -> bool:
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


def due_days(now: datetime, reads: Mapping[date, LastExtract], first_day: date) -> Iterable[Window]:
    """The UTC days from `first_day` to today that are to be read now, in order."""
    for window in utc_days(first_day, now.date() + DAY):
        read = reads.get(window.day)
        due = next_due(window, read.as_of(now) if read is not None else None)
        if due is not None and due <= now:
            yield window

"""Windows: half-open spans of UTC time, and the rule by which they are due."""

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
"""The first day that a person can name: fal sold nothing before it."""

SETTLE = timedelta(minutes=5)
"""How long ago an hour must have ended before we extract it (docs/fal-api.md, "Arrival")."""

CLOCK_TOLERANCE = timedelta(minutes=5)
"""The largest difference of two clocks that are both taken as right."""

WATCH = timedelta(days=90)
"""How long after its end a window is extracted again, for late and restated data."""


SETTLED_AFTER = timedelta(hours=24)
"""How long after the end of a day its billing events and its usage may still differ."""


@dataclass(frozen=True, order=True, slots=True)
class Window:
    """A span `[start, end)` in UTC. A snapshot is the empty window at its instant: start = end."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if self.start.utcoffset() != timedelta(0) or self.end.utcoffset() != timedelta(0):
            raise ValueError("a window is in UTC")
        if self.end < self.start:
            raise ValueError("a window ends at or after its start")

    @classmethod
    def of_day(cls, day: date) -> Window:
        """Return the window of a UTC day."""
        start = datetime.combine(day, time(), UTC)
        return cls(start, start + DAY)

    @classmethod
    def snapshot(cls, at: datetime) -> Window:
        """Return the window of a snapshot at this instant."""
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
        """Whether the window is the beginning of a day that had not ended yet."""
        return not self.is_snapshot and self.end < self.start + DAY

    def has_settled(self, started_at: datetime) -> bool:
        """Whether the window is a day that was settled when an extract started at this instant."""
        is_whole = not self.is_snapshot and not self.is_provisional
        return is_whole and started_at - self.end >= SETTLED_AFTER

    def settled(self, now: datetime) -> Window | None:
        """Return the part up to the last full hour that ended `SETTLE` ago; None if it is empty."""
        last = (now - SETTLE).replace(minute=0, second=0, microsecond=0)
        end = min(self.end, last)
        return Window(self.start, end) if end > self.start else None

    def halves(self, unit: timedelta) -> tuple[Window, ...]:
        """Return two parts of about equal length, in whole units; none where the window is one unit."""
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
    """The name of a window: its account, its resource and its time."""

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
    """Return an instant as RFC 3339 in UTC with a Z, with a fraction only where it has one."""
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def day_of(text: str) -> date:
    """Return the date that a person wrote as 2026-11-01; raises ValueError for anything else.

    `date.fromisoformat` accepts weeks and omitted hyphens, `strptime` accepts digits of any script.
    """
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            return date.fromisoformat(text)
    except ValueError:  # the 31st of November
        pass
    raise ValueError(f"{text!a} is not a date like 2026-11-01")


def refuse_odd_day(what: str, day: date) -> None:
    """Raise UsageError for a day of which fal has no data: before 2021, or after tomorrow."""
    tomorrow = datetime.now(UTC).date() + DAY
    if not FIRST_DAY <= day <= tomorrow:
        raise UsageError(
            f"{what} {day} is out of range; name a day from {FIRST_DAY}, when fal began to sell, to "
            f"tomorrow, {tomorrow}"
        )


def utc_days(first: date, end: date) -> Iterator[Window]:
    """Yield the UTC days from `first` to before `end`, in order."""
    for offset in range((end - first).days):
        yield Window.of_day(first + timedelta(days=offset))


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold on a window: its start, its last extract, and whether no further extract is due."""

    since: datetime
    last_extracted_at: datetime
    is_final: bool


@dataclass(frozen=True, slots=True)
class LastExtract:
    """The last extract of a loaded window: its start, and whether the window was still open then.

    `whole_catalogue_at` is when all of fal's endpoints were last asked for, for a resource that is
    usually asked for some. `changed_at` is the start of the last extract that changed the window after
    its end.
    """

    read_at: datetime
    is_provisional: bool
    whole_catalogue_at: datetime | None = None
    changed_at: datetime | None = None
    hold: Hold | None = None

    def as_of(self, now: datetime) -> LastExtract | None:
        """Return the extract as known at `now`; None if it is in the future.

        An extract in the future was made by a clock that was ahead. No instant of such a clock delays
        the next extract.
        """
        if self.read_at > now or (self.hold is not None and self.hold.last_extracted_at > now):
            return None
        is_whole_known = self.whole_catalogue_at is not None and self.whole_catalogue_at <= now
        return replace(
            self,
            changed_at=min(self.changed_at, self.read_at) if self.changed_at else None,
            whole_catalogue_at=self.whole_catalogue_at if is_whole_known else None,
        )


def next_due(window: Window, extract: LastExtract | None) -> datetime | None:
    """Return when the window is due; None when it has been watched long enough.

    A window never extracted, or extracted while it was open, is due at once. A closed one is due when
    its age since its end, or since the extract that last changed it, has doubled since the last extract,
    and once more at the end of the watch: late and restated data is found for 90 days at a logarithmic
    number of calls. A held window is due 1, 2, 4 … hours after it was first held, unless fal may no
    longer serve it.
    """
    if extract is not None and extract.hold is not None:
        hold = extract.hold
        return None if hold.is_final else _doubled(hold.since, hold.last_extracted_at)
    if extract is None or extract.is_provisional:
        return window.start
    watch_end = window.end + WATCH
    if extract.read_at >= watch_end:
        return None
    return min(_doubled(max(window.end, extract.changed_at or window.end), extract.read_at), watch_end)


def _doubled(anchor: datetime, last: datetime) -> datetime:
    """Return when the time since `anchor` will be twice what it was at `last`; at least an hour."""
    return anchor + max(HOUR, 2 * (last - anchor))


def asks_whole_catalogue(window: Window, extract: LastExtract | None, now: datetime) -> bool:
    """Whether an extract of the window must ask for all endpoints, not only for those that were used.

    Requests that only fail leave no usage. So the first extract of a closed day asks for every endpoint,
    and later extracts do so once a week. For a day that was more than a week past at its first extract,
    this begins with its second extract, to keep the first run short.
    """
    if window.is_provisional or window.is_snapshot:
        return False
    last = extract.whole_catalogue_at if extract else None
    if last is not None and last >= window.end:
        return now - last >= WEEK
    return extract is not None or now - window.end < WEEK


def due_days(now: datetime, extracts: Mapping[date, LastExtract], first_day: date) -> Iterable[Window]:
    """Yield the UTC days from `first_day` to today that are due now, in order."""
    for window in utc_days(first_day, now.date() + DAY):
        extract = extracts.get(window.day)
        due = next_due(window, extract.as_of(now) if extract is not None else None)
        if due is not None and due <= now:
            yield window

"""Windows, and the rule that tells which of them are due."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from faletl.windows import (
    DAY,
    HOUR,
    SETTLE,
    SETTLED_AFTER,
    WATCH,
    LastExtract,
    Window,
    due_days,
    instant,
    next_due,
    utc_days,
)

NOW = datetime(2026, 11, 23, 10, 30, tzinfo=UTC)
TODAY = NOW.date()
YESTERDAY = Window.of_day(TODAY - DAY)
SECOND = timedelta(seconds=1)

INSTANTS = st.datetimes(
    NOW.replace(year=2000, tzinfo=None),
    NOW.replace(year=2100, tzinfo=None),
    timezones=st.just(UTC),
)
DATES = st.dates(date(2000, 1, 1), date(2100, 1, 1))


# --- Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", [None, timezone(HOUR), ZoneInfo("Asia/Kathmandu")])
@pytest.mark.parametrize("is_start", [True, False])
def test_a_window_outside_utc_is_refused(zone: timezone | ZoneInfo | None, is_start: bool) -> None:
    other = NOW.replace(tzinfo=zone)
    with pytest.raises(ValueError, match="UTC"):
        Window(other, NOW + DAY) if is_start else Window(NOW - DAY, other)


def test_a_window_that_ends_before_its_start_is_refused() -> None:
    with pytest.raises(ValueError, match="at or after"):
        Window(NOW, NOW - timedelta(microseconds=1))


def test_a_zone_that_is_utc_by_another_name_is_taken() -> None:
    assert Window(NOW.replace(tzinfo=ZoneInfo("Etc/UTC")), NOW).is_snapshot


@given(INSTANTS, st.timedeltas(timedelta(0), 3 * DAY))
def test_a_window_is_a_snapshot_or_provisional_or_whole_and_never_two_of_them(
    start: datetime, length: timedelta
) -> None:
    window = Window(start, start + length)
    assert window.is_snapshot == (length == timedelta(0))
    assert window.is_provisional == (timedelta(0) < length < DAY)
    assert window.day == start.date()


@pytest.mark.parametrize(
    ("window", "text"),
    [
        (Window.of_day(date(2028, 2, 29)), "2028-02-29"),
        (Window(NOW.replace(hour=0, minute=0), NOW), "2026-11-23T00:00:00Z/2026-11-23T10:30:00Z"),
        (Window.snapshot(NOW), "2026-11-23T10:30:00Z"),
        (Window.snapshot(NOW + timedelta(microseconds=1)), "2026-11-23T10:30:00.000001Z"),
    ],
)
def test_a_window_is_named_as_short_as_it_is_exact(window: Window, text: str) -> None:
    assert str(window) == text


@given(INSTANTS, st.sampled_from(["UTC", "Asia/Kathmandu", "America/Los_Angeles"]))
def test_an_instant_is_written_in_utc_and_reads_back_exactly(at: datetime, zone: str) -> None:
    text = instant(at.astimezone(ZoneInfo(zone)))
    assert text.endswith("Z")
    assert datetime.fromisoformat(text) == at


@given(DATES, st.integers(0, 500))
@example(date(2026, 3, 28), 4)  # where many clocks change
@example(date(2028, 2, 28), 3)
def test_days_touch_without_overlap_and_cover_the_range(first: date, count: int) -> None:
    days = list(utc_days(first, first + count * DAY))
    assert [window.day for window in days] == [first + n * DAY for n in range(count)]
    assert all(window.end - window.start == DAY for window in days)
    assert all(window.start.tzinfo is UTC and window.start.hour == 0 for window in days)
    assert all(before.end == after.start for before, after in pairwise(days))


def test_there_are_no_days_in_a_range_that_ends_before_it_starts() -> None:
    assert list(utc_days(TODAY, TODAY - DAY)) == []


# --- Settled --------------------------------------------------------------------------------------


@given(DATES, INSTANTS | st.timedeltas(-DAY, 2 * DAY))
def test_the_settled_part_ends_at_the_last_full_hour_that_ended_long_enough_ago(
    day: date, when: datetime | timedelta
) -> None:
    window = Window.of_day(day)
    now = window.start + when if isinstance(when, timedelta) else when
    settled = window.settled(now)
    hours = [window.start + n * HOUR for n in range(25)]
    reached = [hour for hour in hours if hour + SETTLE <= now]
    if len(reached) <= 1:
        assert settled is None
        return
    assert settled == Window(window.start, reached[-1])
    assert settled.is_provisional == (reached[-1] < window.end)


@pytest.mark.parametrize(
    ("clock", "end"),
    [
        ("00:04:59", None),
        ("01:04:59", None),
        ("01:05:00", "01:00"),
        ("10:04:59", "09:00"),
        ("10:05:00", "10:00"),
        ("23:59:59", "23:00"),
    ],
)
def test_an_open_day_is_cut_where_an_hour_has_just_settled(clock: str, end: str | None) -> None:
    settled = Window.of_day(TODAY).settled(datetime.fromisoformat(f"{TODAY}T{clock}+00:00"))
    assert (settled and settled.end) == (end and datetime.fromisoformat(f"{TODAY}T{end}+00:00"))


def test_a_day_is_whole_five_minutes_after_midnight_and_not_before() -> None:
    almost, whole = (
        YESTERDAY.settled(YESTERDAY.end + SETTLE - SECOND),
        YESTERDAY.settled(YESTERDAY.end + SETTLE),
    )
    assert almost is not None
    assert almost.is_provisional
    assert whole == YESTERDAY


def test_a_day_that_has_not_begun_has_no_settled_part() -> None:
    assert Window.of_day(TODAY + DAY).settled(NOW) is None


# --- Due ------------------------------------------------------------------------------------------


def reads_of(window: Window, every: timedelta, first: timedelta, runs: int) -> list[datetime]:
    """When a closed window is read by runs in a row, the first of them so long after its end."""
    read, times = None, []
    for number in range(runs):
        now = window.end + first + number * every
        due = next_due(window, read)
        if due is not None and due <= now:
            times.append(now)
            read = LastExtract(now, is_provisional=False)
    return times


@given(
    every=st.timedeltas(timedelta(minutes=20), 2 * DAY),
    first=st.timedeltas(SETTLE, 3 * DAY),
)
@example(every=HOUR, first=SETTLE)
@example(every=timedelta(minutes=5), first=SETTLE)
@example(every=DAY, first=SETTLE)
def test_a_closed_window_is_read_a_logarithmic_number_of_times_and_last_at_the_end_of_the_watch(
    every: timedelta, first: timedelta
) -> None:
    times = reads_of(YESTERDAY, every, first, runs=(WATCH + 30 * DAY) // every)
    ages = [at - YESTERDAY.end for at in times]
    assert len(ages) <= 15
    assert ages[0] == first
    assert WATCH <= ages[-1] < WATCH + every
    assert all(age < WATCH for age in ages[:-1])
    assert all(after >= min(2 * before, WATCH) for before, after in pairwise(ages))


@given(every=st.timedeltas(timedelta(minutes=20), HOUR), late=st.timedeltas(HOUR, WATCH - HOUR))
def test_late_data_is_read_before_it_is_much_older_than_it_was_when_it_came(
    every: timedelta, late: timedelta
) -> None:
    times = reads_of(YESTERDAY, every, SETTLE, runs=(WATCH + DAY) // every)
    seen = next(at for at in times if at >= YESTERDAY.end + late) - YESTERDAY.end
    assert seen <= 2 * late + every


def test_a_window_never_read_is_due_at_once() -> None:
    assert next_due(YESTERDAY, None) == YESTERDAY.start


@given(st.timedeltas(-DAY, 200 * DAY))
def test_a_window_that_was_open_when_it_was_read_is_due_at_once(age: timedelta) -> None:
    read = LastExtract(YESTERDAY.end + age, is_provisional=True)
    assert next_due(YESTERDAY, read) == YESTERDAY.start


@given(st.timedeltas(timedelta(0), 500 * DAY))
def test_a_read_at_the_end_of_the_watch_or_later_is_the_last(later: timedelta) -> None:
    assert next_due(YESTERDAY, LastExtract(YESTERDAY.end + WATCH + later, is_provisional=False)) is None


@given(st.timedeltas(-DAY, WATCH - SECOND))
def test_a_read_before_the_end_of_the_watch_is_never_the_last(age: timedelta) -> None:
    due = next_due(YESTERDAY, LastExtract(YESTERDAY.end + age, is_provisional=False))
    assert due is not None
    assert YESTERDAY.end + HOUR <= due <= YESTERDAY.end + WATCH
    assert due > YESTERDAY.end + age


@given(st.integers(0, 400))
def test_a_first_run_reads_every_day_from_the_first_one_to_today(first_days: int) -> None:
    first = TODAY - first_days * DAY
    assert list(due_days(NOW, {}, first)) == list(utc_days(first, TODAY + DAY))


@given(st.sets(st.integers(0, 29)))
def test_every_day_that_was_not_loaded_is_due_and_those_just_read_are_not(gaps: set[int]) -> None:
    first = TODAY - 29 * DAY
    reads = {
        first + n * DAY: LastExtract(NOW - timedelta(minutes=1), is_provisional=first + n * DAY == TODAY)
        for n in range(30)
        if n not in gaps
    }
    due = [window.day for window in due_days(NOW, reads, first)]
    assert due == sorted({first + n * DAY for n in gaps} | {TODAY})


@pytest.mark.parametrize("age", [HOUR, 5 * HOUR, 80 * DAY])
def test_a_day_is_due_from_the_very_moment_on_that_it_was_told_for(age: timedelta) -> None:
    day, read = YESTERDAY.day, LastExtract(YESTERDAY.end + age, is_provisional=False)
    due = next_due(YESTERDAY, read)
    assert due is not None
    assert YESTERDAY in due_days(due, {day: read}, day)
    assert YESTERDAY not in due_days(due - SECOND, {day: read}, day)


def test_days_before_the_first_one_are_left_alone() -> None:
    reads = {TODAY - 40 * DAY: LastExtract(NOW - 30 * DAY, is_provisional=True)}
    assert [window.day for window in due_days(NOW, reads, TODAY)] == [TODAY]


@given(ahead=st.timedeltas(SECOND, 1000 * DAY), age=st.integers(0, 29), is_open=st.booleans())
def test_a_clock_that_was_ahead_does_not_freeze_what_was_read_by_it(
    ahead: timedelta, age: int, is_open: bool
) -> None:
    day = TODAY - age * DAY
    reads = {day: LastExtract(NOW + ahead, is_provisional=is_open)}
    assert next(window.day for window in due_days(NOW, reads, day)) == day


def test_a_clock_that_is_behind_reads_nothing_of_days_to_come() -> None:
    assert list(due_days(NOW, {}, TODAY + 5 * DAY)) == []


@given(
    st.dictionaries(
        st.integers(-5, 120),
        st.tuples(st.timedeltas(-200 * DAY, 10 * DAY), st.booleans()),
        max_size=30,
    ),
    st.integers(-5, 120),
)
def test_due_days_are_in_order_without_doubles_and_never_in_the_future(
    read: dict[int, tuple[timedelta, bool]], first: int
) -> None:
    reads = {TODAY - age * DAY: LastExtract(NOW + at, is_open) for age, (at, is_open) in read.items()}
    due = [window.day for window in due_days(NOW, reads, TODAY - first * DAY)]
    assert due == sorted(set(due))
    assert all(TODAY - first * DAY <= day <= TODAY for day in due)


@pytest.mark.parametrize(("early", "is_settled"), [(timedelta(0), True), (SECOND, False)])
def test_a_whole_day_has_settled_a_day_after_its_end(early: timedelta, is_settled: bool) -> None:
    read_at = YESTERDAY.end + SETTLED_AFTER - early
    assert YESTERDAY.has_settled(read_at) is is_settled
    cut = Window(YESTERDAY.start, YESTERDAY.end - HOUR)
    assert not cut.has_settled(read_at + DAY)
    assert not Window.snapshot(YESTERDAY.start).has_settled(read_at + DAY)

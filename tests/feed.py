"""A large account, made up event by event: pages as fal writes them, without a world behind them.

For chaos and benchmarks. What a day holds follows from its number and its revision alone, so that
whoever serves it and whoever checks the tables need not share anything else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import NamedTuple

ENDPOINTS = tuple(f"bench/endpoint-{number:02d}" for number in range(50))
NANO_PRICES = (25_000_000, 1_500, 333_333_333, 40_000_000, 7)  # of one part of a unit, in turn
PARTS = (1, 24, 1, 1, 48_000)  # of a unit: an image, or a second of 24 frames or 48,000 samples
MICROSECONDS = 86_400_000_000
TWIN_EVERY = 1000
CURSOR = "page-{}"


class Event(NamedTuple):
    """One charge, of whole parts of a unit."""

    at: datetime
    request_id: str
    endpoint_id: str
    pieces: int
    nano: int


@dataclass(eq=False)
class Feed:
    """So many events on each of so many days; `revisions` of days may change while it is served."""

    first: date
    days: int
    events_per_day: int
    page_rows: int = 10_000
    revisions: MutableSequence[int] = field(default_factory=list)

    @property
    def pages_per_day(self) -> int:
        """Pages that a day's events take."""
        return -(-self.events_per_day // self.page_rows)

    def day(self, number: int) -> date:
        """The day of that number, from 0."""
        return self.first + timedelta(days=number)

    def number(self, day: date) -> int | None:
        """The number of the day; None for one without events."""
        number = (day - self.first).days
        return number if 0 <= number < self.days else None

    def revision(self, number: int) -> int:
        """How often the day was restated."""
        return self.revisions[number] if self.revisions else 0

    def events(self, number: int, first: int = 0, end: int | None = None) -> Iterator[Event]:
        """The day's events in order of time; each thousandth is an exact twin of the one before."""
        revision, begin = self.revision(number), datetime.combine(self.day(number), time(), UTC)
        for of_day in range(first, self.events_per_day if end is None else end):
            event = of_day - 1 if of_day % TWIN_EVERY == TWIN_EVERY - 1 else of_day
            count = 1 + (event + number + revision) % 7
            yield Event(
                begin + timedelta(microseconds=event * MICROSECONDS // self.events_per_day),
                f"req-{number:04d}-{event:08d}-6f1c-4a27-9f0e",
                ENDPOINTS[event % len(ENDPOINTS)],
                count,
                count * NANO_PRICES[event % len(NANO_PRICES)],
            )

    def page(self, number: int, page: int) -> bytes:
        """A page of the day's billing events, counted from 0, as fal writes it."""
        first = page * self.page_rows
        end = min(first + self.page_rows, self.events_per_day)
        rows = ",".join(
            f'{{"request_id":"{one.request_id}","endpoint_id":"{one.endpoint_id}",'
            f'"timestamp":"{one.at:%Y-%m-%dT%H:%M:%S.%f}000Z",'
            f'"quantity":{quantity(one.endpoint_id, one.pieces)},'
            f'"output_units":{quantity(one.endpoint_id, one.pieces)},"unit":"images",'
            f'"unit_price":{unit_price(one.endpoint_id, one.nano // one.pieces)},"percent_discount":0,'
            f'"cost_subtotal":{money(one.nano)},"cost_discount":0,"cost_total":{money(one.nano)},'
            f'"cost_estimate_nano_usd":{one.nano},"auth_method":"prod",'
            f'"auth_method_structured":{{"detail":"prod","api_key_id":"key-1"}}}}'
            for one in self.events(number, first, end)
        )
        cursor = CURSOR.format(page + 1) if end < self.events_per_day else None
        more = json.dumps(cursor is not None)
        return (
            f'{{"billing_events":[{rows}],"next_cursor":{json.dumps(cursor)},"has_more":{more}}}'
        ).encode()

    def usage(self, number: int) -> bytes:
        """The same charges, added up: by hour for the series, by endpoint and price for the summary."""
        begin = datetime.combine(self.day(number), time(), UTC)
        hours = self.by_hour(number)
        whole: Counter[tuple[str, int]] = Counter()
        for (_, endpoint_id, price), count in hours.items():
            whole[endpoint_id, price] += count
        series = ",".join(
            f'{{"bucket":"{begin + timedelta(hours=hour):%Y-%m-%dT%H:%M:%SZ}","results":['
            + ",".join(
                _line(name, price, many) for (at, name, price), many in hours.items() if at == hour
            )
            + "]}"
            for hour in range(24)
        )
        summary = ",".join(_line(name, price, many) for (name, price), many in whole.items())
        return (
            f'{{"time_series":[{series}],"summary":[{summary}],"next_cursor":null,"has_more":false}}'
        ).encode()

    def by_hour(self, number: int) -> Counter[tuple[int, str, int]]:
        """The day's parts of units by hour, endpoint and price of a part in nano-dollars."""
        return _by_hour(self.first, self.events_per_day, number, self.revision(number))


@lru_cache(maxsize=400)
def _by_hour(
    first: date, events_per_day: int, number: int, revision: int
) -> Counter[tuple[int, str, int]]:
    feed = Feed(first, number + 1, events_per_day, revisions=[revision] * (number + 1))
    sums: Counter[tuple[int, str, int]] = Counter()
    for one in feed.events(number):
        sums[one.at.hour, one.endpoint_id, one.nano // one.pieces] += one.pieces
    return sums


def money(nano: int) -> str:
    """Nano-dollars as a JSON number in dollars."""
    return f"{nano // 10**9}.{nano % 10**9:09d}"


def parts(endpoint_id: str) -> int:
    """How many parts a unit of the endpoint has."""
    return PARTS[int(endpoint_id[-2:]) % len(PARTS)]


def quantity(endpoint_id: str, count: int) -> str:
    """So many parts in units, as fal writes it: a double of up to 17 digits where it is no whole one."""
    return repr(count / parts(endpoint_id)) if parts(endpoint_id) > 1 else str(count)


def unit_price(endpoint_id: str, nano_price: int) -> str:
    """The price of a unit in dollars, by that of a part in nano-dollars."""
    return money(nano_price * parts(endpoint_id))


def _line(endpoint_id: str, nano_price: int, count: int) -> str:
    cost = money(count * nano_price)
    return (
        f'{{"endpoint_id":"{endpoint_id}","unit":"images","quantity":{quantity(endpoint_id, count)},'
        f'"unit_price":{unit_price(endpoint_id, nano_price)},"percent_discount":null,'
        f'"cost_subtotal":{cost},"cost_discount":0,"cost_total":{cost},"cost":{cost},"currency":"USD","auth_method":"prod",'
        '"auth_method_structured":{"detail":"prod","api_key_id":"key-1"}}'
    )

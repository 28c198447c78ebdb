"""The data of a sandbox: the World protocol, and one invented world.

The invented world is a mid-size team that spends 100 to 600 USD a day, and about once a month far more
on a single call. All data follows from the seed and the hour: a day at once or hour by hour, today or
next year, gives the same lines. Prices change in the same way for every seed. Random numbers are whole
numbers, and amounts are quotients, products and sums of doubles, as fal's seem to be; every platform
computes both identically. So quantities and prices may have 17 digits. Each charge is rounded to a
nano-dollar; usage is not rounded (docs/fal-api.md, "Billing events").

If data comes late, the visible data of an hour follows from the clock as well, and from nothing else.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import UUID

from faletl.invented import ACCOUNT

HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Credential:
    """The caller as fal describes it: a label, and at most one of a key and a login."""

    detail: str
    api_key_id: str | None = None
    login_username: str | None = None


@dataclass(frozen=True)
class UsageLine:
    """The usage of one credential, endpoint and unit in one hour. `hour` is UTC, on the hour."""

    hour: datetime
    endpoint_id: str
    unit: str
    quantity: Decimal
    unit_price: Decimal
    percent_discount: Decimal | None
    cost_subtotal: Decimal
    cost_discount: Decimal
    cost_total: Decimal
    currency: str
    credential: Credential


@dataclass(frozen=True)
class BillingEvent:
    """One charge for one request. `timestamp` is that of the request, UTC; amounts are in USD."""

    timestamp: datetime
    request_id: str
    endpoint_id: str
    unit: str | None
    quantity: Decimal | None
    unit_price: Decimal | None
    percent_discount: Decimal | None
    cost_subtotal: Decimal
    cost_discount: Decimal
    cost_total: Decimal
    credential: Credential


@dataclass(frozen=True)
class Calls:
    """The outcomes of the requests to one endpoint in one hour (UTC, on the hour). Times in seconds.

    There is a duration for each request that ran, prepared, or waited for a cold boot.
    """

    hour: datetime
    endpoint_id: str
    success_count: int = 0
    user_error_count: int = 0
    startup_error_count: int = 0
    connection_error_count: int = 0
    timeout_error_count: int = 0
    runtime_error_count: int = 0
    cold_boot_count: int = 0
    total_billable_duration: Decimal = Decimal(0)
    durations: tuple[Decimal, ...] = ()
    prepare_durations: tuple[Decimal, ...] = ()
    cold_boot_durations: tuple[Decimal, ...] = ()

    @property
    def error_count(self) -> int:
        """The number of requests that failed, except errors of the caller."""
        return (
            self.startup_error_count
            + self.connection_error_count
            + self.timeout_error_count
            + self.runtime_error_count
        )

    @property
    def request_count(self) -> int:
        """The number of all requests."""
        return self.success_count + self.user_error_count + self.error_count


class World(Protocol):
    """The data source of a server. Each request reads it again, so it may change."""

    account: str

    def models(self) -> list[dict[str, Any]]:
        """The catalogue as /models returns it: `endpoint_id`, and `metadata` where fal has some."""

    def prices(self) -> dict[str, dict[str, Any]]:
        """List prices by endpoint id, as /models/pricing returns them, `unit_price` a Decimal.

        An endpoint is known if it has a price or is among the models; not every model has a price.
        """

    def usage(self, start: datetime, end: datetime) -> Iterable[UsageLine]:
        """The lines of hours that begin in `[start, end)`, UTC. The server serves all of them."""

    def billing_events(self, start: datetime, end: datetime) -> Iterable[BillingEvent]:
        """The charges with a timestamp in `[start, end)`, UTC, in any order."""

    def calls(self, start: datetime, end: datetime) -> Iterable[Calls]:
        """The requests of the hours that begin in `[start, end)`, UTC, in any order."""

    def credits(self) -> dict[str, Any]:
        """`current_balance`, a Decimal, and its `currency`."""


class Caller(NamedTuple):
    """One credential's pattern: calls per UTC hour in permille of a day, weekends in percent."""

    credential: Credential
    permille: tuple[int, ...]
    weekend: int


_ROUND_THE_CLOCK = (
    26, 22, 20, 18, 18, 20, 26, 34, 44, 52, 56, 58, 56, 58, 62, 64, 62, 58, 54, 50, 44, 38, 32, 28,
)  # fmt: skip
_NIGHTLY = (0, 120, 260, 280, 220, 120, *[0] * 18)
_OFFICE = (*[0] * 7, 40, 100, 130, 130, 90, 70, 120, 130, 110, 60, 20, *[0] * 6)

CALLERS = (
    Caller(Credential("backend-prod", api_key_id="sandbox-key-1"), _ROUND_THE_CLOCK, 60),
    Caller(Credential("nightly-batch", api_key_id="sandbox-key-2"), _NIGHTLY, 100),
    Caller(Credential("User token", login_username="alice"), _OFFICE, 10),
    Caller(Credential("None"), _ROUND_THE_CLOCK, 40),
)

COMPUTE_SECONDS = "compute seconds"

# The average quantity of one call in each unit, and the number of steps that a unit is divided into:
# seconds of video into 24 frames, seconds of sound into samples.
CALL_OF_UNIT = {
    "images": ("1", 1),
    "videos": ("1", 1),
    "video segments": ("1", 1),
    "generations": ("1", 1),
    "seconds": ("5", 24),
    "5 seconds": ("1", 1),
    "30 frames": ("6", 30),
    "minutes": ("1.5", 60),
    "compute seconds": ("4.2", 1000),
    "megapixels": ("1.05", 100),
    "processed megapixels": ("1.05", 100),
    "units": ("1", 100),
    "1000 characters": ("0.62", 1000),
    "1000 tokens": ("108", 1000),
    "1m tokens": ("0.108", 10**6),
}
SAMPLES = 48_000  # per second of sound


class Stream(NamedTuple):
    """One endpoint in use. Empty fields are as in the price list.

    `calls` are the calls of a full working day, one figure per caller. `steps` is the number of steps in
    a unit. A stream has calls only in every `months`-th month.
    """

    endpoint_id: str
    calls: tuple[int, int, int, int]
    billed_unit: str = ""
    unit_price: str = ""
    call: str = ""
    steps: int = 0
    is_discounted: bool = False
    months: int = 1


STREAMS = (
    Stream("fal-ai/flux/schnell", (6000, 3000, 40, 25), is_discounted=True),
    Stream("fal-ai/flux/dev", (900, 0, 60, 8), is_discounted=True),
    Stream("fal-ai/flux-2", (500, 250, 0, 0)),
    Stream("fal-ai/flux-2-pro", (90, 0, 15, 0)),
    Stream("fal-ai/flux-pro/kontext", (260, 0, 25, 0)),
    Stream("fal-ai/nano-banana", (620, 0, 80, 5), billed_unit="image"),
    Stream("fal-ai/nano-banana-2", (240, 0, 40, 0)),
    Stream("fal-ai/nano-banana-pro/edit", (110, 0, 20, 0)),
    Stream("fal-ai/bytedance/seedream/v4/text-to-image", (180, 320, 0, 0), is_discounted=True),
    Stream("fal-ai/qwen-image-2/pro/edit", (45, 0, 0, 0)),
    # An agreed price: the bill uses it even when the list price changes.
    Stream("fal-ai/recraft-v3", (60, 0, 6, 0), unit_price="0.04"),
    Stream("fal-ai/ideogram/v3", (35, 0, 0, 0), months=2),
    Stream("openai/gpt-image-2", (55, 0, 10, 0), call="0.22"),
    Stream("fal-ai/birefnet/v2", (2400, 900, 0, 12)),
    # An endpoint on several machine types has several prices at once, per second of each type.
    Stream("fal-ai/birefnet/v2", (700, 200, 0, 0), unit_price="0.00111"),
    Stream("fal-ai/esrgan", (300, 600, 0, 0)),
    Stream("fal-ai/topaz/upscale/image", (70, 0, 0, 0), call="8.4"),
    Stream("fal-ai/bria/background/remove", (190, 0, 12, 0)),
    # One endpoint, two billing units; neither is always the one of the price list.
    Stream("xai/grok-imagine-image/quality/text-to-image", (150, 0, 0, 0)),
    Stream(
        "xai/grok-imagine-image/quality/text-to-image",
        (120, 0, 20, 0),
        billed_unit="units",
        unit_price="0.01",
        call="1",
    ),
    Stream("fal-ai/veo3.1", (2, 0, 2, 0), billed_unit="second"),
    Stream("fal-ai/veo3.1/fast/image-to-video", (14, 0, 3, 0), billed_unit="second"),
    Stream("fal-ai/kling-video/v2.5-turbo/pro/image-to-video", (55, 0, 6, 0), is_discounted=True),
    Stream("fal-ai/kling-video/v3/pro/image-to-video", (12, 0, 3, 0)),
    Stream("fal-ai/kling-video/v1.6/pro/image-to-video", (4, 0, 0, 0)),
    Stream("fal-ai/wan/v2.2-a14b/image-to-video", (30, 0, 0, 0)),
    Stream("fal-ai/bytedance/seedance/v1/pro/image-to-video", (35, 0, 0, 0)),
    Stream(
        "bytedance/seedance-2.0/enterprise/v2/image-to-video",
        (7, 0, 0, 0),
        billed_unit="1000 tokens",
        call="108",
    ),
    Stream("fal-ai/ltx-2.3-22b/distilled/image-to-video", (40, 0, 0, 0), call="112.5"),
    Stream("fal-ai/minimax/hailuo-02/standard/image-to-video", (25, 0, 0, 0)),
    Stream("fal-ai/luma-dream-machine/image-to-video", (3, 0, 1, 0)),
    Stream("fal-ai/pixverse/v5/image-to-video", (30, 0, 0, 0), months=3),
    Stream("moonvalley/marey/i2v", (2, 0, 1, 0), months=3),
    Stream("fal-ai/latentsync", (50, 0, 0, 0)),
    # Seen on real bills: a unit that ends in a space.
    Stream("fal-ai/elevenlabs/tts/turbo-v2.5", (420, 0, 0, 0), billed_unit="1000 characters "),
    Stream("fal-ai/kokoro", (0, 900, 0, 0)),
    Stream("fal-ai/minimax/speech-02-hd", (60, 0, 5, 0)),
    Stream("fal-ai/mmaudio-v2", (80, 0, 0, 0), call="10", steps=SAMPLES),
    Stream("veed/video-background-removal", (45, 0, 0, 0)),
    Stream("fal-ai/elevenlabs/music", (4, 0, 1, 0), months=2),
    # The team's own endpoint: billed, yet in no catalogue and without a list price.
    Stream(
        "acme/product-photo",
        (380, 0, 15, 0),
        billed_unit="compute seconds",
        unit_price="0.00125",  # 4.50 USD an hour
        call="9.5",
    ),
    Stream(
        "acme/product-photo",
        (90, 0, 0, 0),
        billed_unit="compute seconds",
        unit_price="0.001736111111111111",  # 6.25 USD an hour
        call="6.5",
    ),
)


class PriceChange(NamedTuple):
    """How the list price of an endpoint changes from the one in prices.csv; the same for any seed.

    From 2025, twice a year, in `month` (1 to 6) and six months later, on `day` (at most 28) at `hour`
    UTC, it changes to the next price in `to`; after the last one, back to prices.csv. The prices in `to`
    are per `unit`, if given. The bill follows `billed_days_later`.
    """

    month: int
    day: int
    hour: int
    to: tuple[str, ...]
    unit: str = ""
    billed_days_later: int = 0


# Two endpoints a month, one of them in the middle of its hours of use.
PRICE_CHANGES = {
    "fal-ai/topaz/upscale/image": PriceChange(1, 6, 0, ("0.012",)),
    "fal-ai/wan/v2.2-a14b/image-to-video": PriceChange(1, 22, 9, ("0.07", "0.075")),
    "fal-ai/nano-banana-2": PriceChange(2, 3, 16, ("0.07", "0.074", "0.077")),
    "fal-ai/esrgan": PriceChange(2, 18, 0, ("0.001736111111111111",)),  # 6.25 USD an hour
    "fal-ai/recraft-v3": PriceChange(3, 9, 0, ("0.05", "0.045")),
    "fal-ai/elevenlabs/tts/turbo-v2.5": PriceChange(3, 28, 17, ("0.04", "0.045")),
    "fal-ai/veo3.1/fast/image-to-video": PriceChange(4, 13, 18, ("0.12", "0.135")),
    # As fal really did: the unit changed too, and with it the cost of a call.
    "fal-ai/flux-2": PriceChange(4, 28, 0, ("0.00167",), unit="compute seconds"),
    "fal-ai/kling-video/v3/pro/image-to-video": PriceChange(
        5, 4, 0, ("0.168", "0.154"), billed_days_later=9
    ),
    "fal-ai/flux/dev": PriceChange(5, 12, 15, ("0.022",)),
    "fal-ai/nano-banana-pro": PriceChange(6, 10, 0, ("0.134",)),  # not in use
    "fal-ai/kokoro": PriceChange(6, 19, 3, ("0.018", "0.021")),
}

# Users of fal have reported single videos billed as hundreds. Here, once in each RUNAWAY_STRETCH, one
# call of the first caller to one of these endpoints is charged as RUNAWAY_CALLS: about 400 to 2,000 USD.
# Two such charges are at least two weeks apart, so that the credit of a week covers them.
RUNAWAY_ENDPOINTS = {
    "fal-ai/veo3.1",
    "fal-ai/kling-video/v3/pro/image-to-video",
    "bytedance/seedance-2.0/enterprise/v2/image-to-video",
}
RUNAWAY_CALLS = range(730, 830)
RUNAWAY_STRETCH = timedelta(days=30)
RUNAWAY_HOURS = range(8 * 24, 24 * 24)  # of a stretch

PERCENT_DISCOUNT = Decimal(10)  # of discounted streams, for calls made with a key
NO_DISCOUNT = Decimal(0)
NANO = Decimal("1e-9")

UNPRICED = {
    "fal-ai/any-llm": "llm",
    "fal-ai/flux-lora-fast-training": "training",
    "fal-ai/workflow-utilities/trim-video": "video-to-video",
    "acme/private-endpoint": "image-to-image",
}
WITHOUT_METADATA = {
    "acme/private-endpoint",
    "alibaba/wan-3.0-prime/reference-to-video",
    "minimax/music-3",
}
DEPRECATED = {
    "fal-ai/animatediff-sparsectrl-lcm",
    "fal-ai/fast-svd-lcm",
    "fal-ai/kling-video/v1.5/pro/image-to-video",
    "fal-ai/kling-video/v1.6/pro/image-to-video",  # and still in use
    "fal-ai/stable-diffusion-v3-medium",
    "fal-ai/stable-video",
}

# Endpoints whose requests always fail, and how: the first is in the catalogue, the second is not.
FAILING = {
    "fal-ai/fast-svd-lcm": "startup_error_count",
    "acme/retired-endpoint": "user_error_count",
}
# Per thousand successful requests. A boot is one of these requests; errors come on top.
PERMILLE_OF_CALLS = {
    "user_error_count": 40,
    "startup_error_count": 3,
    "connection_error_count": 2,
    "timeout_error_count": 5,
    "runtime_error_count": 10,
    "cold_boot_count": 60,
}

FOUNDED = datetime(2025, 1, 1, tzinfo=UTC)  # no usage before
CREDIT_LEVEL = 5000.0  # USD, the balance after the top-up each Monday, 00:00 UTC


class Change(NamedTuple):
    """How many times a line and its charges appear before the instant `at`, and from then on."""

    at: datetime
    times_before: int
    times_after: int


# Permille of lines; times shown before and after; hours after which the change may happen.
CHANGES = (
    (10, 0, 1, range(2, 73)),  # comes late
    (5, 1, 2, range(48, 49)),  # is restated
    (1, 1, 0, range(24, 73)),  # is withdrawn
)

Shown = TypeVar("Shown", UsageLine, BillingEvent)


@dataclass
class InventedWorld:
    """A team and its bill. Lines and charges appear once their hour has ended by `now`.

    With `is_late`, a few appear later, and a few change after days: lines with their charges.
    """

    account: str
    seed: int
    now: Callable[[], datetime] = field(repr=False)
    is_late: bool = False

    def models(self) -> list[dict[str, Any]]:
        """The priced endpoints and a few more."""
        priced = {endpoint_id: row["category"] for endpoint_id, row in _price_list().items()}
        categories = priced | UNPRICED
        return [_model(endpoint_id, categories[endpoint_id]) for endpoint_id in sorted(categories)]

    def prices(self) -> dict[str, dict[str, Any]]:
        """The price list of now."""
        now = self.now().astimezone(UTC)
        prices = {}
        for endpoint_id, row in _price_list().items():
            listed = list_price(endpoint_id, now)
            prices[endpoint_id] = {
                "endpoint_id": endpoint_id,
                "unit_price": listed.unit_price,
                "unit": listed.unit,
                "currency": row["currency"],
            }
        return prices

    def usage(self, start: datetime, end: datetime) -> Iterator[UsageLine]:
        """The lines of the ended hours that begin in `[start, end)`, in time order."""
        now = self.now()
        for hour in _hours(start, end, now):
            yield from self._shown(hour, now, zip(lines_of_hour(self.seed, hour)))

    def billing_events(self, start: datetime, end: datetime) -> Iterator[BillingEvent]:
        """The charges of ended hours in `[start, end)`: they equal usage, except for rounding."""
        now = self.now()
        first = max(start, FOUNDED).astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        for hour in _hours(first, end, now):
            for event in self._shown(hour, now, events_of_hour(self.seed, hour)):
                if start <= event.timestamp < end:
                    yield _as_served(event)

    def calls(self, start: datetime, end: datetime) -> Iterator[Calls]:
        """The calls of the ended hours that begin in `[start, end)`; never late."""
        for hour in _hours(start, end, self.now()):
            yield from calls_of_hour(self.seed, hour)

    def endpoints_called(self) -> set[str]:
        """Every endpoint that was ever called."""
        return {stream.endpoint_id for stream in STREAMS} | FAILING.keys()

    def credits(self) -> dict[str, Any]:
        """The level of Monday minus the charges since; it falls every hour."""
        now = self.now().astimezone(UTC)
        monday = now.replace(hour=0, minute=0, second=0, microsecond=0) - now.weekday() * 24 * HOUR
        spent = math.fsum(line.cost_total for line in self.usage(monday, now))
        return {"current_balance": as_double(max(CREDIT_LEVEL - spent, 0.0)), "currency": "USD"}

    def _shown(
        self, hour: datetime, now: datetime, of_lines: Iterable[Iterable[Shown]]
    ) -> Iterator[Shown]:
        """Yield the records of each line of the hour that are visible now."""
        changes = changes_of_hour(self.seed, hour) if self.is_late else {}
        for number, records in enumerate(of_lines):
            change = changes.get(number, Change(hour, 1, 1))
            times = change.times_before if now < change.at else change.times_after
            if times == 1:
                yield from records
            elif times:
                yield from (_times(record, times) for record in records)


def invented_world(
    seed: int = 7,
    account: str = ACCOUNT,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    *,
    late: bool = False,
) -> World:
    """A world with data for any past hour since `FOUNDED`, some of it late and restated if `late`.

    `now` gives aware instants; tests set the clock.
    """
    return InventedWorld(account, seed, now, late)


def _hours(start: datetime, end: datetime, now: datetime) -> Iterator[datetime]:
    """Yield the ended hours (UTC) that begin in `[start, end)`."""
    start = max(start, FOUNDED).astimezone(UTC)
    end = min(end, now - HOUR + timedelta.resolution)
    hour = start.replace(minute=0, second=0, microsecond=0)
    if hour < start:
        hour += HOUR
    while hour < end:
        yield hour
        hour += HOUR


@lru_cache(maxsize=100 * 24)  # a hundred days: each page of a walk reads its range again
def lines_of_hour(seed: int, hour: datetime) -> tuple[UsageLine, ...]:
    """Return the lines of the hour that begins at `hour` (UTC), independent of the clock."""
    return (*_usual_lines(seed, hour), *runaways_of_hour(seed, hour))


def _usual_lines(seed: int, hour: datetime) -> Iterator[UsageLine]:
    month = _month(hour)
    growth = min(max(60 + month * 5 // 3, 60), 120)  # percent; from 2025 to 2027
    mood = Random(f"{seed} {hour.date().isoformat()}").randrange(85, 116)  # noqa: S311 percent
    chance = Random(f"{seed} {hour.isoformat()}")  # noqa: S311 invented data, not secrets
    for stream in STREAMS:
        if month % stream.months:
            continue
        metered = _metered_at(stream, hour)
        for caller, calls_a_day in zip(CALLERS, stream.calls, strict=True):
            week = caller.weekend if hour.weekday() >= 5 else 100
            share = caller.permille[hour.hour] * week * growth * mood
            # Permille × four percentages; the remaining fraction of a call happens by chance.
            luck = chance.randrange(60, 141)
            calls = (calls_a_day * share * luck + chance.randrange(10**11)) // 10**11
            if calls:
                yield _line(hour, metered, caller.credential, calls, chance)


@lru_cache(maxsize=100 * 24)
def runaways_of_hour(seed: int, hour: datetime) -> tuple[UsageLine, ...]:
    """Return the runaway charge of the hour as a line; usually there is none."""
    stretch, passed = divmod(hour - FOUNDED, RUNAWAY_STRETCH)
    chance = Random(f"{seed} {stretch} runaway")  # noqa: S311
    if passed != chance.choice(RUNAWAY_HOURS) * HOUR:
        return ()
    stream = chance.choice([stream for stream in STREAMS if stream.endpoint_id in RUNAWAY_ENDPOINTS])
    calls = chance.choice(RUNAWAY_CALLS)
    return (_line(hour, _metered_at(stream, hour), CALLERS[0].credential, calls, chance),)


def list_price(endpoint_id: str, at: datetime) -> Price:
    """Return the list price of a listed endpoint at an instant (UTC)."""
    turns = _prices_in_turn(endpoint_id)
    if endpoint_id not in PRICE_CHANGES:
        return turns[0]
    change = PRICE_CHANGES[endpoint_id]
    # Moved back by this much, the instants after a change are in its month or later ones.
    moved = at - timedelta(days=change.day - 1, hours=change.hour)
    changes_so_far = (_month(moved) + 1 - change.month) // 6 + 1
    return turns[changes_so_far % len(turns)]


def _month(instant: datetime) -> int:
    """Return the number of months from January 2025 to the month of the instant."""
    return (instant.year - 2025) * 12 + instant.month - 1


@lru_cache(maxsize=100 * 24)
def changes_of_hour(seed: int, hour: datetime) -> Mapping[int, Change]:
    """Return later changes to lines of the hour, by position. Runaway charges do not change."""
    chance = Random(f"{seed} {hour.isoformat()} changes")  # noqa: S311
    changes = {}
    for number in range(len(lines_of_hour(seed, hour)) - len(runaways_of_hour(seed, hour))):
        drawn = chance.randrange(1000)
        for permille, before, after, hours in CHANGES:
            if 0 <= drawn < permille:
                changes[number] = Change(hour + chance.choice(hours) * HOUR, before, after)
            drawn -= permille
    return changes


@lru_cache(maxsize=32 * 24)
def events_of_hour(seed: int, hour: datetime) -> tuple[tuple[BillingEvent, ...], ...]:
    """Return the charges of each line of the hour; they add up to it, except for rounding to nanos."""
    chance = Random(f"{seed} {hour.isoformat()} events")  # noqa: S311
    runaways = runaways_of_hour(seed, hour)
    return tuple(
        (_event(line, float(line.quantity), *_request(line, chance)),)
        if line in runaways
        else tuple(_events(line, _steps_of(line.endpoint_id, line.unit), chance))
        for line in lines_of_hour(seed, hour)
    )


@lru_cache(maxsize=32 * 24)
def calls_of_hour(seed: int, hour: datetime) -> tuple[Calls, ...]:
    """Return the calls of the hour: charged ones and failed ones."""
    chance = Random(f"{seed} {hour.isoformat()} calls")  # noqa: S311
    requests: dict[str, dict[str, Decimal]] = {}  # request ids, with the charged seconds
    for line, events in zip(lines_of_hour(seed, hour), events_of_hour(seed, hour), strict=True):
        charged = requests.setdefault(line.endpoint_id, {})
        for event in events:
            seconds = event.quantity if line.unit == COMPUTE_SECONDS else None
            charged[event.request_id] = charged.get(event.request_id, Decimal(0)) + (seconds or 0)
    calls = [
        _calls(hour, endpoint_id, tuple(charged.values()), chance)
        for endpoint_id, charged in requests.items()
    ]
    for endpoint_id, name in FAILING.items():
        failed: dict[str, Any] = {name: chance.randrange(3)}
        if failed[name]:
            calls.append(Calls(hour, endpoint_id, **failed))
    return tuple(calls)


class Price(NamedTuple):
    """The price of one unit, in US dollars."""

    unit: str
    unit_price: Decimal


class _Metered(NamedTuple):
    """The billing of a stream's calls at one time."""

    endpoint_id: str
    unit: str
    unit_price: Decimal
    steps: int  # per unit
    steps_a_call: int
    is_discounted: bool


def _line(
    hour: datetime, metered: _Metered, credential: Credential, calls: int, chance: Random
) -> UsageLine:
    steps = calls * metered.steps_a_call
    if metered.steps_a_call > 1:
        steps = max(steps * chance.randrange(80, 121) // 100, 1)
    percent = PERCENT_DISCOUNT if metered.is_discounted and credential.api_key_id else NO_DISCOUNT
    # Without a discount, usage has null or zero.
    omits_discount = not percent and credential.api_key_id
    return UsageLine(
        hour=hour,
        endpoint_id=metered.endpoint_id,
        unit=metered.unit,
        quantity=as_double(steps / metered.steps),
        unit_price=metered.unit_price,
        percent_discount=None if omits_discount else percent,
        **_costs(steps / metered.steps, metered.unit_price, percent),
        currency="USD",
        credential=credential,
    )


def as_double(number: float) -> Decimal:
    """Return the number as JSON encoders write doubles: the shortest text that is unique."""
    return Decimal(repr(number).removesuffix(".0"))


def _costs(quantity: float, unit_price: Decimal, percent_discount: Decimal) -> dict[str, Any]:
    """Return the amounts of usage for a quantity: computed in doubles and not rounded."""
    subtotal = quantity * float(unit_price)
    total = subtotal * (1 - float(percent_discount) / 100)
    return {
        "cost_subtotal": as_double(subtotal),
        "cost_discount": as_double(subtotal - total),
        "cost_total": as_double(total),
    }


def _charged(quantity: float, unit_price: Decimal, percent_discount: Decimal) -> dict[str, Any]:
    """Return the amounts of a charge for a quantity: rounded to a nano-dollar."""
    costs = _costs(quantity, unit_price, percent_discount)
    subtotal, total = (costs[name].quantize(NANO) for name in ("cost_subtotal", "cost_total"))
    return {"cost_subtotal": subtotal, "cost_discount": subtotal - total, "cost_total": total}


def _events(line: UsageLine, steps_a_unit: int, chance: Random) -> Iterator[BillingEvent]:
    """Yield one to four charges, at most one per step of the line; a few share a request."""
    steps = round(float(line.quantity) * steps_a_unit)
    cuts = chance.sample(range(1, steps), min(chance.randrange(4), steps - 1))
    request_id = ""
    for first, last in pairwise((0, *sorted(cuts), steps)):
        if not request_id or chance.randrange(50):
            request_id, timestamp = _request(line, chance)
        yield _event(line, (last - first) / steps_a_unit, request_id, timestamp)


def _as_served(event: BillingEvent) -> BillingEvent:
    """Return the charge as it is served: a few lack the unit or the quantity."""
    drawn = int(event.request_id[:8], 16)
    if not drawn % 50:
        event = replace(event, unit=None)
    if drawn % 100 in (0, 1):
        event = replace(event, quantity=None)
    return event


def _request(line: UsageLine, chance: Random) -> tuple[str, datetime]:
    """Return the id and instant of a random request within the hour of the line."""
    request_id = str(UUID(int=chance.getrandbits(128), version=4))
    return request_id, line.hour + timedelta(microseconds=chance.randrange(3600 * 10**6))


def _event(line: UsageLine, quantity: float, request_id: str, timestamp: datetime) -> BillingEvent:
    """Return the charge for a part of the line."""
    percent = line.percent_discount or NO_DISCOUNT
    return BillingEvent(
        timestamp=timestamp,
        request_id=request_id,
        endpoint_id=line.endpoint_id,
        unit=line.unit,
        quantity=as_double(quantity),
        unit_price=line.unit_price,
        percent_discount=percent,
        **_charged(quantity, line.unit_price, percent),
        credential=line.credential,
    )


def _times(record: Shown, times: int) -> Shown:
    """Return the record with a multiple of its quantity."""
    quantity = float(record.quantity or 0) * times
    costs = _charged if isinstance(record, BillingEvent) else _costs
    percent = record.percent_discount or NO_DISCOUNT
    return replace(
        record,
        quantity=as_double(quantity),
        **costs(quantity, record.unit_price or NO_DISCOUNT, percent),
    )


def _calls(hour: datetime, endpoint_id: str, charged: tuple[Decimal, ...], chance: Random) -> Calls:
    """Return the successful calls of the hour, one for each of `charged`, and the failed ones.

    A request that is charged by the second ran for that time.
    """
    successes = len(charged)
    # The remaining fraction of a request happens by chance, as in lines.
    counts: dict[str, Any] = {
        name: (successes * permille + chance.randrange(1000)) // 1000
        for name, permille in PERMILLE_OF_CALLS.items()
    }
    typical = _typical_milliseconds(endpoint_id)

    def durations(number: int, shortest: int, longest: int) -> tuple[Decimal, ...]:
        """Draw this many durations in seconds; the bounds are in milliseconds."""
        return tuple(Decimal(chance.randrange(shortest, longest)).scaleb(-3) for _ in range(number))

    random_durations = durations(successes, typical * 2 // 3, typical * 2)
    ran = tuple(seconds or any_time for seconds, any_time in zip(charged, random_durations, strict=True))
    return Calls(
        hour,
        endpoint_id,
        success_count=successes,
        total_billable_duration=sum(ran, Decimal(0)),
        durations=ran,
        prepare_durations=durations(successes, 20, 900),
        cold_boot_durations=durations(counts["cold_boot_count"], 1000, 40_000),
        **counts,
    )


@cache
def _typical_milliseconds(endpoint_id: str) -> int:
    return 600 + _below(20_000, endpoint_id, "duration")


def _metered_at(stream: Stream, hour: datetime) -> _Metered:
    if stream.endpoint_id not in _price_list():
        return _metered(stream, Price(stream.billed_unit, Decimal(stream.unit_price)))
    change = PRICE_CHANGES.get(stream.endpoint_id)
    behind = timedelta(days=change.billed_days_later) if change else timedelta()
    return _metered(stream, list_price(stream.endpoint_id, hour - behind))


@cache
def _metered(stream: Stream, listed: Price) -> _Metered:
    unit = stream.billed_unit or listed.unit
    call, _ = _call_of(stream.endpoint_id, unit)
    steps = _steps_of(stream.endpoint_id, unit)
    return _Metered(
        endpoint_id=stream.endpoint_id,
        unit=unit,
        unit_price=Decimal(stream.unit_price) if stream.unit_price else listed.unit_price,
        steps=steps,
        steps_a_call=int(Decimal(stream.call or call) * steps),
        is_discounted=stream.is_discounted,
    )


def _call_of(endpoint_id: str, unit: str) -> tuple[str, int]:
    """Return the entry of `CALL_OF_UNIT`; a unit without one, as "second", uses the listed one."""
    return CALL_OF_UNIT.get(unit) or CALL_OF_UNIT[_price_list()[endpoint_id]["unit"]]


@cache
def _steps_of(endpoint_id: str, unit: str) -> int:
    """Return the number of steps in the unit, for this endpoint."""
    own = (stream.steps for stream in STREAMS if stream.endpoint_id == endpoint_id and stream.steps)
    return next(own, 0) or _call_of(endpoint_id, unit)[1]


@cache
def _prices_in_turn(endpoint_id: str) -> tuple[Price, ...]:
    row = _price_list()[endpoint_id]
    first = Price(row["unit"], Decimal(row["unit_price"]))
    change = PRICE_CHANGES.get(endpoint_id)
    if not change:
        return (first,)
    return (first, *(Price(change.unit or first.unit, Decimal(price)) for price in change.to))


@cache
def _price_list() -> dict[str, dict[str, str]]:
    """Return the rows of the price list, by endpoint."""
    with Path(__file__).with_name("prices.csv").open(encoding="utf-8", newline="") as file:
        return {row["endpoint_id"]: row for row in csv.DictReader(file)}


def _model(endpoint_id: str, category: str) -> dict[str, Any]:
    if endpoint_id in WITHOUT_METADATA:
        return {"endpoint_id": endpoint_id}
    _, family, *_ = path = endpoint_id.split("/")
    name = " ".join(path[1:]).replace("-", " ").title()
    created = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=_below(800, endpoint_id, "made"))
    updated = created + timedelta(days=_below(200, endpoint_id, "changed"))
    return {
        "endpoint_id": endpoint_id,
        "metadata": {
            "display_name": name,
            "category": category,
            "description": f"{name}, invented for the sandbox.",
            "status": "deprecated" if endpoint_id in DEPRECATED else "active",
            "tags": ["new"] if created.year > 2025 else [],
            "updated_at": _z(updated),
            "is_favorited": None,
            "thumbnail_url": f"https://example.com/{endpoint_id}.png",
            "model_url": f"https://fal.run/{endpoint_id}",
            "license_type": "commercial" if _below(4, endpoint_id, "license") else "research",
            "date": _z(created),
            "group": {"key": family, "label": family.replace("-", " ").title()},
            "highlighted": False,
            "pinned": False,
            "kind": "training" if category == "training" else "inference",
        },
    }


def _below(limit: int, *words: str) -> int:
    """Return a number in `[0, limit)` that depends on the words alone."""
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8]) % limit


def _z(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")

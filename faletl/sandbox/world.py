"""What a sandbox answers from: the World protocol, and one invented world.

The invented one is a mid-size team that spends 100 to 600 USD a day. Everything in it follows from
the seed and the hour asked for: ask a day at once or hour by hour, today or next year, and the same
lines come back. Chance works on whole numbers only, so that no platform rounds it differently.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Credential:
    """Who called, as fal tells it: a label, and at most one of a key and a login."""

    detail: str
    api_key_id: str | None = None
    login_username: str | None = None


@dataclass(frozen=True)
class UsageLine:
    """What one credential used of one endpoint and unit in one hour. `hour` is UTC, on the hour."""

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


class World(Protocol):
    """What a server answers from. It is asked anew for each request, so it may change."""

    account: str

    def models(self) -> list[dict[str, Any]]:
        """The catalogue as /models returns it: `endpoint_id`, and `metadata` where fal has some."""

    def prices(self) -> dict[str, dict[str, Any]]:
        """List prices by endpoint id, as /models/pricing returns them, `unit_price` a Decimal.

        An endpoint is known when it is here or among the models; a known one may lack a price.
        """

    def usage(self, start: datetime, end: datetime) -> Iterable[UsageLine]:
        """The lines of hours that begin in `[start, end)`, UTC. The server leaves none out."""

    def credits(self) -> dict[str, Any]:
        """`current_balance`, a Decimal, and its `currency`."""


class Caller(NamedTuple):
    """One credential's habits: calls per UTC hour in permille of a day, weekends in percent."""

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

# What one call takes of a unit: on average, and the smallest step of it. Steps are as fine as nine
# decimals of cost allow after a price of up to six decimals and a discount in whole tenths.
CALL_OF_UNIT = {
    "images": ("1", "1"),
    "videos": ("1", "1"),
    "video segments": ("1", "1"),
    "generations": ("1", "1"),
    "seconds": ("5", "5"),
    "5 seconds": ("1", "1"),
    "minutes": ("1.5", "0.01"),
    "compute seconds": ("4.2", "0.01"),
    "megapixels": ("1.05", "0.01"),
    "processed megapixels": ("1.05", "0.01"),
    "units": ("1", "0.01"),
    "1000 characters": ("0.62", "0.001"),
    "1000 tokens": ("108", "0.001"),
    "1m tokens": ("0.108", "0.000001"),
}


class Stream(NamedTuple):
    """One endpoint in use. What is not said here is as in the price list.

    `calls` are those of a working day at full size, one figure per caller. A stream flows in every
    `months`-th month only.
    """

    endpoint_id: str
    calls: tuple[int, int, int, int]
    billed_unit: str = ""
    unit_price: str = ""
    call: str = ""
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
    Stream("fal-ai/recraft-v3", (60, 0, 6, 0)),
    Stream("fal-ai/ideogram/v3", (35, 0, 0, 0), months=2),
    Stream("openai/gpt-image-2", (55, 0, 10, 0), call="0.22"),
    Stream("fal-ai/birefnet/v2", (2400, 900, 0, 12)),
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
    # Seen on real bills: a unit with a blank behind it.
    Stream("fal-ai/elevenlabs/tts/turbo-v2.5", (420, 0, 0, 0), billed_unit="1000 characters "),
    Stream("fal-ai/kokoro", (0, 900, 0, 0)),
    Stream("fal-ai/minimax/speech-02-hd", (60, 0, 5, 0)),
    Stream("fal-ai/mmaudio-v2", (80, 0, 0, 0)),
    Stream("fal-ai/elevenlabs/music", (4, 0, 1, 0), months=2),
    # The team's own endpoint: billed, yet in no catalogue and without a list price.
    Stream(
        "acme/product-photo",
        (380, 0, 15, 0),
        billed_unit="compute seconds",
        unit_price="0.00125",
        call="9.5",
    ),
)

PERCENT_DISCOUNT = Decimal(10)  # of discounted streams, for calls made with a key
NO_DISCOUNT = Decimal(0)

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

CREDIT_LEVEL = Decimal(5000)  # what the balance is brought up to each Monday, 00:00 UTC


@dataclass
class InventedWorld:
    """A team and its bill. Lines appear once their hour has ended by `now`."""

    account: str
    seed: int
    now: Callable[[], datetime] = field(repr=False)

    def models(self) -> list[dict[str, Any]]:
        """The priced endpoints and a few more."""
        categories = {row["endpoint_id"]: row["category"] for row in _price_list()} | UNPRICED
        return [_model(endpoint_id, categories[endpoint_id]) for endpoint_id in sorted(categories)]

    def prices(self) -> dict[str, dict[str, Any]]:
        """The price list, the same at any time."""
        return {
            row["endpoint_id"]: {
                "endpoint_id": row["endpoint_id"],
                "unit_price": Decimal(row["unit_price"]),
                "unit": row["unit"],
                "currency": row["currency"],
            }
            for row in _price_list()
        }

    def usage(self, start: datetime, end: datetime) -> Iterator[UsageLine]:
        """The lines of the hours that begin in `[start, end)` and are over; in time order."""
        hour = start.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        if hour < start:
            hour += HOUR
        end = min(end, self.now() - HOUR + timedelta.resolution)
        while hour < end:
            yield from lines_of_hour(self.seed, hour)
            hour += HOUR

    def credits(self) -> dict[str, Any]:
        """The level of Monday less what was charged since; it falls by the hour."""
        now = self.now().astimezone(UTC)
        monday = now.replace(hour=0, minute=0, second=0, microsecond=0) - now.weekday() * 24 * HOUR
        spent = sum((line.cost_total for line in self.usage(monday, now)), Decimal(0))
        return {"current_balance": max(CREDIT_LEVEL - spent, Decimal(0)), "currency": "USD"}


def invented_world(
    seed: int = 7,
    account: str = "sandbox",
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> World:
    """A world with data for any past hour. `now` gives aware instants; tests set the clock."""
    return InventedWorld(account, seed, now)


@lru_cache(maxsize=100 * 24)  # a hundred days: each page of a walk asks for its range again
def lines_of_hour(seed: int, hour: datetime) -> tuple[UsageLine, ...]:
    """The lines of the hour that begins at `hour` (UTC), whatever the clock says."""
    month = hour.year * 12 + hour.month - 1
    growth = min(max(60 + (month - 2025 * 12) * 5 // 3, 60), 120)  # percent; from 2025 to 2027
    mood = Random(f"{seed} {hour.date().isoformat()}").randrange(85, 116)  # noqa: S311 percent
    chance = Random(f"{seed} {hour.isoformat()}")  # noqa: S311 invented data, not secrets
    lines = []
    for stream in _streams():
        if month % stream.months:
            continue
        for caller, calls_a_day in zip(CALLERS, stream.calls, strict=True):
            week = caller.weekend if hour.weekday() >= 5 else 100
            share = caller.permille[hour.hour] * week * growth * mood
            # Permille × four percentages; the fraction of a call that is left happens by chance.
            luck = chance.randrange(60, 141)
            calls = (calls_a_day * share * luck + chance.randrange(10**11)) // 10**11
            if calls:
                lines.append(_line(hour, stream, caller.credential, calls, chance))
    return tuple(lines)


class _Metered(NamedTuple):
    """A stream with its unit, price and steps looked up."""

    endpoint_id: str
    calls: tuple[int, int, int, int]
    months: int
    unit: str
    unit_price: Decimal
    step: Decimal
    steps_a_call: int
    is_discounted: bool


def _line(
    hour: datetime, stream: _Metered, credential: Credential, calls: int, chance: Random
) -> UsageLine:
    steps = calls * stream.steps_a_call
    if stream.steps_a_call > 1:
        steps = max(steps * chance.randrange(80, 121) // 100, 1)
    quantity = steps * stream.step
    cost_subtotal = quantity * stream.unit_price
    percent = PERCENT_DISCOUNT if stream.is_discounted and credential.api_key_id else None
    cost_discount = NO_DISCOUNT if percent is None else cost_subtotal * percent / 100
    return UsageLine(
        hour=hour,
        endpoint_id=stream.endpoint_id,
        unit=stream.unit,
        quantity=quantity,
        unit_price=stream.unit_price,
        percent_discount=percent,
        cost_subtotal=cost_subtotal,
        cost_discount=cost_discount,
        cost_total=cost_subtotal - cost_discount,
        currency="USD",
        credential=credential,
    )


@cache
def _streams() -> tuple[_Metered, ...]:
    listed = {row["endpoint_id"]: row for row in _price_list()}
    metered = []
    for stream in STREAMS:
        row = listed.get(stream.endpoint_id, {})
        unit = stream.billed_unit or row["unit"]
        call, step = CALL_OF_UNIT.get(unit) or CALL_OF_UNIT[row["unit"]]  # "second" like "seconds"
        metered.append(
            _Metered(
                endpoint_id=stream.endpoint_id,
                calls=stream.calls,
                months=stream.months,
                unit=unit,
                unit_price=Decimal(stream.unit_price or row["unit_price"]),
                step=Decimal(step),
                steps_a_call=int(Decimal(stream.call or call) / Decimal(step)),
                is_discounted=stream.is_discounted,
            )
        )
    return tuple(metered)


@cache
def _price_list() -> tuple[dict[str, str], ...]:
    with Path(__file__).with_name("prices.csv").open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def _model(endpoint_id: str, category: str) -> dict[str, Any]:
    if endpoint_id in WITHOUT_METADATA:
        return {"endpoint_id": endpoint_id}
    _, family, *_ = path = endpoint_id.split("/")
    name = " ".join(path[1:]).replace("-", " ").title()
    made = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=_below(800, endpoint_id, "made"))
    changed = made + timedelta(days=_below(200, endpoint_id, "changed"))
    return {
        "endpoint_id": endpoint_id,
        "metadata": {
            "display_name": name,
            "category": category,
            "description": f"{name}, invented for the sandbox.",
            "status": "deprecated" if endpoint_id in DEPRECATED else "active",
            "tags": ["new"] if made.year > 2025 else [],
            "updated_at": _z(changed),
            "is_favorited": None,
            "thumbnail_url": f"https://example.com/{endpoint_id}.png",
            "model_url": f"https://fal.run/{endpoint_id}",
            "license_type": "commercial" if _below(4, endpoint_id, "license") else "research",
            "date": _z(made),
            "group": {"key": family, "label": family.replace("-", " ").title()},
            "highlighted": False,
            "pinned": False,
            "kind": "training" if category == "training" else "inference",
        },
    }


def _below(limit: int, *words: str) -> int:
    """A number in `[0, limit)` that the words alone decide."""
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8]) % limit


def _z(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")

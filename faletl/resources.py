"""The catalogue: one entry per collection of the fal API that we extract. Imports nothing heavy.

An entry says what fal sends (docs/fal-api.md) and what a row is. The check of fal's answers, the raw
table with its comments, staging, proof, load, the command line's choices and the shared tests all
follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class Kind(StrEnum):
    """What a column holds: decides its JSON type, its checks and its database type."""

    TEXT = "text"
    AMOUNT = "amount"  # a JSON number >= 0, kept exactly: money and quantities (faletl/money.py)
    INSTANT = "instant"  # ISO 8601 text with an offset, kept in UTC
    LIST = "list"  # a JSON array of texts, kept as JSON text


@dataclass(frozen=True, slots=True)
class Column:
    """One field of a record.

    `path` leads to it inside the record (default: its own name). A column that is not `required`
    may be absent or null. `fallback` names an older field that carries the same value. `is_outer`
    says that the field stands beside the record list (a bucket), not in each record.
    """

    name: str
    kind: Kind
    comment: str
    path: tuple[str, ...] = ()
    required: bool = False
    fallback: str | None = None
    is_outer: bool = False
    at_most: int | None = None
    may_be_empty: bool = True

    @property
    def steps(self) -> tuple[str, ...]:
        """The JSON path inside the record."""
        return self.path or (self.name,)


@dataclass(frozen=True, slots=True)
class Proof:
    """A control total: fal's own sum over the same window, asked with other parameters."""

    params: Mapping[str, str | tuple[str, ...]]
    rows_path: tuple[str, ...]
    key: tuple[str, ...]
    sums: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resource:
    """A collection of the fal API: where it is, what its records hold, what a row is."""

    name: str
    comment: str
    path: str
    rows_path: tuple[str, ...]  # to the record list; scalars of a list on the way go onto its records
    columns: tuple[Column, ...]
    key: tuple[str, ...]  # what tells rows of one window apart
    window: Literal["day", "snapshot"]
    every_run: bool = False  # a snapshot of each run; else of each UTC day
    params: Mapping[str, str | tuple[str, ...]] | None = None
    time: str | None = None  # the column that places a row inside its window
    ids_per_call: int | None = None  # asked by endpoint ids, so many a call
    repeats: bool = True  # whether rows with the same key are separate rows, or one seen twice
    proof: Proof | None = None
    doubts: Mapping[str, str] = field(default_factory=dict)  # what is warned about: SQL that finds it
    uses_metrics_key: bool = False
    permission: str = ""
    presets: str = ""

    @property
    def table(self) -> str:
        """The raw table, with its schema."""
        return f"raw.{self.name}"

    def column(self, name: str) -> Column:
        """The column of that name."""
        return next(column for column in self.columns if column.name == name)


_ENDPOINT = Column(
    "endpoint_id", Kind.TEXT, "fal's id of the model endpoint", required=True, may_be_empty=False
)
_CURRENCY = Column("currency", Kind.TEXT, "ISO 4217 code of every amount in the row")

MODELS = Resource(
    name="models",
    comment="The catalogue of model endpoints, as of each snapshot.",
    path="/models",
    rows_path=("models",),
    window="snapshot",
    key=("endpoint_id",),
    repeats=False,
    columns=(
        _ENDPOINT,
        Column("display_name", Kind.TEXT, "name for people", ("metadata", "display_name")),
        Column("category", Kind.TEXT, "what goes in and comes out", ("metadata", "category")),
        Column("description", Kind.TEXT, "one paragraph", ("metadata", "description")),
        Column("status", Kind.TEXT, "active or deprecated", ("metadata", "status")),
        Column("tags", Kind.LIST, "badges, as a JSON array", ("metadata", "tags")),
        Column("updated_at", Kind.TEXT, "last change, as fal writes it", ("metadata", "updated_at")),
        Column("date", Kind.TEXT, "creation, as fal writes it", ("metadata", "date")),
        Column("model_url", Kind.TEXT, "where it is called", ("metadata", "model_url")),
        Column("license_type", Kind.TEXT, "commercial, research, private", ("metadata", "license_type")),
        Column("group_key", Kind.TEXT, "id of the model family", ("metadata", "group", "key")),
        Column("group_label", Kind.TEXT, "name of the model family", ("metadata", "group", "label")),
        Column("kind", Kind.TEXT, "inference or training", ("metadata", "kind")),
    ),
    uses_metrics_key=True,
    permission="no permission",
    presets="any",
)

PRICES = Resource(
    name="prices",
    comment="List price per unit of each endpoint for the calling account, as of each snapshot.",
    path="/models/pricing",
    rows_path=("prices",),
    window="snapshot",
    key=("endpoint_id",),
    ids_per_call=50,
    repeats=False,
    columns=(
        _ENDPOINT,
        Column("unit", Kind.TEXT, "billing unit, exactly as fal writes it", required=True),
        Column("unit_price", Kind.AMOUNT, "list price of one unit", required=True),
        _CURRENCY,
    ),
    permission="no permission",
    presets="any",
)

USAGE = Resource(
    name="usage",
    comment="What was used and charged, per hour, endpoint, unit, price, discount and credential.",
    path="/models/usage",
    rows_path=("time_series", "results"),
    params={
        "timeframe": "hour",
        "timezone": "UTC",
        "bound_to_timeframe": "false",
        "expand": ("time_series", "auth_method_structured", "auth_method"),
    },
    window="day",
    time="bucket",
    key=(
        "bucket",
        "endpoint_id",
        "unit",
        "unit_price",
        "percent_discount",
        "currency",
        "api_key_id",
        "login_username",
        "auth_detail",
        "auth_method",
    ),
    columns=(
        Column("bucket", Kind.INSTANT, "start of the hour", required=True, is_outer=True),
        _ENDPOINT,
        Column("unit", Kind.TEXT, "billing unit, exactly as fal writes it", required=True),
        Column("quantity", Kind.AMOUNT, "units used", required=True),
        Column("unit_price", Kind.AMOUNT, "price of one unit before discount", required=True),
        Column("percent_discount", Kind.AMOUNT, "percentage taken off; null for none", at_most=100),
        Column("cost_subtotal", Kind.AMOUNT, "charge before discount; null before July 2026"),
        Column("cost_discount", Kind.AMOUNT, "taken off by the discount; null before July 2026"),
        Column("cost_total", Kind.AMOUNT, "what fal charged", required=True, fallback="cost"),
        Column("cost", Kind.AMOUNT, "older name of cost_total, as fal still sends it"),
        _CURRENCY,
        Column("auth_method", Kind.TEXT, "label of the credential used"),
        Column(
            "auth_detail",
            Kind.TEXT,
            "label of the credential, from its structured form",
            ("auth_method_structured", "detail"),
        ),
        Column(
            "api_key_id",
            Kind.TEXT,
            "id of the key used; null for other credentials",
            ("auth_method_structured", "api_key_id"),
        ),
        Column(
            "login_username",
            Kind.TEXT,
            "member whose login was used; null for keys",
            ("auth_method_structured", "login_username"),
        ),
    ),
    proof=Proof(
        params={
            "timeframe": "hour",
            "timezone": "UTC",
            "bound_to_timeframe": "false",
            "expand": ("summary",),  # with auth expanded, fal would split the totals
        },
        rows_path=("summary",),
        key=("endpoint_id", "unit", "unit_price", "percent_discount", "currency"),
        sums=("quantity", "cost_total"),
    ),
    doubts={
        "they are not in USD": "currency is distinct from 'USD'",
        "subtotal less discount is not the total": (
            "abs(cost_subtotal - cost_discount - cost_total) > 0.000000001"
        ),
        "cost is not cost_total": "abs(cost - cost_total) > 0.000000001",
    },
    permission="billing:usage:read, auth:keys:read and account:users:read",
    presets="BILLING or FULL",
)

CREDITS = Resource(
    name="credits",
    comment="The credit balance, each time it was read: a level, not a flow.",
    path="/account/billing",
    rows_path=(),
    params={"expand": ("credits",)},
    window="snapshot",
    every_run=True,
    key=(),
    columns=(
        Column("username", Kind.TEXT, "fal's name of the account", required=True),
        Column(
            "current_balance",
            Kind.AMOUNT,
            "credit left",
            ("credits", "current_balance"),
            required=True,
        ),
        Column("currency", Kind.TEXT, "ISO 4217 code of the balance", ("credits", "currency")),
    ),
    permission="billing:usage:read",
    presets="BILLING, READONLY or FULL",
)

# Ids for later calls come from earlier ones: usage and the catalogue before prices.
RESOURCES: Mapping[str, Resource] = {
    resource.name: resource for resource in (USAGE, CREDITS, MODELS, PRICES)
}

"""The catalogue: one entry for each collection of the fal API that we extract. Imports nothing heavy.

An entry describes what fal sends (docs/fal-api.md) and what a row is. The check of fal's answers, the
raw table with its comments, staging, proof, load, the choices of the command line and the shared tests
all follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from enum import StrEnum
from typing import Literal

from faletl.money import PRODUCT_TYPE, product_of


class Kind(StrEnum):
    """The kind of a column's values: it decides the JSON type, the checks and the database type."""

    TEXT = "text"
    AMOUNT = "amount"  # a JSON number >= 0, kept exactly: money and quantities (faletl/money.py)
    WHOLE = "whole"  # a whole JSON number >= 0: counts, nano-dollars
    SECONDS = "seconds"  # a JSON number >= 0, measured; anything else is NULL, the row is kept
    INSTANT = "instant"  # ISO 8601 text with an offset, kept in UTC
    LIST = "list"  # a JSON array of texts, kept as JSON text


@dataclass(frozen=True, slots=True)
class Column:
    """One field of a record.

    `path` leads to it inside the record (default: its own name). A column that is not `required`
    may be absent or null. `fallback` names an older field that carries the same value, times
    `fallback_scale`. `is_outer`: the field is next to the record list (in a bucket), not in each
    record. `is_asked`: the field is a parameter of the question and in no answer. `is_sparse`: fal may
    leave it out of every record; any other field at the top of a record that is always absent is
    recorded as drift. `longest` is the largest number of bytes of a text: ids go into questions, labels
    into keys and reports. `is_level`: an amount may be negative, as a balance is. `may_be_text`: a
    number is accepted as a JSON text as well. `zero_is_none`: 0 and null mean the same.
    """

    name: str
    kind: Kind
    comment: str
    path: tuple[str, ...] = ()
    required: bool = False
    fallback: str | None = None
    fallback_scale: str = "1"
    is_outer: bool = False
    is_asked: bool = False
    is_sparse: bool = False
    at_most: int | None = None
    may_be_empty: bool = True
    longest: int = 1000
    is_level: bool = False
    may_be_text: bool = False
    zero_is_none: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """The JSON path inside the record."""
        return self.path or (self.name,)


WHOLE_SINCE = date(2026, 9, 1)
"""Since this day fal's records have all the fields of the catalogue (docs/fal-api.md, "Versions")."""

Question = Mapping[str, str | tuple[str, ...]]
"""Query parameters. The bounds of the window, ids and cursors are added to them."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A control total: fal's own sums over the same window, from a question of its own.

    `columns` are those of the answer's records. Per `key`, the sums of the columns in `sums` must equal
    ours, over the records for which `only` (SQL) is true. Where `two_walks_suffice`, the totals come
    from another ledger of fal's: rows that differ from it are accepted if a second walk finds the very
    same rows.
    """

    path: str
    params: Question
    rows_path: tuple[str, ...]
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    sums: tuple[str, ...]
    only: str = "true"
    two_walks_suffice: bool = False


@dataclass(frozen=True, slots=True)
class Resource:
    """A collection of the fal API: where it is, what its records contain, what a row is.

    A window is complete when each question of `params` is answered. Where fal refuses these (400), as it
    did before it knew all of their values, `older_params` are asked instead.
    """

    name: str
    comment: str
    path: str
    rows_path: tuple[str, ...]  # to the record list; scalars around an inner list go onto its records
    columns: tuple[Column, ...]
    key: tuple[str, ...]  # what distinguishes the rows of one window
    window: Literal["day", "snapshot"]
    every_run: bool = False  # a snapshot for each run; else one for each UTC day
    params: tuple[Question, ...] = ({},)
    older_params: tuple[Question, ...] = ()
    time: str | None = None  # the column that places a row inside its window
    ids_per_call: int | None = None  # asked by endpoint ids, at most this many a call
    repeats: bool = True  # whether rows with the same key are separate rows, or one row seen twice
    identity: tuple[str, ...] = ()  # fal gives rows no id: their hash is one, and twins are numbered
    not_kept: tuple[str, ...] = ()  # fields that fal is known to send and that we do not load
    proof: Proof | None = None
    nothing_without: str | None = None  # a record without this column gives no row
    # What is expected of rows, each with SQL for the rows that fail it; these are kept, with a warning.
    expected: Mapping[str, str] = field(default_factory=dict)
    uses_metrics_key: bool = False
    smallest_part: timedelta = timedelta(hours=1)  # the shortest half of a window whose pages lose rows
    is_optional: bool = False  # skipped where the key may not read it, unless named
    permission: str = ""  # several as fal writes them: comma-separated, without blanks
    presets: str = ""

    @property
    def table(self) -> str:
        """The raw table, with its schema."""
        return f"raw.{self.name}"

    @property
    def has_endpoints(self) -> bool:
        """Whether each row belongs to one endpoint."""
        return any(column.name == "endpoint_id" for column in self.columns)

    @property
    def identifying(self) -> tuple[str, ...]:
        """The columns of when and for what a row was charged or counted: no amount, no label."""
        names = ("request_id", "endpoint_id", "unit", "timeframe", self.time)
        return tuple(column.name for column in self.columns if column.name in names)

    @property
    def with_any_sign(self) -> Resource:
        """This resource with negative amounts allowed, for rows that a person accepted."""
        proof = self.proof and replace(self.proof, columns=_with_any_sign(self.proof.columns))
        return replace(self, columns=_with_any_sign(self.columns), proof=proof)

    @property
    def needs(self) -> str:
        """The permissions that a key needs to read the resource, and the presets that include them."""
        permissions = self.permission.replace(",", ", ") or "no permission"
        return f"{permissions} (preset {self.presets})"

    def column(self, name: str) -> Column:
        """Return the column of that name."""
        return next(column for column in self.columns if column.name == name)


def _with_any_sign(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    numbers = (Kind.AMOUNT, Kind.WHOLE)
    return tuple(replace(c, is_level=True) if c.kind in numbers else c for c in columns)


_ENDPOINT = Column(
    "endpoint_id", Kind.TEXT, "fal's id of the model endpoint", required=True, may_be_empty=False
)
_CURRENCY = Column("currency", Kind.TEXT, "ISO 4217 code of every amount in the row")
_UNIT = Column("unit", Kind.TEXT, "billing unit, exactly as fal writes it", required=True)
_BUCKET = Column("bucket", Kind.INSTANT, "start of the hour", required=True, is_outer=True)
_COSTS = (
    Column("unit_price", Kind.AMOUNT, "price of one unit before discount"),
    Column(
        "percent_discount",
        Kind.AMOUNT,
        "percentage taken off; null or 0 for no discount",
        at_most=100,
        zero_is_none=True,
    ),
    Column("cost_subtotal", Kind.AMOUNT, "charge before discount; null before July 2026"),
    Column("cost_discount", Kind.AMOUNT, "amount taken off by the discount; null before July 2026"),
)
_CREDENTIAL = (
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
)
_COST_IDENTITY = {
    "cost_subtotal less cost_discount is cost_total": (
        "abs(cost_subtotal - cost_discount - cost_total) > 0.000000001"
    ),
}
_BILLING_PERMISSION = "billing:usage:read,auth:keys:read,account:users:read"

_METADATA_NOT_KEPT = (
    "is_favorited",
    "thumbnail_url",
    "thumbnail_animated_url",
    "github_url",
    "highlighted",
    "pinned",
    "training_endpoint_ids",
    "inference_endpoint_ids",
    "stream_url",
    "duration_estimate",
)

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
        Column("display_name", Kind.TEXT, "display name", ("metadata", "display_name")),
        Column("category", Kind.TEXT, "kind of input and output", ("metadata", "category")),
        Column("description", Kind.TEXT, "one paragraph", ("metadata", "description"), longest=100_000),
        Column("status", Kind.TEXT, "active or deprecated", ("metadata", "status")),
        Column("tags", Kind.LIST, "tags, as a JSON array", ("metadata", "tags")),
        Column("updated_at", Kind.TEXT, "last change, as fal writes it", ("metadata", "updated_at")),
        Column("date", Kind.TEXT, "creation, as fal writes it", ("metadata", "date")),
        Column("model_url", Kind.TEXT, "URL at which the endpoint is called", ("metadata", "model_url")),
        Column("license_type", Kind.TEXT, "commercial, research, private", ("metadata", "license_type")),
        Column("group_key", Kind.TEXT, "id of the model family", ("metadata", "group", "key")),
        Column("group_label", Kind.TEXT, "name of the model family", ("metadata", "group", "label")),
        Column("kind", Kind.TEXT, "inference or training", ("metadata", "kind")),
    ),
    not_kept=("openapi", "enterprise_status", *(f"metadata.{name}" for name in _METADATA_NOT_KEPT)),
    uses_metrics_key=True,
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
        _UNIT,
        Column("unit_price", Kind.AMOUNT, "list price of one unit", required=True),
        _CURRENCY,
    ),
    presets="any",
)

_BY_HOUR = {"timeframe": "hour", "timezone": "UTC", "bound_to_timeframe": "false"}
_BY_DAY = {**_BY_HOUR, "timeframe": "day"}

_USAGE_COLUMNS = (
    _BUCKET,
    _ENDPOINT,
    _UNIT,
    Column("quantity", Kind.AMOUNT, "units used", required=True),
    replace(_COSTS[0], required=True),
    *_COSTS[1:],
    Column("cost_total", Kind.AMOUNT, "what fal charged", required=True, fallback="cost"),
    Column("cost", Kind.AMOUNT, "older name of cost_total, as fal still sends it"),
    _CURRENCY,
)
_USAGE_TOTALS = Proof(
    path="/models/usage",
    params={**_BY_HOUR, "expand": ("summary",)},  # with auth in `expand`, fal would split the totals
    rows_path=("summary",),
    columns=_USAGE_COLUMNS,
    key=("endpoint_id", "unit", "unit_price", "percent_discount", "currency"),
    sums=("quantity", "cost_total"),
)

USAGE = Resource(
    name="usage",
    comment="What was used and charged, per hour, endpoint, unit, price, discount and credential.",
    path="/models/usage",
    rows_path=("time_series", "results"),
    params=({**_BY_HOUR, "expand": ("time_series", "auth_method_structured", "auth_method")},),
    older_params=({**_BY_HOUR, "expand": ("time_series", "auth_method")},),
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
    columns=(*_USAGE_COLUMNS, *_CREDENTIAL),
    not_kept=("tags",),
    proof=_USAGE_TOTALS,
    expected={
        "currency is USD": "currency is distinct from 'USD'",
        **_COST_IDENTITY,
        "cost is cost_total": "abs(cost - cost_total) > 0.000000001",
        # An hour's costs are sums of rounded costs, so only more than rounding counts as a difference.
        "cost_total is quantity times unit_price, less percent_discount": (
            f"abs(cost_subtotal::{PRODUCT_TYPE} - {product_of('quantity', 'unit_price')}) "
            f"> (0.0001 + 0.001 * cost_subtotal)::{PRODUCT_TYPE} "
            f"or abs(100 * cost_total::{PRODUCT_TYPE} "
            f"- {product_of('cost_subtotal', '100 - coalesce(percent_discount, 0)')}) "
            f"> (0.01 + 0.1 * cost_total)::{PRODUCT_TYPE}"
        ),
    },
    permission=_BILLING_PERMISSION,
    presets="BILLING or FULL",
)

BILLING_EVENTS = Resource(
    name="billing_events",
    comment="Every single charge, in US dollars. A request may have several.",
    path="/models/billing-events",
    rows_path=("billing_events",),
    params=({"limit": "10000", "expand": ("auth_method_structured", "auth_method")},),
    older_params=({"expand": ("auth_method",)},),
    window="day",
    time="timestamp",
    smallest_part=timedelta(minutes=1),
    key=(),
    identity=(
        "request_id",
        "endpoint_id",
        "timestamp",
        "unit_price",
        "quantity",
        "cost_estimate_nano_usd",
    ),
    columns=(
        Column("request_id", Kind.TEXT, "request that was charged", required=True),
        _ENDPOINT,
        Column("timestamp", Kind.INSTANT, "time of the request, not of the posting", required=True),
        Column("quantity", Kind.AMOUNT, "units charged; may be null", fallback="output_units"),
        Column("output_units", Kind.AMOUNT, "older name of quantity, as fal still sends it"),
        replace(_UNIT, required=False, comment="billing unit, exactly as fal writes it; may be null"),
        *_COSTS,
        Column(
            "cost_total",
            Kind.AMOUNT,
            "what fal charged; before July 2026 from cost_estimate_nano_usd",
            required=True,
            fallback="cost_estimate_nano_usd",
            fallback_scale="0.000000001",
        ),
        Column("cost_estimate_nano_usd", Kind.WHOLE, "the charge in whole nano-dollars"),
        *_CREDENTIAL,
    ),
    not_kept=("tags",),
    proof=replace(
        _USAGE_TOTALS,
        key=("endpoint_id",),
        sums=("cost_total",),
        only="coalesce(currency, 'USD') = 'USD'",  # as charges are
        two_walks_suffice=True,
    ),
    expected={
        **_COST_IDENTITY,
        "cost_estimate_nano_usd is cost_total in nano-dollars": (
            "abs(cost_total - cost_estimate_nano_usd * 0.000000001) > 0.0000000005"
        ),
    },
    permission=_BILLING_PERMISSION,
    presets="BILLING or FULL",
)

_COUNTS = {
    "request_count": "all requests",
    "success_count": "requests answered 2xx",
    "user_error_count": "requests answered 4xx",
    "error_count": "requests answered 5xx",
}
_LATER_COUNTS = {
    "startup_error_count": "failures to start or schedule a runner",
    "connection_error_count": "failures to reach the runner",
    "timeout_error_count": "requests that ran out of time",
    "runtime_error_count": "failures while running",
    "cold_boot_count": "requests that waited more than a second for a cold start",
}
_PERCENTILES = tuple(
    f"p{percent}_{of}" for of in ("prepare_duration", "duration") for percent in (50, 75, 90)
)
_LATER_PERCENTILES = (
    "p95_prepare_duration",
    "p99_prepare_duration",
    "p25_duration",
    "p95_duration",
    "p99_duration",
    *(f"p{percent}_cold_boot_duration" for percent in (50, 75, 90)),
)
_DURATIONS = {
    "prepare_duration": "time in queue and preparation",
    "duration": "time of execution",
    "cold_boot_duration": "time of a cold start",
}


_MAX_REQUESTS = 10**15
"""A larger count is refused: the models add up the hours of a day as whole numbers of 64 bits."""


def _percentile(name: str) -> Column:
    percent, of = name.removeprefix("p").split("_", 1)
    comment = f"p{percent} of the {_DURATIONS[of]}, in seconds"
    return Column(name, Kind.SECONDS, comment, is_sparse=True)


ANALYTICS = Resource(
    name="analytics",
    comment="Requests by outcome per hour, percentiles of their durations per day; no money.",
    path="/models/analytics",
    rows_path=("time_series", "results"),
    # Percentiles cannot be averaged, so those of a day are asked for by day.
    params=(
        {**_BY_HOUR, "expand": ("time_series", *_COUNTS, *_LATER_COUNTS, "total_billable_duration")},
        {**_BY_DAY, "expand": ("time_series", *_PERCENTILES, *_LATER_PERCENTILES)},
    ),
    older_params=(
        {**_BY_HOUR, "expand": ("time_series", *_COUNTS)},
        {**_BY_DAY, "expand": ("time_series", *_PERCENTILES)},
    ),
    window="day",
    time="bucket",
    ids_per_call=50,
    key=("timeframe", "bucket", "endpoint_id"),
    repeats=False,
    columns=(
        Column("timeframe", Kind.TEXT, "length of the bucket: hour or day", is_asked=True),
        replace(_BUCKET, comment="start of the hour or day"),
        _ENDPOINT,
        *(
            Column(
                name,
                Kind.WHOLE,
                f"{comment}; per hour only",
                is_sparse=name in _LATER_COUNTS,
                at_most=_MAX_REQUESTS,
            )
            for name, comment in (_COUNTS | _LATER_COUNTS).items()
        ),
        Column(
            "total_billable_duration",
            Kind.SECONDS,
            "execution time that counts for billing, in seconds",
            is_sparse=True,
        ),
        *(_percentile(name) for name in (*_PERCENTILES, *_LATER_PERCENTILES)),
    ),
    uses_metrics_key=True,
    is_optional=True,
    permission="models:metrics:read",
    presets="API, SERVERLESS, READONLY or FULL",
)

CREDITS = Resource(
    name="credits",
    comment="The credit balance, each time it was extracted: a level, not a flow.",
    path="/account/billing",
    rows_path=(),
    params=({"expand": ("credits",)},),
    window="snapshot",
    every_run=True,
    key=(),
    columns=(
        Column("username", Kind.TEXT, "fal's name of the account", required=True),
        Column(
            "current_balance",
            Kind.AMOUNT,
            "credit left; negative if more was used than paid for",
            ("credits", "current_balance"),
            is_sparse=True,
            is_level=True,
            may_be_text=True,
        ),
        Column(
            "currency",
            Kind.TEXT,
            "ISO 4217 code of the balance",
            ("credits", "currency"),
            is_sparse=True,
        ),
    ),
    nothing_without="current_balance",
    is_optional=True,
    permission="billing:usage:read",
    presets="BILLING, READONLY or FULL",
)

# Ids for later calls come from earlier ones: usage and the catalogue before analytics and prices.
RESOURCES: Mapping[str, Resource] = {
    resource.name: resource for resource in (USAGE, BILLING_EVENTS, CREDITS, MODELS, ANALYTICS, PRICES)
}

_PERMISSIONS = dict.fromkeys(
    name for resource in RESOURCES.values() for name in resource.permission.split(",") if name
)

KEY_COMMAND = f"fal keys create --permission {','.join(_PERMISSIONS)} --desc faletl"
"""The command that makes the least key for all resources (docs/fal-api.md, "Base and keys")."""

MAKE_A_KEY = (
    f"make one key with: {KEY_COMMAND} (where your organization cannot: a key of preset FULL, or two, "
    "BILLING as FAL_KEY and READONLY as FAL_METRICS_KEY)"
)
"""The advice wherever a key is missing, refused or has too few permissions."""

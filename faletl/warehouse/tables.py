"""The tables that faletl writes row by window: raw from the catalogue, ops by hand.

Marts and reports are not here: they are what `sql/` selects. What the `grain` line is to a model,
`info["grain"]` is to a table here: the columns that tell its rows apart; empty where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from faletl.money import PRECISION, SCALE
from faletl.resources import RESOURCES, Kind, Resource

SCHEMA_VERSION = 5
"""Grows when a table here changes: an older warehouse is upgraded, a newer one refused."""

SCHEMAS: Mapping[str, str] = {
    "raw": "What fal says, row by row, with where each row was landed.",
    "staging": "Raw, renamed and cast: instants in UTC, one credential id. Views and seeds; no sums.",
    "marts": "Dimensions and facts: what analysts join.",
    "reports": "What dashboards read: wide, named for people.",
    "ops": "What faletl did and noticed: loads, restatements, quarantine, validations, failures.",
}
"""What each schema is for, in reading order: in docs/, and as a comment where a database keeps it."""

LAYERS = ("staging", "marts", "reports")
"""Schemas of what `sql/` selects, in build order."""

METADATA = sa.MetaData()


_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""Compared by code point in every database: ids that differ are different, and sort alike."""


def _instant() -> sa.DateTime:
    return sa.DateTime(timezone=True)


_TYPES: Mapping[Kind, sa.types.TypeEngine[Any]] = {
    Kind.TEXT: _TEXT,
    Kind.AMOUNT: sa.Numeric(PRECISION, SCALE),
    Kind.WHOLE: sa.BigInteger(),
    Kind.SECONDS: sa.Numeric(PRECISION, SCALE),
    Kind.INSTANT: _instant(),
    Kind.LIST: _TEXT,
}


def _raw_table(resource: Resource) -> sa.Table:
    lead: list[sa.Column[Any]] = [
        sa.Column("_account", _TEXT, comment="account label; see marts.dim_account"),
        sa.Column("_load_id", _TEXT, comment="the load that brought the row; see ops.loads"),
        sa.Column("_page", sa.Integer, comment="page of the load, counted from 1"),
        sa.Column("_row", sa.Integer, comment="row of the page, counted from 1"),
    ]
    if resource.window == "snapshot":
        lead.append(sa.Column("_snapshot_at", _instant(), comment="instant of the snapshot"))
    if resource.identity:
        names = ", ".join(resource.identity)
        lead += [
            sa.Column("_hash", _TEXT, comment=f"fingerprint of account, {names}"),
            sa.Column("_ordinal", sa.Integer, comment="number among rows of the same hash, from 1"),
        ]
    body = [
        sa.Column(column.name, _TYPES[column.kind], comment=column.comment)
        for column in resource.columns
    ]
    table = sa.Table(
        resource.name,
        METADATA,
        *lead,
        *body,
        schema="raw",
        comment=resource.comment,
        info={"grain": _raw_grain(resource)},
    )
    _index_on_server(table, resource.time or "_snapshot_at")
    return table


def _index_on_server(table: sa.Table, column: str) -> None:
    """An index over the column that puts a row on a day; DuckDB finds days without one."""
    name = f"{table.name}_{column.strip('_')}"
    sa.Index(name, table.c[column]).ddl_if(dialect="postgresql")


def _raw_grain(resource: Resource) -> tuple[str, ...]:
    """What tells rows of the raw table apart; nothing where fal may send a line in two parts."""
    if resource.identity:
        return ("_account", "_hash", "_ordinal")
    if resource.window == "snapshot":
        return ("_account", "_snapshot_at", *resource.key)
    return () if resource.repeats else ("_account", *resource.key)


RAW: Mapping[str, sa.Table] = {name: _raw_table(r) for name, r in RESOURCES.items()}


def _ops_table(
    name: str,
    comment: str,
    grain: tuple[str, ...],
    /,
    **columns: tuple[sa.types.TypeEngine[Any], str],
) -> sa.Table:
    return sa.Table(
        name,
        METADATA,
        *(sa.Column(column, kind, comment=text) for column, (kind, text) in columns.items()),
        schema="ops",
        comment=comment,
        info={"grain": grain},
    )


_COUNT, _AT, _FLAG = sa.BigInteger(), _instant(), sa.Boolean()

UNIT_FAMILIES = ("image", "pixel", "time", "text", "token", "compute", "request", "other")

COUNTED_UNIT = (
    "^([1-9][0-9]{0,8}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,2})(?: +([^ ].*)|([km]) +((?:token|character)s?))$"
)
"""A unit with a number in front: the number, then the unit, or k or m and the unit. Any regex engine."""

SEED_UNIT = sa.Table(
    "seed_unit",
    METADATA,
    sa.Column("unit", _TEXT, comment="unit as billed, trimmed and in lower case"),
    sa.Column("canonical_unit", _TEXT, comment="one spelling for all of its spellings"),
    sa.Column("family", _TEXT, comment=", ".join(UNIT_FAMILIES)),
    sa.Column("base_unit", _TEXT, comment="what a quantity can be counted in"),
    sa.Column("factor", sa.Numeric(PRECISION, SCALE), comment="base units in one unit"),
    schema="staging",
    comment="What units mean: sql/seeds/unit.csv, and the user's own table (FALETL_UNITS).",
    info={"grain": ("unit",)},
)

SEED_CREDENTIAL_OWNER = sa.Table(
    "seed_credential_owner",
    METADATA,
    sa.Column("account", _TEXT, comment="account label; empty for all accounts"),
    sa.Column("credential_id", _TEXT, comment="key:…, user:…, label:… or none"),
    sa.Column("owner", _TEXT, comment="whose it is"),
    sa.Column("team", _TEXT, comment="team that pays"),
    sa.Column("cost_centre", _TEXT, comment="cost centre that pays"),
    schema="staging",
    comment="Whose credentials are: sql/seeds/credential_owner.csv, and the user's own (FALETL_OWNERS).",
    info={"grain": ("account", "credential_id")},
)

SEED_THRESHOLD = sa.Table(
    "seed_threshold",
    METADATA,
    sa.Column("name", _TEXT, comment="the setting without FALETL_, in lower case"),
    sa.Column("value", sa.Numeric(PRECISION, SCALE), comment="its value"),
    schema="staging",
    comment="From when on a charge counts as run away: the settings FALETL_RUNAWAY_….",
    info={"grain": ("name",)},
)

SEEDS = (SEED_UNIT, SEED_CREDENTIAL_OWNER, SEED_THRESHOLD)

WAREHOUSE = _ops_table(
    "warehouse",
    "The warehouse itself: one row.",
    (),
    schema_version=(sa.Integer(), "version of the raw and ops tables"),
    faletl_version=(_TEXT, "faletl that made or upgraded them; null where an older one did"),
    fencing_token=(_COUNT, "token of the newest lease; an older one may not commit"),
    holder=(_TEXT, "who took the newest lease"),
    held_since=(_AT, "when"),
    data_version=(_COUNT, "grows with every change of a raw table"),
    warehouse_id=(_TEXT, "the warehouse among those that share a landing folder; receipts carry it"),
    decided_until=(
        _AT,
        "newest rename or forget of an account that its tables follow; null without any",
    ),
)

OBJECTS = _ops_table(
    "objects",
    "Tables and views of staging, marts and reports that faletl made; others are never touched.",
    ("name",),
    name=(_TEXT, "the table or view, with its schema as the database calls it"),
)

LOADS = _ops_table(
    "loads",
    "Loads of windows: the ledger of what raw holds and what it held before.",
    ("load_id",),
    load_id=(_TEXT, "id of the read and its load; the folder of its pages has that name"),
    run_id=(_TEXT, "run that read the window"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window, or instant of the snapshot"),
    window_end=(_AT, "end of the window, exclusive; equal to the start for a snapshot"),
    pages=(_COUNT, "pages that hold the rows"),
    rows=(_COUNT, "rows that raw holds of the window after the load"),
    cost_total=(
        sa.Numeric(PRECISION, SCALE),
        "sum over the rows, to compare with raw: no amount to report, as it mixes currencies",
    ),
    control_total=(
        sa.Numeric(PRECISION, SCALE),
        "sum of cost_total that fal itself says for the window; null where it says none",
    ),
    digest=(_TEXT, "fingerprint of the rows, whatever their order"),
    asked_digest=(_TEXT, "fingerprint of the endpoint ids that were asked for; null where all were"),
    proof=(_TEXT, "how completeness was shown: summary, two walks, none; differs on an open day"),
    dropped_rows=(_COUNT, "rows that fal sent from outside the window"),
    quarantined_rows=(_COUNT, "rows set aside for a breach of contract; see ops.quarantine"),
    doubtful_rows=(_COUNT, "rows kept as sent though odd: another currency, costs that do not add up"),
    rounded_amounts=(_COUNT, "amounts that lost the noise of a binary float"),
    fencing_token=(_COUNT, "token of the lease under which it was loaded"),
    last_fencing_token=(_COUNT, "token of the newest lease under which the same rows were found"),
    landing_path=(_TEXT, "folder of the landed pages, below the landing folder"),
    last_load_id=(_TEXT, "id of the newest read that found the same rows"),
    read_at=(_AT, "when the read began that brought the rows"),
    last_read_at=(_AT, "when the newest read began that found the same rows"),
    changed_at=(_AT, "when the extract began that changed the closed window last; null if none did"),
    loaded_at=(_AT, "when the rows were loaded"),
    whole_catalogue_at=(_AT, "when the window was last asked for all endpoints, not only those used"),
    data_version=(_COUNT, "version of the raw tables that the load made; see ops.warehouse"),
    is_current=(_FLAG, "whether raw holds these rows, and not those of a newer load"),
    is_provisional=(_FLAG, "whether the day was still open when it was last read"),
    is_settled=(_FLAG, "whether the day had ended 24 hours ago when it was last read"),
)

RESTATEMENTS = _ops_table(
    "restatements",
    "What a read changed in a window that had been read after its end: one row per changed line.",
    ("load_id", "endpoint_id", "unit", "currency", "credential_id"),
    load_id=(_TEXT, "load that brought the change"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window"),
    endpoint_id=(_TEXT, "fal's id of the model endpoint"),
    unit=(_TEXT, "billing unit, exactly as fal writes it"),
    currency=(_TEXT, "ISO 4217 code of the costs; USD for billing events, XXX where fal gave none"),
    credential_id=(_TEXT, "who spent; see marts.dim_credential"),
    quantity_before=(sa.Numeric(PRECISION, SCALE), "quantity as it was; 0 where the line is new"),
    quantity_after=(sa.Numeric(PRECISION, SCALE), "quantity as it is now; 0 where the line is gone"),
    cost_total_before=(sa.Numeric(PRECISION, SCALE), "charge as it was"),
    cost_total_after=(sa.Numeric(PRECISION, SCALE), "charge as it is now"),
    seen_at=(_AT, "when the read was complete that showed the change"),
)

QUARANTINE = _ops_table(
    "quarantine",
    "Rows that broke their contract and are not in raw: looked at by faletl quarantine.",
    ("load_id", "page", "row"),
    load_id=(_TEXT, "id of the read; the folder of its pages has that name"),
    run_id=(_TEXT, "run that read the window"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window, or instant of the snapshot"),
    page=(sa.Integer(), "page of the read, counted from 1"),
    row=(sa.Integer(), "row of the page, counted from 1"),
    endpoint_id=(_TEXT, "fal's id of the model endpoint, where the row tells it"),
    reason=(_TEXT, "what is wrong with the row"),
    raw_json=(_TEXT, "the row as fal sent it; of a very long one the beginning"),
    landing_path=(_TEXT, "folder of the landed pages, below the landing folder"),
    fencing_token=(_COUNT, "token of the lease under which the row was set aside or resolved"),
    seen_at=(_AT, "when the read was complete that brought it"),
    resolved_at=(_AT, "when its window was loaded without such rows; null while it is open"),
)

CONTRACT_DRIFT = _ops_table(
    "contract_drift",
    "First sight of each change of what fal sends: a field that is new, missing or of another type.",
    ("account", "resource", "field", "kind"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    field=(_TEXT, "where it stands in a record; steps are separated by dots"),
    kind=(_TEXT, "new, missing or retyped"),
    sample=(_TEXT, "the beginning of one such value, as fal sent it; null where it is missing"),
    load_id=(_TEXT, "read that showed it first"),
    first_seen_at=(_AT, "when that read was complete"),
    landing_path=(_TEXT, "folder of its landed pages, below the landing folder"),
)

VALIDATIONS = _ops_table(
    "validations",
    "What the gate found of each load, and of loads that it refused: one row per expectation.",
    ("load_id", "expectation"),
    load_id=(_TEXT, "id of the read; the folder of its pages has that name"),
    run_id=(_TEXT, "run that validated"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window, or instant of the snapshot"),
    expectation=(_TEXT, "what is expected"),
    severity=(_TEXT, "critical refuses the window; warning and info are only recorded"),
    success=(_FLAG, "whether it is so"),
    observed=(_TEXT, "what was found"),
    unexpected_count=(_COUNT, "rows that are not as expected"),
    sample_keys=(_TEXT, "keys of some of them, as JSON"),
    validated_at=(_AT, "when"),
)

HORIZONS = _ops_table(
    "horizons",
    "From which day on the ledger of an account's resource is to be complete: the first asked for.",
    ("account", "resource"),
    account=(_TEXT, "account label; the fingerprint of a key as long as its label is unknown"),
    resource=(_TEXT, "collection of the fal API"),
    first_day=(sa.Date(), "every UTC day from here on that is not loaded is due"),
    is_decided=(_FLAG, "whether FALETL_FIRST_DAYS counts no longer; null in rows of an older faletl"),
)

UNKNOWN_ENDPOINTS = _ops_table(
    "unknown_endpoints",
    "Endpoint ids that a fal API answered 404 for; they are not asked again for some days.",
    ("account", "resource", "endpoint_id"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    endpoint_id=(_TEXT, "fal's id of the model endpoint"),
    seen_at=(_AT, "when fal last said that it does not know it"),
)

FAILURES = _ops_table(
    "failures",
    "Windows whose last attempt failed; a window that loads leaves no row.",
    ("account", "resource", "window_start"),
    run_id=(_TEXT, "run that failed"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window"),
    error=(_TEXT, "kind of the error"),
    exit_code=(sa.Integer(), "exit code of the error: 3 if the window was refused; null in older rows"),
    message=(_TEXT, "the error in one sentence"),
    failed_at=(_AT, "when"),
    data_version=(_COUNT, "version of the raw tables when the window first failed so"),
)

ACCOUNTS = _ops_table(
    "accounts",
    "Account labels, each bound to fal's usernames and to the keys that were seen with it.",
    ("account",),
    account=(_TEXT, "account label"),
    usernames=(_TEXT, "fal's usernames of the account, as a JSON array; the newest is the last"),
    key_ids=(_TEXT, "salted SHA-256 of the id of each of its keys, as a JSON array"),
    is_sandbox=(_FLAG, "whether a sandbox invented the account"),
    bound_at=(_AT, "when the label was bound first"),
)

HOLDS = _ops_table(
    "holds",
    "Extracts that are not loaded, because loading them would remove rows that were proven before.",
    ("account", "resource", "window_start"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window"),
    load_id=(_TEXT, "id of the newest held extract; the folder of its pages has that name"),
    landing_path=(_TEXT, "folder of its landed pages, below the landing folder"),
    rows_loaded=(_COUNT, "rows that are loaded"),
    rows_extracted=(_COUNT, "rows of the held extract"),
    cost_total_loaded=(
        sa.Numeric(PRECISION, SCALE),
        "sum over the rows that are loaded; null where rows have no cost",
    ),
    cost_total_extracted=(sa.Numeric(PRECISION, SCALE), "sum over the rows of the held extract"),
    rows_digest=(_TEXT, "fingerprint of the loaded rows that the held extract lacks"),
    is_final=(_FLAG, "whether the window is too old to be served for certain; not extracted again"),
    held_since=(_AT, "when the first extract began that was held"),
    last_extracted_at=(_AT, "when the newest extract began that was held"),
    data_version=(_COUNT, "version of the raw tables when the window was first held"),
)

ACCEPTANCES = _ops_table(
    "acceptances",
    "What people accepted with faletl accept: windows that were held, or refused by a contract rule.",
    ("acceptance_id",),
    acceptance_id=(_TEXT, "id of the acceptance"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window"),
    load_id=(_TEXT, "id of the extract that was accepted"),
    accepted=(_TEXT, "held: the held extract; kept: what is loaded; refused: refused rows"),
    rows_digest=(_TEXT, "fingerprint of the missing or refused rows; holds for later extracts as well"),
    reason=(_TEXT, "why, in the words of who accepted"),
    rows_before=(_COUNT, "rows that were loaded"),
    rows_after=(_COUNT, "rows of the extract"),
    cost_total_before=(sa.Numeric(PRECISION, SCALE), "sum over the rows that were loaded"),
    cost_total_after=(sa.Numeric(PRECISION, SCALE), "sum over the rows of the extract"),
    accepted_by=(_TEXT, "user of the operating system"),
    accepted_at=(_AT, "when"),
)

ALERTS = _ops_table(
    "alerts",
    "What people should look at: one row from its first sight on, resolved when it is over.",
    ("alert_key",),
    alert_key=(_TEXT, "fingerprint of kind and subject"),
    kind=(_TEXT, "held, refused, locked or runaway"),
    account=(_TEXT, "account label; null where it is not known"),
    subject=(_TEXT, "what it is about: a window, a request, or the account"),
    detail=(_TEXT, "the sentence for people"),
    first_seen_at=(_AT, "when it was noticed first"),
    announced_at=(_AT, "when it was sent; null as long as it was not"),
    resolved_at=(_AT, "when it was over; null while it is open"),
    resolution_announced_at=(_AT, "when the end was sent; null as long as it was not"),
)

BUILDS = _ops_table(
    "builds",
    "Builds of staging, marts and reports that passed their checks.",
    ("build_id",),
    build_id=(_TEXT, "id of the build"),
    run_id=(_TEXT, "run that built"),
    days=(_COUNT, "days that were made anew"),
    checks=(_COUNT, "checks that returned no rows"),
    data_version=(_COUNT, "version of the raw tables it stands on"),
    fencing_token=(
        _COUNT,
        "token of the lease under which it was built; the greatest is the newest",
    ),
    is_full=(_FLAG, "whether everything was made anew, not only the days that changed"),
    models_digest=(_TEXT, "fingerprint of the SQL and seeds it was made with"),
    started_at=(_AT, "start"),
    finished_at=(_AT, "end"),
    published_at=(_AT, "when it was shown to readers"),
)

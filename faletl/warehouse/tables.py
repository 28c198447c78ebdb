"""The tables that faletl writes row by window: raw from the catalogue, ops by hand.

Marts and reports are not here: the selects in `sql/` define them. As the `grain` line is to a model, so
`info["grain"]` is to a table here: the columns that identify a row; empty where rows may repeat.
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
    "raw": "Rows as fal sent them, each with the landed page that it came from.",
    "staging": "Raw, renamed and cast: instants in UTC, one credential id. Views and seeds; no sums.",
    "marts": "Dimensions and facts, for analysts to join.",
    "reports": "Wide tables for dashboards, with names for people.",
    "ops": "The records of faletl: loads, restatements, quarantine, validations, failures.",
}
"""The purpose of each schema, in reading order: shown in docs/, and as a comment on the schema where the
database keeps one."""

LAYERS = ("staging", "marts", "reports")
"""Schemas of the models in `sql/`, in build order."""

METADATA = sa.MetaData()


_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""Text compared by code point, so that ids compare and sort alike in every database."""


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
        sa.Column("_load_id", _TEXT, comment="id of the load that inserted the row; see ops.loads"),
        sa.Column("_page", sa.Integer, comment="page of the extract, counted from 1"),
        sa.Column("_row", sa.Integer, comment="row of the page, counted from 1"),
    ]
    if resource.window == "snapshot":
        lead.append(sa.Column("_snapshot_at", _instant(), comment="instant of the snapshot"))
    if resource.identity:
        names = ", ".join(resource.identity)
        lead += [
            sa.Column("_hash", _TEXT, comment=f"fingerprint of account, {names}"),
            sa.Column(
                "_ordinal", sa.Integer, comment="number of the row among rows of the same hash, from 1"
            ),
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
    """Index the column that assigns a row to a day; DuckDB needs no index for that."""
    name = f"{table.name}_{column.strip('_')}"
    sa.Index(name, table.c[column]).ddl_if(dialect="postgresql")


def _raw_grain(resource: Resource) -> tuple[str, ...]:
    """Return the columns that identify a raw row; none where fal may send a line in two parts."""
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
    sa.Column("canonical_unit", _TEXT, comment="the one spelling that all spellings of the unit map to"),
    sa.Column("family", _TEXT, comment=", ".join(UNIT_FAMILIES)),
    sa.Column("base_unit", _TEXT, comment="unit into which quantities are converted"),
    sa.Column("factor", sa.Numeric(PRECISION, SCALE), comment="number of base units in one unit"),
    schema="staging",
    comment="Meaning of each unit: sql/seeds/unit.csv and FALETL_UNITS.",
    info={"grain": ("unit",)},
)

SEED_CREDENTIAL_OWNER = sa.Table(
    "seed_credential_owner",
    METADATA,
    sa.Column("account", _TEXT, comment="account label; empty for all accounts"),
    sa.Column("credential_id", _TEXT, comment="key:…, user:…, label:… or none"),
    sa.Column("owner", _TEXT, comment="person or service that owns the credential"),
    sa.Column("team", _TEXT, comment="team that pays"),
    sa.Column("cost_centre", _TEXT, comment="cost centre that pays"),
    schema="staging",
    comment="Owner of each credential: sql/seeds/credential_owner.csv and FALETL_OWNERS.",
    info={"grain": ("account", "credential_id")},
)

SEED_THRESHOLD = sa.Table(
    "seed_threshold",
    METADATA,
    sa.Column("name", _TEXT, comment="the setting without FALETL_, in lower case"),
    sa.Column("value", sa.Numeric(PRECISION, SCALE), comment="value of the setting"),
    schema="staging",
    comment="Thresholds above which a charge is a runaway charge: the settings FALETL_RUNAWAY_….",
    info={"grain": ("name",)},
)

SEEDS = (SEED_UNIT, SEED_CREDENTIAL_OWNER, SEED_THRESHOLD)

WAREHOUSE = _ops_table(
    "warehouse",
    "The warehouse itself: one row.",
    (),
    schema_version=(sa.Integer(), "version of the raw and ops tables"),
    faletl_version=(
        _TEXT,
        "version of faletl that created or upgraded them; null where an older one did",
    ),
    fencing_token=(
        _COUNT,
        "token of the newest lease; a transaction with an older token may not commit",
    ),
    holder=(_TEXT, "process that took the newest lease"),
    held_since=(_AT, "when it was taken"),
    data_version=(_COUNT, "grows with every change of a raw table"),
    warehouse_id=(
        _TEXT,
        "id of the warehouse among those that share a landing folder; receipts carry it",
    ),
    decided_until=(
        _AT,
        "newest decision to rename or forget an account that the tables reflect; null if none",
    ),
)

OBJECTS = _ops_table(
    "objects",
    "Tables and views of staging, marts and reports that faletl made; it never touches others.",
    ("name",),
    name=(_TEXT, "table or view, with the name of its schema in the database"),
)

LOADS = _ops_table(
    "loads",
    "The ledger: one row per load of a window, current and replaced.",
    ("load_id",),
    load_id=(_TEXT, "id of the extract and its load; the folder of its pages has that name"),
    run_id=(_TEXT, "run that extracted the window"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window, or instant of the snapshot"),
    window_end=(_AT, "end of the window, exclusive; equal to the start for a snapshot"),
    pages=(_COUNT, "number of pages with rows"),
    rows=(_COUNT, "rows of the window in raw after the load"),
    cost_total=(
        sa.Numeric(PRECISION, SCALE),
        "sum over the rows, to compare with raw; do not report it, because it mixes currencies",
    ),
    control_total=(
        sa.Numeric(PRECISION, SCALE),
        "fal's own total of cost_total for the window; null where fal gives none",
    ),
    digest=(_TEXT, "fingerprint of the rows, independent of their order"),
    asked_digest=(_TEXT, "fingerprint of the requested endpoint ids; null where all were requested"),
    proof=(_TEXT, "how completeness was proven: summary, two walks or none; differs on an open day"),
    dropped_rows=(_COUNT, "rows that fal sent although they are outside the window"),
    quarantined_rows=(
        _COUNT,
        "rows quarantined because they violate fal's contract; see ops.quarantine",
    ),
    doubtful_rows=(
        _COUNT,
        "rows loaded as sent although doubtful: another currency, costs that do not add up",
    ),
    rounded_amounts=(_COUNT, "amounts from which the noise of a binary float was removed"),
    fencing_token=(_COUNT, "token of the lease under which the rows were loaded"),
    last_fencing_token=(_COUNT, "token of the newest lease under which an extract confirmed the rows"),
    landing_path=(_TEXT, "folder of the landed pages, below the landing folder"),
    last_load_id=(_TEXT, "id of the newest extract with the same rows"),
    read_at=(_AT, "start of the extract that brought the rows"),
    last_read_at=(_AT, "start of the newest extract with the same rows"),
    changed_at=(
        _AT,
        "start of the last extract that changed the window after its end; null if none did",
    ),
    loaded_at=(_AT, "when the rows were loaded"),
    whole_catalogue_at=(_AT, "last extract that asked for all endpoints, not only those in use"),
    data_version=(_COUNT, "version of the raw tables after the load; see ops.warehouse"),
    is_current=(_FLAG, "whether these rows are in raw, and not those of a newer load"),
    is_provisional=(_FLAG, "whether the day was still open when last extracted"),
    is_settled=(_FLAG, "whether the day had ended at least 24 hours before it was last extracted"),
)

RESTATEMENTS = _ops_table(
    "restatements",
    "Changes that an extract made to a window extracted after its end before: one row per changed line.",
    ("load_id", "endpoint_id", "unit", "currency", "credential_id"),
    load_id=(_TEXT, "id of the load that made the change"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window"),
    endpoint_id=(_TEXT, "fal's id of the model endpoint"),
    unit=(_TEXT, "billing unit, exactly as fal writes it"),
    currency=(_TEXT, "ISO 4217 code of the costs; USD for billing events, XXX where fal sent none"),
    credential_id=(_TEXT, "credential that spent; see marts.dim_credential"),
    quantity_before=(
        sa.Numeric(PRECISION, SCALE),
        "quantity before the change; 0 where the line is new",
    ),
    quantity_after=(sa.Numeric(PRECISION, SCALE), "quantity after the change; 0 where the line is gone"),
    cost_total_before=(
        sa.Numeric(PRECISION, SCALE),
        "charge before the change; 0 where the line is new",
    ),
    cost_total_after=(sa.Numeric(PRECISION, SCALE), "charge after the change; 0 where the line is gone"),
    seen_at=(_AT, "end of the extract that showed the change"),
)

QUARANTINE = _ops_table(
    "quarantine",
    "Rows that violate fal's contract and are not in raw; faletl quarantine lists them.",
    ("load_id", "page", "row"),
    load_id=(_TEXT, "id of the extract; the folder of its pages has that name"),
    run_id=(_TEXT, "run that extracted the window"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window, or instant of the snapshot"),
    page=(sa.Integer(), "page of the extract, counted from 1"),
    row=(sa.Integer(), "row of the page, counted from 1"),
    endpoint_id=(_TEXT, "fal's id of the model endpoint, where the row has one"),
    reason=(_TEXT, "how the row violates the contract"),
    raw_json=(_TEXT, "the row as fal sent it; a very long row is cut off"),
    landing_path=(_TEXT, "folder of the landed pages, below the landing folder"),
    fencing_token=(_COUNT, "token of the lease under which the row was quarantined or resolved"),
    seen_at=(_AT, "end of the extract that contained the row"),
    resolved_at=(_AT, "when the window was loaded without such rows; null while the row is open"),
)

CONTRACT_DRIFT = _ops_table(
    "contract_drift",
    "First occurrence of each change in fal's answers: a field that is new, missing or of another type.",
    ("account", "resource", "field", "kind"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    field=(_TEXT, "path of the field in a record; steps are separated by dots"),
    kind=(_TEXT, "new, missing or retyped"),
    sample=(_TEXT, "beginning of one such value, as fal sent it; null where the field is missing"),
    load_id=(_TEXT, "id of the first extract with the change"),
    first_seen_at=(_AT, "end of that extract"),
    landing_path=(_TEXT, "folder of the landed pages, below the landing folder"),
)

VALIDATIONS = _ops_table(
    "validations",
    "Results of the gate for each extract, loaded or refused: one row per expectation.",
    ("load_id", "expectation"),
    load_id=(_TEXT, "id of the extract; the folder of its pages has that name"),
    run_id=(_TEXT, "run that validated"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window, or instant of the snapshot"),
    expectation=(_TEXT, "description of the expectation"),
    severity=(_TEXT, "critical refuses the window; warning and info are only recorded"),
    success=(_FLAG, "whether the window meets the expectation"),
    observed=(_TEXT, "what the gate observed"),
    unexpected_count=(_COUNT, "number of rows that do not meet the expectation"),
    sample_keys=(_TEXT, "keys of some of these rows, as JSON"),
    validated_at=(_AT, "time of the validation"),
)

HORIZONS = _ops_table(
    "horizons",
    "First day to load of each account and resource; from it on, the ledger must be complete.",
    ("account", "resource"),
    account=(_TEXT, "account label; the fingerprint of the key while the label is unknown"),
    resource=(_TEXT, "collection of the fal API"),
    first_day=(sa.Date(), "first UTC day; every later day that is not loaded is due"),
    is_decided=(_FLAG, "whether FALETL_FIRST_DAYS no longer applies; null in rows of an older faletl"),
)

UNKNOWN_ENDPOINTS = _ops_table(
    "unknown_endpoints",
    "Endpoint ids that fal answered with 404; they are not requested again for seven days.",
    ("account", "resource", "endpoint_id"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    endpoint_id=(_TEXT, "fal's id of the model endpoint"),
    seen_at=(_AT, "when fal last answered 404 for the id"),
)

FAILURES = _ops_table(
    "failures",
    "Windows whose last attempt failed; the row is deleted when the window loads.",
    ("account", "resource", "window_start"),
    run_id=(_TEXT, "run that failed"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window"),
    error=(_TEXT, "class of the error"),
    exit_code=(
        sa.Integer(),
        "exit code of the error: 3 if the window was refused; null in rows of an older faletl",
    ),
    message=(_TEXT, "error message, one sentence"),
    failed_at=(_AT, "time of the failure"),
    data_version=(_COUNT, "version of the raw tables when the window first failed with this error"),
)

ACCOUNTS = _ops_table(
    "accounts",
    "Account labels, with the fal usernames and the keys that each is bound to.",
    ("account",),
    account=(_TEXT, "account label"),
    usernames=(_TEXT, "fal's usernames of the account, as a JSON array, the newest last"),
    key_ids=(_TEXT, "salted SHA-256 of the id of each of its keys, as a JSON array"),
    is_sandbox=(_FLAG, "whether the account is invented by a sandbox"),
    bound_at=(_AT, "when the label was first bound"),
)

HOLDS = _ops_table(
    "holds",
    "Held windows: extracts that are not loaded, because that would remove rows proven before.",
    ("account", "resource", "window_start"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window"),
    load_id=(_TEXT, "id of the newest held extract; the folder of its pages has that name"),
    landing_path=(_TEXT, "folder of the landed pages, below the landing folder"),
    rows_loaded=(_COUNT, "number of loaded rows"),
    rows_extracted=(_COUNT, "number of rows in the held extract"),
    cost_total_loaded=(
        sa.Numeric(PRECISION, SCALE),
        "sum over the loaded rows; null where rows have no cost",
    ),
    cost_total_extracted=(sa.Numeric(PRECISION, SCALE), "sum over the rows of the held extract"),
    rows_digest=(_TEXT, "fingerprint of the loaded rows that the held extract lacks"),
    is_final=(
        _FLAG,
        "whether the window is so old that fal may no longer serve all of it; not extracted again",
    ),
    held_since=(_AT, "start of the first held extract"),
    last_extracted_at=(_AT, "start of the newest held extract"),
    data_version=(_COUNT, "version of the raw tables when the window was first held"),
)

ACCEPTANCES = _ops_table(
    "acceptances",
    "Decisions made with faletl accept: windows that were held, or refused by a contract rule.",
    ("acceptance_id",),
    acceptance_id=(_TEXT, "id of the acceptance"),
    account=(_TEXT, "account label"),
    resource=(_TEXT, "collection of the fal API"),
    window_start=(_AT, "start of the window"),
    load_id=(_TEXT, "id of the extract that was accepted"),
    accepted=(
        _TEXT,
        "what was accepted: held (the held extract), kept (the loaded rows) or refused (refused rows)",
    ),
    rows_digest=(_TEXT, "fingerprint of the missing or refused rows; also valid for later extracts"),
    reason=(_TEXT, "reason given by the person who accepted"),
    rows_before=(_COUNT, "number of rows loaded before"),
    rows_after=(_COUNT, "number of rows in the extract"),
    cost_total_before=(sa.Numeric(PRECISION, SCALE), "sum over the rows loaded before"),
    cost_total_after=(sa.Numeric(PRECISION, SCALE), "sum over the rows of the extract"),
    accepted_by=(_TEXT, "user of the operating system"),
    accepted_at=(_AT, "time of the decision"),
)

ALERTS = _ops_table(
    "alerts",
    "Alerts for people: one row each, resolved when the cause is gone.",
    ("alert_key",),
    alert_key=(_TEXT, "fingerprint that identifies the alert"),
    kind=(_TEXT, "held, refused, locked or runaway"),
    account=(_TEXT, "account label; null where it is not known"),
    subject=(_TEXT, "subject of the alert: a window, a request or the account"),
    detail=(_TEXT, "message for people"),
    first_seen_at=(_AT, "when the alert was raised"),
    announced_at=(_AT, "when the alert was sent; null while it is not"),
    resolved_at=(_AT, "when the cause was gone; null while the alert is open"),
    resolution_announced_at=(_AT, "when its resolution was sent; null while it is not"),
)

BUILDS = _ops_table(
    "builds",
    "Builds of staging, marts and reports that passed their checks.",
    ("build_id",),
    build_id=(_TEXT, "id of the build"),
    run_id=(_TEXT, "run that built"),
    days=(_COUNT, "number of days that were rebuilt"),
    checks=(_COUNT, "number of checks that passed"),
    data_version=(_COUNT, "version of the raw tables that the build is made from"),
    fencing_token=(
        _COUNT,
        "token of the lease under which it was built; the greatest token is the newest build",
    ),
    is_full=(_FLAG, "whether everything was rebuilt, not only the days that changed"),
    models_digest=(_TEXT, "fingerprint of the SQL and seeds that it was made with"),
    started_at=(_AT, "start of the build"),
    finished_at=(_AT, "end of the build"),
    published_at=(_AT, "when the build was published"),
)

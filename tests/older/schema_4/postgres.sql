CREATE SCHEMA marts;
CREATE SCHEMA ops;
CREATE SCHEMA raw;
CREATE SCHEMA reports;
CREATE SCHEMA staging;
CREATE FUNCTION staging.credential_id(api_key_id text, login_username text, label text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN (api_key_id IS NOT NULL) THEN ('key:'::text || api_key_id) WHEN (login_username IS NOT NULL) THEN ('user:'::text || login_username) WHEN ((label IS NULL) OR (label = ANY (ARRAY[''::text, 'None'::text]))) THEN 'none'::text ELSE ('label:'::text || label) END;
CREATE FUNCTION staging.currency_code(currency text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN COALESCE(NULLIF(currency, ''::text), 'XXX'::text);
CREATE FUNCTION staging.proportion(amount numeric, part numeric, whole numeric) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (((sign(amount) * sign(part)) * div((((('2000000000000'::bigint)::numeric * abs(amount)) * abs(part)) + whole), ((2)::numeric * whole))) * 0.000000000001);
CREATE FUNCTION staging.quotient(a numeric, b numeric) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN (b <> (0)::numeric) THEN (((sign(a) * sign(b)) * div(((('2000000000000'::bigint)::numeric * abs(a)) + abs(b)), ((2)::numeric * abs(b)))) * 0.000000000001) ELSE NULL::numeric END;
CREATE FUNCTION staging.utc(instant timestamp with time zone) RETURNS timestamp without time zone
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (instant AT TIME ZONE 'UTC'::text);
CREATE TABLE marts.dim_account (
    account text COLLATE pg_catalog."C",
    first_seen_at timestamp without time zone,
    last_seen_at timestamp without time zone
);
CREATE TABLE marts.dim_credential (
    account text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    kind text COLLATE pg_catalog."C",
    api_key_id text COLLATE pg_catalog."C",
    login_username text COLLATE pg_catalog."C",
    label text COLLATE pg_catalog."C",
    owner text COLLATE pg_catalog."C",
    team text COLLATE pg_catalog."C",
    cost_centre text COLLATE pg_catalog."C",
    first_seen_at timestamp without time zone,
    last_seen_at timestamp without time zone
);
CREATE TABLE marts.dim_date (
    date_day date,
    year integer,
    quarter integer,
    month integer,
    month_start date,
    iso_year integer,
    iso_week integer,
    iso_weekday integer,
    is_weekend boolean
);
CREATE TABLE marts.dim_endpoint (
    endpoint_id text COLLATE pg_catalog."C",
    owner text COLLATE pg_catalog."C",
    family text COLLATE pg_catalog."C",
    display_name text COLLATE pg_catalog."C",
    category text COLLATE pg_catalog."C",
    output_modality text COLLATE pg_catalog."C",
    status text COLLATE pg_catalog."C",
    kind text COLLATE pg_catalog."C",
    first_seen_at timestamp without time zone,
    last_seen_at timestamp without time zone,
    is_in_catalogue boolean
);
CREATE TABLE marts.dim_price (
    account text COLLATE pg_catalog."C",
    endpoint_id text COLLATE pg_catalog."C",
    valid_from timestamp without time zone,
    valid_to timestamp without time zone,
    unit text COLLATE pg_catalog."C",
    unit_price numeric(38,12),
    currency text COLLATE pg_catalog."C",
    previous_unit text COLLATE pg_catalog."C",
    previous_unit_price numeric(38,12),
    previous_currency text COLLATE pg_catalog."C",
    change_ratio numeric(38,12),
    is_current boolean,
    is_stale boolean
);
CREATE TABLE marts.dim_unit (
    unit text COLLATE pg_catalog."C",
    canonical_unit text COLLATE pg_catalog."C",
    family text COLLATE pg_catalog."C",
    base_unit text COLLATE pg_catalog."C",
    factor numeric(38,12)
);
CREATE TABLE marts.fct_billing_event (
    account text COLLATE pg_catalog."C",
    event_hash text COLLATE pg_catalog."C",
    event_ordinal integer,
    requested_at timestamp without time zone,
    usage_date date,
    request_id text COLLATE pg_catalog."C",
    endpoint_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    is_unit_inferred boolean,
    unit_price numeric(38,12),
    percent_discount numeric(38,12),
    currency text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    quantity numeric(38,12),
    cost_subtotal numeric(38,12),
    cost_discount numeric(38,12),
    cost_total numeric(38,12),
    cost_estimate_nano_usd bigint
);
CREATE TABLE marts.fct_credit_balance (
    account text COLLATE pg_catalog."C",
    read_at timestamp without time zone,
    balance_date date,
    balance numeric(38,12),
    currency text COLLATE pg_catalog."C"
);
CREATE TABLE marts.fct_latency (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    p50_prepare_duration numeric(38,12),
    p75_prepare_duration numeric(38,12),
    p90_prepare_duration numeric(38,12),
    p95_prepare_duration numeric(38,12),
    p99_prepare_duration numeric(38,12),
    p25_duration numeric(38,12),
    p50_duration numeric(38,12),
    p75_duration numeric(38,12),
    p90_duration numeric(38,12),
    p95_duration numeric(38,12),
    p99_duration numeric(38,12),
    p50_cold_boot_duration numeric(38,12),
    p75_cold_boot_duration numeric(38,12),
    p90_cold_boot_duration numeric(38,12)
);
CREATE TABLE marts.fct_requests (
    account text COLLATE pg_catalog."C",
    used_at timestamp without time zone,
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    request_count bigint,
    success_count bigint,
    user_error_count bigint,
    error_count bigint,
    startup_error_count bigint,
    connection_error_count bigint,
    timeout_error_count bigint,
    runtime_error_count bigint,
    cold_boot_count bigint,
    total_billable_duration numeric(38,12)
);
CREATE TABLE marts.fct_usage (
    account text COLLATE pg_catalog."C",
    used_at timestamp without time zone,
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    unit_price numeric(38,12),
    percent_discount numeric(38,12),
    currency text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    quantity numeric(38,12),
    cost_subtotal numeric(38,12),
    cost_discount numeric(38,12),
    cost_total numeric(38,12)
);
CREATE TABLE ops.builds (
    build_id text COLLATE pg_catalog."C",
    run_id text COLLATE pg_catalog."C",
    days bigint,
    checks bigint,
    data_version bigint,
    fencing_token bigint,
    is_full boolean,
    models_digest text COLLATE pg_catalog."C",
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    published_at timestamp with time zone
);
CREATE TABLE ops.contract_drift (
    account text COLLATE pg_catalog."C",
    resource text COLLATE pg_catalog."C",
    field text COLLATE pg_catalog."C",
    kind text COLLATE pg_catalog."C",
    sample text COLLATE pg_catalog."C",
    load_id text COLLATE pg_catalog."C",
    first_seen_at timestamp with time zone,
    landing_path text COLLATE pg_catalog."C"
);
CREATE TABLE ops.failures (
    run_id text COLLATE pg_catalog."C",
    account text COLLATE pg_catalog."C",
    resource text COLLATE pg_catalog."C",
    window_start timestamp with time zone,
    error text COLLATE pg_catalog."C",
    message text COLLATE pg_catalog."C",
    failed_at timestamp with time zone
);
CREATE TABLE ops.horizons (
    account text COLLATE pg_catalog."C",
    resource text COLLATE pg_catalog."C",
    first_day date
);
CREATE TABLE ops.loads (
    load_id text COLLATE pg_catalog."C",
    run_id text COLLATE pg_catalog."C",
    account text COLLATE pg_catalog."C",
    resource text COLLATE pg_catalog."C",
    window_start timestamp with time zone,
    window_end timestamp with time zone,
    pages bigint,
    rows bigint,
    cost_total numeric(38,12),
    control_total numeric(38,12),
    digest text COLLATE pg_catalog."C",
    asked_digest text COLLATE pg_catalog."C",
    proof text COLLATE pg_catalog."C",
    dropped_rows bigint,
    quarantined_rows bigint,
    doubtful_rows bigint,
    rounded_amounts bigint,
    fencing_token bigint,
    last_fencing_token bigint,
    landing_path text COLLATE pg_catalog."C",
    last_load_id text COLLATE pg_catalog."C",
    read_at timestamp with time zone,
    last_read_at timestamp with time zone,
    loaded_at timestamp with time zone,
    whole_catalogue_at timestamp with time zone,
    data_version bigint,
    is_current boolean,
    is_provisional boolean,
    is_settled boolean
);
CREATE TABLE ops.quarantine (
    load_id text COLLATE pg_catalog."C",
    run_id text COLLATE pg_catalog."C",
    account text COLLATE pg_catalog."C",
    resource text COLLATE pg_catalog."C",
    window_start timestamp with time zone,
    page integer,
    "row" integer,
    endpoint_id text COLLATE pg_catalog."C",
    reason text COLLATE pg_catalog."C",
    raw_json text COLLATE pg_catalog."C",
    landing_path text COLLATE pg_catalog."C",
    fencing_token bigint,
    seen_at timestamp with time zone,
    resolved_at timestamp with time zone
);
CREATE TABLE ops.restatements (
    load_id text COLLATE pg_catalog."C",
    account text COLLATE pg_catalog."C",
    resource text COLLATE pg_catalog."C",
    window_start timestamp with time zone,
    endpoint_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    currency text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    quantity_before numeric(38,12),
    quantity_after numeric(38,12),
    cost_total_before numeric(38,12),
    cost_total_after numeric(38,12),
    seen_at timestamp with time zone
);
CREATE TABLE ops.unknown_endpoints (
    account text COLLATE pg_catalog."C",
    resource text COLLATE pg_catalog."C",
    endpoint_id text COLLATE pg_catalog."C",
    seen_at timestamp with time zone
);
CREATE TABLE ops.validations (
    load_id text COLLATE pg_catalog."C",
    run_id text COLLATE pg_catalog."C",
    account text COLLATE pg_catalog."C",
    resource text COLLATE pg_catalog."C",
    window_start timestamp with time zone,
    expectation text COLLATE pg_catalog."C",
    severity text COLLATE pg_catalog."C",
    success boolean,
    observed text COLLATE pg_catalog."C",
    unexpected_count bigint,
    sample_keys text COLLATE pg_catalog."C",
    validated_at timestamp with time zone
);
CREATE TABLE ops.warehouse (
    schema_version integer,
    faletl_version text COLLATE pg_catalog."C",
    fencing_token bigint,
    holder text COLLATE pg_catalog."C",
    held_since timestamp with time zone,
    data_version bigint
);
CREATE TABLE raw.analytics (
    _account text COLLATE pg_catalog."C",
    _load_id text COLLATE pg_catalog."C",
    _page integer,
    _row integer,
    timeframe text COLLATE pg_catalog."C",
    bucket timestamp with time zone,
    endpoint_id text COLLATE pg_catalog."C",
    request_count bigint,
    success_count bigint,
    user_error_count bigint,
    error_count bigint,
    startup_error_count bigint,
    connection_error_count bigint,
    timeout_error_count bigint,
    runtime_error_count bigint,
    cold_boot_count bigint,
    total_billable_duration numeric(38,12),
    p50_prepare_duration numeric(38,12),
    p75_prepare_duration numeric(38,12),
    p90_prepare_duration numeric(38,12),
    p50_duration numeric(38,12),
    p75_duration numeric(38,12),
    p90_duration numeric(38,12),
    p95_prepare_duration numeric(38,12),
    p99_prepare_duration numeric(38,12),
    p25_duration numeric(38,12),
    p95_duration numeric(38,12),
    p99_duration numeric(38,12),
    p50_cold_boot_duration numeric(38,12),
    p75_cold_boot_duration numeric(38,12),
    p90_cold_boot_duration numeric(38,12)
);
CREATE TABLE raw.billing_events (
    _account text COLLATE pg_catalog."C",
    _load_id text COLLATE pg_catalog."C",
    _page integer,
    _row integer,
    _hash text COLLATE pg_catalog."C",
    _ordinal integer,
    request_id text COLLATE pg_catalog."C",
    endpoint_id text COLLATE pg_catalog."C",
    "timestamp" timestamp with time zone,
    quantity numeric(38,12),
    output_units numeric(38,12),
    unit text COLLATE pg_catalog."C",
    unit_price numeric(38,12),
    percent_discount numeric(38,12),
    cost_subtotal numeric(38,12),
    cost_discount numeric(38,12),
    cost_total numeric(38,12),
    cost_estimate_nano_usd bigint,
    auth_method text COLLATE pg_catalog."C",
    auth_detail text COLLATE pg_catalog."C",
    api_key_id text COLLATE pg_catalog."C",
    login_username text COLLATE pg_catalog."C"
);
CREATE TABLE raw.credits (
    _account text COLLATE pg_catalog."C",
    _load_id text COLLATE pg_catalog."C",
    _page integer,
    _row integer,
    _snapshot_at timestamp with time zone,
    username text COLLATE pg_catalog."C",
    current_balance numeric(38,12),
    currency text COLLATE pg_catalog."C"
);
CREATE TABLE raw.models (
    _account text COLLATE pg_catalog."C",
    _load_id text COLLATE pg_catalog."C",
    _page integer,
    _row integer,
    _snapshot_at timestamp with time zone,
    endpoint_id text COLLATE pg_catalog."C",
    display_name text COLLATE pg_catalog."C",
    category text COLLATE pg_catalog."C",
    description text COLLATE pg_catalog."C",
    status text COLLATE pg_catalog."C",
    tags text COLLATE pg_catalog."C",
    updated_at text COLLATE pg_catalog."C",
    date text COLLATE pg_catalog."C",
    model_url text COLLATE pg_catalog."C",
    license_type text COLLATE pg_catalog."C",
    group_key text COLLATE pg_catalog."C",
    group_label text COLLATE pg_catalog."C",
    kind text COLLATE pg_catalog."C"
);
CREATE TABLE raw.prices (
    _account text COLLATE pg_catalog."C",
    _load_id text COLLATE pg_catalog."C",
    _page integer,
    _row integer,
    _snapshot_at timestamp with time zone,
    endpoint_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    unit_price numeric(38,12),
    currency text COLLATE pg_catalog."C"
);
CREATE TABLE raw.usage (
    _account text COLLATE pg_catalog."C",
    _load_id text COLLATE pg_catalog."C",
    _page integer,
    _row integer,
    bucket timestamp with time zone,
    endpoint_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    quantity numeric(38,12),
    unit_price numeric(38,12),
    percent_discount numeric(38,12),
    cost_subtotal numeric(38,12),
    cost_discount numeric(38,12),
    cost_total numeric(38,12),
    cost numeric(38,12),
    currency text COLLATE pg_catalog."C",
    auth_method text COLLATE pg_catalog."C",
    auth_detail text COLLATE pg_catalog."C",
    api_key_id text COLLATE pg_catalog."C",
    login_username text COLLATE pg_catalog."C"
);
CREATE TABLE reports.rpt_billing_rules (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    rule text COLLATE pg_catalog."C",
    success_count bigint,
    promised numeric(38,12),
    observed numeric(38,12),
    margin numeric(38,12),
    ratio numeric(38,12),
    status text COLLATE pg_catalog."C"
);
CREATE TABLE reports.rpt_credit_runway (
    account text COLLATE pg_catalog."C",
    balance_date date,
    currency text COLLATE pg_catalog."C",
    current_balance numeric(38,12),
    burn_7_days numeric(38,12),
    burn_30_days numeric(38,12),
    days_left numeric(38,12),
    empty_on date
);
CREATE TABLE reports.rpt_price_changes (
    account text COLLATE pg_catalog."C",
    endpoint_id text COLLATE pg_catalog."C",
    display_name text COLLATE pg_catalog."C",
    changed_at timestamp without time zone,
    previous_unit text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    previous_currency text COLLATE pg_catalog."C",
    currency text COLLATE pg_catalog."C",
    previous_unit_price numeric(38,12),
    unit_price numeric(38,12),
    change_ratio numeric(38,12),
    spend_last_30_days numeric(38,12),
    spend_30_days_before numeric(38,12),
    is_current boolean
);
CREATE TABLE reports.rpt_reconciliation (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    currency text COLLATE pg_catalog."C",
    usage_cost_total numeric(38,12),
    events_cost_total numeric(38,12),
    difference numeric(38,12),
    charge_count bigint,
    status text COLLATE pg_catalog."C",
    reason text COLLATE pg_catalog."C"
);
CREATE TABLE reports.rpt_runaway_requests (
    account text COLLATE pg_catalog."C",
    event_hash text COLLATE pg_catalog."C",
    event_ordinal integer,
    requested_at timestamp without time zone,
    usage_date date,
    request_id text COLLATE pg_catalog."C",
    endpoint_id text COLLATE pg_catalog."C",
    display_name text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    unit_price numeric(38,12),
    quantity numeric(38,12),
    currency text COLLATE pg_catalog."C",
    cost_total numeric(38,12),
    usual_cost numeric(38,12),
    times_usual numeric(38,12),
    history_days bigint,
    charges_known bigint,
    reason text COLLATE pg_catalog."C",
    load_id text COLLATE pg_catalog."C"
);
CREATE TABLE reports.rpt_spend_by_credential (
    account text COLLATE pg_catalog."C",
    usage_date date,
    credential_id text COLLATE pg_catalog."C",
    credential_label text COLLATE pg_catalog."C",
    kind text COLLATE pg_catalog."C",
    owner text COLLATE pg_catalog."C",
    team text COLLATE pg_catalog."C",
    cost_centre text COLLATE pg_catalog."C",
    endpoint_id text COLLATE pg_catalog."C",
    display_name text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    currency text COLLATE pg_catalog."C",
    quantity numeric(38,12),
    cost_subtotal numeric(38,12),
    cost_discount numeric(38,12),
    cost_total numeric(38,12)
);
CREATE TABLE reports.rpt_spend_daily (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    display_name text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    canonical_unit text COLLATE pg_catalog."C",
    currency text COLLATE pg_catalog."C",
    quantity numeric(38,12),
    cost_subtotal numeric(38,12),
    cost_discount numeric(38,12),
    cost_total numeric(38,12),
    base_unit text COLLATE pg_catalog."C",
    cost_per_base_unit numeric(38,12),
    effective_unit_price numeric(38,12),
    list_unit_price numeric(38,12),
    list_unit text COLLATE pg_catalog."C",
    price_difference numeric(38,12),
    price_comparison text COLLATE pg_catalog."C",
    is_list_price_assumed boolean
);
CREATE TABLE reports.rpt_spend_monthly (
    account text COLLATE pg_catalog."C",
    usage_month date,
    endpoint_id text COLLATE pg_catalog."C",
    display_name text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    currency text COLLATE pg_catalog."C",
    quantity numeric(38,12),
    cost_subtotal numeric(38,12),
    cost_discount numeric(38,12),
    cost_total numeric(38,12),
    previous_cost_total numeric(38,12),
    cost_change numeric(38,12),
    change_from_price numeric(38,12),
    change_from_volume numeric(38,12),
    change_from_new_or_gone numeric(38,12)
);
CREATE TABLE reports.rpt_unit_economics (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    display_name text COLLATE pg_catalog."C",
    currency text COLLATE pg_catalog."C",
    cost_total numeric(38,12),
    request_count bigint,
    success_count bigint,
    user_error_count bigint,
    error_count bigint,
    cost_per_request numeric(38,12),
    cost_per_success numeric(38,12),
    success_rate numeric(38,12),
    user_error_rate numeric(38,12),
    error_rate numeric(38,12),
    p50_duration numeric(38,12),
    p95_duration numeric(38,12)
);
CREATE TABLE staging.int_billing_events_daily (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    credential_label text COLLATE pg_catalog."C",
    api_key_id text COLLATE pg_catalog."C",
    login_username text COLLATE pg_catalog."C",
    first_requested_at timestamp without time zone,
    last_requested_at timestamp without time zone,
    charge_count bigint,
    cost_total numeric(38,12)
);
CREATE TABLE staging.int_charges_daily (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    charge_count bigint,
    charged_request_count bigint,
    edge_request_count bigint,
    charges_without_unit bigint,
    repeated_charge_count bigint,
    cost_total numeric(38,12),
    median_cost numeric(38,12),
    median_cost_of_others numeric(38,12)
);
CREATE TABLE staging.int_charges_large (
    account text COLLATE pg_catalog."C",
    event_hash text COLLATE pg_catalog."C",
    event_ordinal integer,
    requested_at timestamp without time zone,
    usage_date date,
    request_id text COLLATE pg_catalog."C",
    endpoint_id text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    unit_price numeric(38,12),
    quantity numeric(38,12),
    currency text COLLATE pg_catalog."C",
    cost_total numeric(38,12),
    load_id text COLLATE pg_catalog."C"
);
CREATE TABLE staging.int_requests_daily (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    first_requested_at timestamp without time zone,
    last_requested_at timestamp without time zone,
    request_count bigint,
    success_count bigint,
    user_error_count bigint,
    error_count bigint,
    total_billable_duration numeric(38,12)
);
CREATE TABLE staging.int_usage_daily (
    account text COLLATE pg_catalog."C",
    usage_date date,
    endpoint_id text COLLATE pg_catalog."C",
    unit text COLLATE pg_catalog."C",
    currency text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    credential_label text COLLATE pg_catalog."C",
    api_key_id text COLLATE pg_catalog."C",
    login_username text COLLATE pg_catalog."C",
    first_used_at timestamp without time zone,
    last_used_at timestamp without time zone,
    quantity numeric(38,12),
    cost_subtotal numeric(38,12),
    cost_discount numeric(38,12),
    cost_total numeric(38,12)
);
CREATE TABLE staging.seed_credential_owner (
    account text COLLATE pg_catalog."C",
    credential_id text COLLATE pg_catalog."C",
    owner text COLLATE pg_catalog."C",
    team text COLLATE pg_catalog."C",
    cost_centre text COLLATE pg_catalog."C"
);
CREATE TABLE staging.seed_threshold (
    name text COLLATE pg_catalog."C",
    value numeric(38,12)
);
CREATE TABLE staging.seed_unit (
    unit text COLLATE pg_catalog."C",
    canonical_unit text COLLATE pg_catalog."C",
    family text COLLATE pg_catalog."C",
    base_unit text COLLATE pg_catalog."C",
    factor numeric(38,12)
);
CREATE VIEW staging.stg_fal__analytics AS
 SELECT model.account,
    model.timeframe,
    model.bucket_at,
    model.usage_date,
    model.endpoint_id,
    model.request_count,
    model.success_count,
    model.user_error_count,
    model.error_count,
    model.startup_error_count,
    model.connection_error_count,
    model.timeout_error_count,
    model.runtime_error_count,
    model.cold_boot_count,
    model.total_billable_duration,
    model.p50_prepare_duration,
    model.p75_prepare_duration,
    model.p90_prepare_duration,
    model.p95_prepare_duration,
    model.p99_prepare_duration,
    model.p25_duration,
    model.p50_duration,
    model.p75_duration,
    model.p90_duration,
    model.p95_duration,
    model.p99_duration,
    model.p50_cold_boot_duration,
    model.p75_cold_boot_duration,
    model.p90_cold_boot_duration,
    model.load_id
   FROM ( SELECT analytics._account AS account,
            analytics.timeframe,
            staging.utc(analytics.bucket) AS bucket_at,
            (staging.utc(analytics.bucket))::date AS usage_date,
            analytics.endpoint_id,
            analytics.request_count,
            analytics.success_count,
            analytics.user_error_count,
            analytics.error_count,
            analytics.startup_error_count,
            analytics.connection_error_count,
            analytics.timeout_error_count,
            analytics.runtime_error_count,
            analytics.cold_boot_count,
            analytics.total_billable_duration,
            analytics.p50_prepare_duration,
            analytics.p75_prepare_duration,
            analytics.p90_prepare_duration,
            analytics.p95_prepare_duration,
            analytics.p99_prepare_duration,
            analytics.p25_duration,
            analytics.p50_duration,
            analytics.p75_duration,
            analytics.p90_duration,
            analytics.p95_duration,
            analytics.p99_duration,
            analytics.p50_cold_boot_duration,
            analytics.p75_cold_boot_duration,
            analytics.p90_cold_boot_duration,
            analytics._load_id AS load_id
           FROM raw.analytics) model;
CREATE VIEW staging.stg_fal__billing_events AS
 SELECT model.account,
    model.event_hash,
    model.event_ordinal,
    model.requested_at,
    model.usage_date,
    model.request_id,
    model.endpoint_id,
    model.unit,
    model.unit_price,
    model.percent_discount,
    model.currency,
    model.credential_id,
    model.credential_label,
    model.api_key_id,
    model.login_username,
    model.quantity,
    model.cost_subtotal,
    model.cost_discount,
    model.cost_total,
    model.cost_estimate_nano_usd,
    model.load_id
   FROM ( WITH events AS (
                 SELECT billing_events._account,
                    billing_events._load_id,
                    billing_events._page,
                    billing_events._row,
                    billing_events._hash,
                    billing_events._ordinal,
                    billing_events.request_id,
                    billing_events.endpoint_id,
                    billing_events."timestamp",
                    billing_events.quantity,
                    billing_events.output_units,
                    billing_events.unit,
                    billing_events.unit_price,
                    billing_events.percent_discount,
                    billing_events.cost_subtotal,
                    billing_events.cost_discount,
                    billing_events.cost_total,
                    billing_events.cost_estimate_nano_usd,
                    billing_events.auth_method,
                    billing_events.auth_detail,
                    billing_events.api_key_id,
                    billing_events.login_username,
                    COALESCE(billing_events.auth_detail, billing_events.auth_method) AS auth_label
                   FROM raw.billing_events
                )
         SELECT events._account AS account,
            events._hash AS event_hash,
            events._ordinal AS event_ordinal,
            staging.utc(events."timestamp") AS requested_at,
            (staging.utc(events."timestamp"))::date AS usage_date,
            events.request_id,
            events.endpoint_id,
            events.unit,
            events.unit_price,
            events.percent_discount,
            'USD'::text AS currency,
            staging.credential_id(events.api_key_id, events.login_username, events.auth_label) AS credential_id,
            events.auth_label AS credential_label,
            events.api_key_id,
            events.login_username,
            events.quantity,
            events.cost_subtotal,
            events.cost_discount,
            events.cost_total,
            events.cost_estimate_nano_usd,
            events._load_id AS load_id
           FROM events) model;
CREATE VIEW staging.stg_fal__credits AS
 SELECT model.account,
    model.read_at,
    model.current_balance,
    model.currency,
    model.load_id
   FROM ( SELECT credits._account AS account,
            staging.utc(credits._snapshot_at) AS read_at,
            credits.current_balance,
            staging.currency_code(credits.currency) AS currency,
            credits._load_id AS load_id
           FROM raw.credits) model;
CREATE VIEW staging.stg_fal__models AS
 SELECT model.account,
    model.snapshot_at,
    model.endpoint_id,
    model.display_name,
    model.category,
    model.description,
    model.status,
    model.group_key,
    model.group_label,
    model.kind,
    model.license_type,
    model.model_url,
    model.load_id
   FROM ( SELECT models._account AS account,
            staging.utc(models._snapshot_at) AS snapshot_at,
            models.endpoint_id,
            models.display_name,
            models.category,
            models.description,
            models.status,
            models.group_key,
            models.group_label,
            models.kind,
            models.license_type,
            models.model_url,
            models._load_id AS load_id
           FROM raw.models) model;
CREATE VIEW staging.stg_fal__prices AS
 SELECT model.account,
    model.snapshot_at,
    model.endpoint_id,
    model.unit,
    model.unit_price,
    model.currency,
    model.load_id
   FROM ( SELECT prices._account AS account,
            staging.utc(prices._snapshot_at) AS snapshot_at,
            prices.endpoint_id,
            prices.unit,
            prices.unit_price,
            staging.currency_code(prices.currency) AS currency,
            prices._load_id AS load_id
           FROM raw.prices) model;
CREATE VIEW staging.stg_fal__usage AS
 SELECT model.account,
    model.used_at,
    model.usage_date,
    model.endpoint_id,
    model.unit,
    model.unit_price,
    model.percent_discount,
    model.currency,
    model.credential_id,
    model.credential_label,
    model.api_key_id,
    model.login_username,
    model.quantity,
    model.cost_subtotal,
    model.cost_discount,
    model.cost_total,
    model.load_id
   FROM ( WITH usage_rows AS (
                 SELECT usage._account,
                    usage._load_id,
                    usage._page,
                    usage._row,
                    usage.bucket,
                    usage.endpoint_id,
                    usage.unit,
                    usage.quantity,
                    usage.unit_price,
                    usage.percent_discount,
                    usage.cost_subtotal,
                    usage.cost_discount,
                    usage.cost_total,
                    usage.cost,
                    usage.currency,
                    usage.auth_method,
                    usage.auth_detail,
                    usage.api_key_id,
                    usage.login_username,
                    COALESCE(usage.auth_detail, usage.auth_method) AS auth_label
                   FROM raw.usage
                )
         SELECT usage_rows._account AS account,
            staging.utc(usage_rows.bucket) AS used_at,
            (staging.utc(usage_rows.bucket))::date AS usage_date,
            usage_rows.endpoint_id,
            usage_rows.unit,
            usage_rows.unit_price,
            usage_rows.percent_discount,
            staging.currency_code(usage_rows.currency) AS currency,
            staging.credential_id(usage_rows.api_key_id, usage_rows.login_username, usage_rows.auth_label) AS credential_id,
            usage_rows.auth_label AS credential_label,
            usage_rows.api_key_id,
            usage_rows.login_username,
            usage_rows.quantity,
            usage_rows.cost_subtotal,
            usage_rows.cost_discount,
            usage_rows.cost_total,
            usage_rows._load_id AS load_id
           FROM usage_rows) model;
CREATE INDEX fct_billing_event_usage_date_idx ON marts.fct_billing_event USING btree (usage_date);
CREATE INDEX fct_latency_usage_date_idx ON marts.fct_latency USING btree (usage_date);
CREATE INDEX fct_requests_usage_date_idx ON marts.fct_requests USING btree (usage_date);
CREATE INDEX fct_usage_usage_date_idx ON marts.fct_usage USING btree (usage_date);
CREATE INDEX analytics_bucket ON raw.analytics USING btree (bucket);
CREATE INDEX billing_events_timestamp ON raw.billing_events USING btree ("timestamp");
CREATE INDEX credits_snapshot_at ON raw.credits USING btree (_snapshot_at);
CREATE INDEX models_snapshot_at ON raw.models USING btree (_snapshot_at);
CREATE INDEX prices_snapshot_at ON raw.prices USING btree (_snapshot_at);
CREATE INDEX usage_bucket ON raw.usage USING btree (bucket);
CREATE INDEX rpt_billing_rules_usage_date_idx ON reports.rpt_billing_rules USING btree (usage_date);
CREATE INDEX rpt_reconciliation_usage_date_idx ON reports.rpt_reconciliation USING btree (usage_date);
CREATE INDEX rpt_spend_by_credential_usage_date_idx ON reports.rpt_spend_by_credential USING btree (usage_date);
CREATE INDEX rpt_spend_daily_usage_date_idx ON reports.rpt_spend_daily USING btree (usage_date);
CREATE INDEX int_billing_events_daily_usage_date_idx ON staging.int_billing_events_daily USING btree (usage_date);
CREATE INDEX int_charges_daily_usage_date_idx ON staging.int_charges_daily USING btree (usage_date);
CREATE INDEX int_charges_large_usage_date_idx ON staging.int_charges_large USING btree (usage_date);
CREATE INDEX int_requests_daily_usage_date_idx ON staging.int_requests_daily USING btree (usage_date);
CREATE INDEX int_usage_daily_usage_date_idx ON staging.int_usage_daily USING btree (usage_date);

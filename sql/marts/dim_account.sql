-- fal accounts whose spend is in this warehouse.
-- grain: account
with

sightings as (
    select
        account,
        first_used_at as first_seen_at,
        last_used_at as last_seen_at
    from staging.int_usage_daily
    union all
    select
        account,
        first_requested_at as first_seen_at,
        last_requested_at as last_seen_at
    from staging.int_billing_events_daily
    union all
    select
        account,
        first_requested_at as first_seen_at,
        last_requested_at as last_seen_at
    from staging.int_requests_daily
    union all
    select
        account,
        read_at as first_seen_at,
        read_at as last_seen_at
    from staging.stg_fal__credits
    union all
    select
        account,
        snapshot_at as first_seen_at,
        snapshot_at as last_seen_at
    from staging.stg_fal__models
    union all
    select
        account,
        snapshot_at as first_seen_at,
        snapshot_at as last_seen_at
    from staging.stg_fal__prices
)

select
    account,
    min(first_seen_at) as first_seen_at,  -- oldest usage, charge, request, balance or snapshot, UTC
    max(last_seen_at) as last_seen_at  -- newest usage, charge, request, balance or snapshot, UTC
from sightings
group by account

-- Charges per day, endpoint, unit and credential: what dimensions and reports read instead of events.
-- grain: account, usage_date, endpoint_id, unit, credential_id
-- days: usage_date
with

-- By label first: a renamed key has two on one day, and its newest is to be told.
labelled as (
    select
        account,
        usage_date,
        endpoint_id,
        coalesce(unit, 'unknown') as unit,
        credential_id,
        credential_label,
        max(api_key_id) as api_key_id,
        max(login_username) as login_username,
        min(requested_at) as first_requested_at,
        max(requested_at) as last_requested_at,
        count(*) as charge_count,
        sum(cost_total) as cost_total
    from staging.stg_fal__billing_events
    group by account, usage_date, endpoint_id, coalesce(unit, 'unknown'), credential_id, credential_label
),

ranked as (
    select
        *,
        row_number() over (
            partition by account, usage_date, endpoint_id, unit, credential_id
            order by last_requested_at desc, credential_label desc nulls last
        ) as recency
    from labelled
)

select
    account,
    usage_date,
    endpoint_id,
    unit,  -- billing unit as fal writes it; unknown where it tells none
    credential_id,
    max(case when recency = 1 then credential_label end) as credential_label,  -- newest name on that day
    max(api_key_id) as api_key_id,
    max(login_username) as login_username,
    min(first_requested_at) as first_requested_at,  -- first charge, UTC
    max(last_requested_at) as last_requested_at,  -- last charge, UTC
    cast(sum(charge_count) as bigint) as charge_count,  -- charges
    sum(cost_total) as cost_total
from ranked
group by account, usage_date, endpoint_id, unit, credential_id

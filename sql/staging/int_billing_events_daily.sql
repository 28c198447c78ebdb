-- Charges per day, endpoint, unit and credential. Dimensions and reports use these sums instead of single charges.
-- grain: account, usage_date, endpoint_id, unit, credential_id
-- days: usage_date
with

-- Grouped by label first: a key renamed during the day has two labels, and its newest label is shown.
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
    unit,  -- billing unit as fal writes it; 'unknown' where fal gives none
    credential_id,
    max(case when recency = 1 then credential_label end) as credential_label,  -- newest label on that day
    max(api_key_id) as api_key_id,
    max(login_username) as login_username,
    min(first_requested_at) as first_requested_at,  -- time of the day's first charge, UTC
    max(last_requested_at) as last_requested_at,  -- time of the day's last charge, UTC
    cast(sum(charge_count) as bigint) as charge_count,  -- number of charges
    sum(cost_total) as cost_total
from ranked
group by account, usage_date, endpoint_id, unit, credential_id

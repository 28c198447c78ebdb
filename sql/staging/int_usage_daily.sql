-- Usage per day, endpoint, unit and credential. Dimensions and reports use these sums instead of single hours.
-- grain: account, usage_date, endpoint_id, unit, currency, credential_id
-- days: usage_date
with

-- Grouped by label first: a key renamed during the day has two labels, and its newest label is shown.
labelled as (
    select
        account,
        usage_date,
        endpoint_id,
        unit,
        currency,
        credential_id,
        credential_label,
        max(api_key_id) as api_key_id,
        max(login_username) as login_username,
        min(used_at) as first_used_at,
        max(used_at) as last_used_at,
        sum(quantity) as quantity,
        case when count(cost_subtotal) = count(*) then sum(cost_subtotal) end as cost_subtotal,
        case when count(cost_discount) = count(*) then sum(cost_discount) end as cost_discount,
        sum(cost_total) as cost_total
    from staging.stg_fal__usage
    group by account, usage_date, endpoint_id, unit, currency, credential_id, credential_label
),

ranked as (
    select
        *,
        row_number() over (
            partition by account, usage_date, endpoint_id, unit, currency, credential_id
            order by last_used_at desc, credential_label desc nulls last
        ) as recency
    from labelled
)

select
    account,
    usage_date,
    endpoint_id,
    unit,
    currency,
    credential_id,
    max(case when recency = 1 then credential_label end) as credential_label,  -- newest label on that day
    max(api_key_id) as api_key_id,
    max(login_username) as login_username,
    min(first_used_at) as first_used_at,  -- start of the day's first hour of use, UTC
    max(last_used_at) as last_used_at,  -- start of the day's last hour of use, UTC
    sum(quantity) as quantity,
    case when count(cost_subtotal) = count(*) then sum(cost_subtotal) end as cost_subtotal,
    case when count(cost_discount) = count(*) then sum(cost_discount) end as cost_discount,
    sum(cost_total) as cost_total
from ranked
group by account, usage_date, endpoint_id, unit, currency, credential_id

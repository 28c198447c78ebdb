-- What was used and charged, per hour: every sum of spend comes from this fact. Model APIs only.
-- grain: account, used_at, endpoint_id, unit, unit_price, percent_discount, currency, credential_id
-- days: usage_date
select
    account,
    used_at,
    usage_date,
    endpoint_id,
    unit,
    unit_price,
    percent_discount,
    currency,
    credential_id,
    sum(quantity) as quantity,
    case when count(cost_subtotal) = count(*) then sum(cost_subtotal) end as cost_subtotal,
    case when count(cost_discount) = count(*) then sum(cost_discount) end as cost_discount,
    sum(cost_total) as cost_total
from staging.stg_fal__usage
group by
    account, used_at, usage_date, endpoint_id, unit, unit_price, percent_discount, currency, credential_id

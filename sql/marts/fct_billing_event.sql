-- Every single charge. fal gives charges no id; a hash and a number identify each. Model APIs only.
-- grain: account, event_hash, event_ordinal
-- days: usage_date, row by row
with

events as (
    select * from staging.stg_fal__billing_events
),

-- The unit of charges for which fal gives none: the unit of the day's usage at the same price, if there is only one.
priced_units as (
    select
        account,
        usage_date,
        endpoint_id,
        unit_price,
        min(unit) as unit
    from staging.stg_fal__usage
    group by account, usage_date, endpoint_id, unit_price
    having count(distinct unit) = 1
)

select
    events.account,
    events.event_hash,
    events.event_ordinal,
    events.requested_at,
    events.usage_date,
    events.request_id,
    events.endpoint_id,
    coalesce(events.unit, priced_units.unit, 'unknown') as unit,  -- as billed; else taken from usage; else 'unknown'
    events.unit is null as is_unit_inferred,  -- whether fal gave no unit for the charge
    events.unit_price,
    events.percent_discount,
    events.currency,  -- always USD: billing events are in US dollars
    events.credential_id,
    events.quantity,  -- number of units charged; null where fal gives none
    events.cost_subtotal,
    events.cost_discount,
    events.cost_total,  -- what fal charged, after the discount
    events.cost_estimate_nano_usd
from events
left join priced_units
    on
        events.account = priced_units.account
        and events.usage_date = priced_units.usage_date
        and events.endpoint_id = priced_units.endpoint_id
        and events.unit_price = priced_units.unit_price

-- Billing units exactly as fal writes them, with what they mean where the unit table knows.
-- grain: unit
with

units as (
    select unit from staging.int_usage_daily
    union
    select unit from staging.int_billing_events_daily
    union
    select unit from staging.stg_fal__prices
)

select
    units.unit,  -- billing unit, exactly as fal writes it
    coalesce(known.canonical_unit, units.unit) as canonical_unit,  -- one spelling; as billed when unknown
    coalesce(known.family, 'other') as family,  -- image, pixel, time, text, token, compute, request, other
    known.base_unit,  -- what a quantity can be counted in; null when unknown
    known.factor  -- base units in one unit
from units
left join staging.seed_unit as known
    on lower(trim(units.unit)) = known.unit

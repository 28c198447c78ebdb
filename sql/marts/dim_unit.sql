-- Billing units exactly as fal writes them, with their meaning where the table of units has it.
-- grain: unit
with

units as (
    select unit from staging.int_usage_daily
    union
    select unit from staging.int_billing_events_daily
    union
    select unit from staging.stg_fal__prices
),

-- A number in front of a unit is a factor. A line of the table of units for the whole text takes precedence.
counted as (
    select
        unit,
        lower(trim(unit)) as spelled,
        unit_count(unit) as unit_count,
        unit_name(unit) as unit_name
    from units
)

select
    counted.unit,  -- billing unit, exactly as fal writes it
    case
        when known.unit is not null then known.canonical_unit
        when named.unit is null then counted.unit
        when counted.unit_count = 1 then named.canonical_unit
        else cast(counted.unit_count as varchar) || ' ' || named.canonical_unit || 's'
    end as canonical_unit,  -- the same spelling for all variants of a unit; as billed where the unit is unknown
    coalesce(known.family, named.family, 'other') as family,  /* image, pixel, time, text, token,
    compute, request or other */
    coalesce(known.base_unit, named.base_unit) as base_unit,  -- unit to compare quantities in; null where unknown
    coalesce(known.factor, counted.unit_count * named.factor) as factor  -- base units in one billing unit
from counted
left join staging.seed_unit as known
    on counted.spelled = known.unit
left join staging.seed_unit as named
    on known.unit is null and counted.unit_name = named.unit

-- Calendar: every day of the years in which something was used or extracted.
-- grain: date_day
with recursive

seen as (
    select usage_date as seen_at from staging.int_usage_daily
    union all
    select usage_date as seen_at from staging.int_billing_events_daily
    union all
    select usage_date as seen_at from staging.int_requests_daily
    union all
    select cast(snapshot_at as date) as seen_at from staging.stg_fal__prices
    union all
    select cast(read_at as date) as seen_at from staging.stg_fal__credits
),

years as (
    select
        cast(date_trunc('year', min(seen_at)) as date) as first_day,
        cast(date_trunc('year', max(seen_at)) + interval '1 year' as date) as end_day
    from seen
),

days as (
    select
        first_day as date_day,
        end_day
    from years
    where first_day is not null
    union all
    select
        cast(date_day + interval '1 day' as date) as date_day,
        end_day
    from days
    where date_day + interval '1 day' < end_day
)

select
    date_day,  -- the UTC day
    cast(extract(year from date_day) as integer) as year,  -- calendar year
    cast(extract(quarter from date_day) as integer) as quarter,  -- calendar quarter, 1 to 4
    cast(extract(month from date_day) as integer) as month,  -- calendar month, 1 to 12
    cast(date_trunc('month', date_day) as date) as month_start,  -- first day of the month
    cast(extract(isoyear from date_day) as integer) as iso_year,  -- year of the ISO week
    cast(extract(week from date_day) as integer) as iso_week,  -- number of the ISO week, 1 to 53
    cast(extract(isodow from date_day) as integer) as iso_weekday,  -- weekday, from 1 for Monday to 7 for Sunday
    extract(isodow from date_day) in (6, 7) as is_weekend  -- true on Saturday and Sunday
from days

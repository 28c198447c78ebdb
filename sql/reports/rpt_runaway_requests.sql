-- Runaway charges: charges far above the history of their endpoint, to review before invoicing. Model APIs only.
-- grain: account, event_hash, event_ordinal
with

thresholds as (
    select
        max(case when name = 'runaway_factor' then value end) as factor,
        max(case when name = 'runaway_alone' then value end) as alone
    from staging.seed_threshold
),

charge_days as (
    select
        *,
        row_number() over (partition by account, endpoint_id order by usage_date) as day_number
    from staging.int_charges_daily
),

large_days as (
    select distinct
        account,
        endpoint_id,
        usage_date
    from staging.int_charges_large
),

days as (
    select charge_days.*
    from charge_days
    inner join large_days
        on
            charge_days.account = large_days.account
            and charge_days.endpoint_id = large_days.endpoint_id
            and charge_days.usage_date = large_days.usage_date
),

histories as (
    select
        days.account,
        days.endpoint_id,
        days.usage_date,
        percentile_disc(0.5) within group (order by earlier.median_cost) as usual_cost,
        count(*) as history_days,
        cast(sum(earlier.charge_count) as bigint) as charges_known
    from days
    inner join charge_days as earlier
        on
            days.account = earlier.account
            and days.endpoint_id = earlier.endpoint_id
            and days.day_number > earlier.day_number
            and days.day_number - 30 <= earlier.day_number
    group by days.account, days.endpoint_id, days.usage_date
),

known as (
    select
        charges.*,
        coalesce(histories.history_days, 0) as history_days,
        coalesce(histories.charges_known, days.charge_count - 1) as charges_known,
        coalesce(histories.usual_cost, days.median_cost_of_others) as usual_cost
    from staging.int_charges_large as charges
    inner join days
        on
            charges.account = days.account
            and charges.endpoint_id = days.endpoint_id
            and charges.usage_date = days.usage_date
    left join histories
        on
            charges.account = histories.account
            and charges.endpoint_id = histories.endpoint_id
            and charges.usage_date = histories.usage_date
),

measured as (
    select
        *,
        quotient(cost_total, usual_cost) as times_usual
    from known
)

select
    measured.account,
    measured.event_hash,
    measured.event_ordinal,
    measured.requested_at,
    measured.usage_date,
    measured.request_id,
    measured.endpoint_id,
    endpoints.display_name,
    measured.credential_id,
    measured.unit,
    measured.unit_price,
    measured.quantity,
    measured.currency,
    measured.cost_total,
    measured.usual_cost,  /* usual cost of one charge of the endpoint: the median of the daily medians of history_days;
    without such days, the median of the day's other charges; null where there are none */
    measured.times_usual,  /* cost_total / usual_cost; null where the usual cost is unknown or zero, or the quotient is
    10^26 or more */
    measured.history_days,  -- number of earlier days with charges of the endpoint that were compared, at most 30
    measured.charges_known,  -- number of charges from which usual_cost was computed
    case
        when measured.usual_cost is null then 'no history'
        when measured.history_days = 0 then 'far above its day'
        else 'far above earlier days'
    end as reason,  /* why the charge is listed: far above earlier days, far above its day (the day's other charges), or
    no history */
    measured.load_id
from measured
cross join thresholds
left join marts.dim_endpoint as endpoints
    on measured.endpoint_id = endpoints.endpoint_id
where
    measured.times_usual >= thresholds.factor
    or measured.usual_cost = 0
    or (measured.times_usual is null and measured.usual_cost > 0)
    or (measured.usual_cost is null and measured.cost_total >= thresholds.alone)

-- Charges per day and endpoint: of how many requests, and what one usually costs.
-- grain: account, usage_date, endpoint_id
-- days: usage_date, one at a time; telling requests apart takes memory for each
with

charges as (
    select
        account,
        usage_date,
        endpoint_id,
        count(*) as charge_count,
        count(distinct request_id) as charged_request_count,
        count(distinct request_id) filter (
            where cast(requested_at as time) < time '00:10:00'
            or cast(requested_at as time) >= time '23:50:00'
        ) as edge_request_count,
        count(*) - count(unit) as charges_without_unit,
        count(case when event_ordinal > 1 then 1 end) as repeated_charge_count,
        sum(cost_total) as cost_total
    from staging.stg_fal__billing_events
    group by account, usage_date, endpoint_id
),

-- Most charges of an endpoint cost one of a few amounts: this stays small where a median of all would not.
costs as (
    select
        account,
        usage_date,
        endpoint_id,
        cost_total,
        count(*) as charge_count
    from staging.stg_fal__billing_events
    group by account, usage_date, endpoint_id, cost_total
),

running as (
    select
        *,
        sum(charge_count) over (
            partition by account, usage_date, endpoint_id order by cost_total
        ) as charges_so_far,
        sum(charge_count) over (partition by account, usage_date, endpoint_id) as charges_in_all
    from costs
),

medians as (
    select
        account,
        usage_date,
        endpoint_id,
        min(case when 2 * charges_so_far >= charges_in_all then cost_total end) as median_cost,
        min(
            case when charges_in_all > 1 and 2 * charges_so_far >= charges_in_all - 1 then cost_total end
        ) as median_cost_of_others
    from running
    group by account, usage_date, endpoint_id
)

select
    charges.account,
    charges.usage_date,
    charges.endpoint_id,
    charges.charge_count,  -- charges
    charges.charged_request_count,  -- distinct requests that were charged
    charges.edge_request_count,  -- those of them within ten minutes of midnight; fal may count them to another day
    charges.charges_without_unit,  -- charges for which fal tells no unit
    charges.repeated_charge_count,  -- charges that are the same as another one in all that identifies one
    charges.cost_total,
    medians.median_cost,  -- half of the charges cost at most so much; of two in the middle the lower one
    medians.median_cost_of_others  -- the same without the dearest charge; null where there is no other
from charges
inner join medians
    on
        charges.account = medians.account
        and charges.usage_date = medians.usage_date
        and charges.endpoint_id = medians.endpoint_id

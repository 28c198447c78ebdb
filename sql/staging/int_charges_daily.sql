-- Charges per day and endpoint: their number, the number of requests charged, and the usual cost of one charge.
-- grain: account, usage_date, endpoint_id
-- days: usage_date, one at a time; counting distinct requests takes memory for each request
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

-- Most charges of an endpoint cost one of a few amounts. Counting the charges of each amount therefore needs little
-- memory; a median over all charges would need much.
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
    charges.charge_count,  -- number of charges
    charges.charged_request_count,  -- number of distinct requests that were charged
    charges.edge_request_count,  -- requests charged within ten minutes of midnight; fal may count them on the other day
    charges.charges_without_unit,  -- charges for which fal gives no unit
    charges.repeated_charge_count,  -- charges that repeat another charge in every identifying field
    charges.cost_total,
    medians.median_cost,  -- median cost of one charge; of two middle values the lower one
    medians.median_cost_of_others  -- median cost without the most expensive charge; null if it is the only one
from charges
inner join medians
    on
        charges.account = medians.account
        and charges.usage_date = medians.usage_date
        and charges.endpoint_id = medians.endpoint_id

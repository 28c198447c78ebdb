-- Monthly spend equals the sum of daily spend, and the parts of a month's change add up to the change.
with

sums as (
    select
        account,
        currency,
        'day' as layer,
        sum(quantity) as quantity,
        sum(cost_total) as cost_total,
        cast(0 as decimal(38, 12)) as unexplained
    from staging.int_usage_daily
    group by account, currency
    union all
    select
        account,
        currency,
        'month' as layer,
        sum(quantity) as quantity,
        sum(cost_total) as cost_total,
        sum(abs(cost_change - change_from_price - change_from_volume - change_from_new_or_gone))
            as unexplained
    from reports.rpt_spend_monthly
    group by account, currency
)

select
    account,
    currency,
    min(quantity) as least_quantity,
    max(quantity) as most_quantity,
    min(cost_total) as least_cost_total,
    max(cost_total) as most_cost_total,
    max(unexplained) as unexplained
from sums
group by account, currency
having
    count(*) <> 2
    or min(quantity) <> max(quantity)
    or min(cost_total) <> max(cost_total)
    or max(unexplained) <> 0

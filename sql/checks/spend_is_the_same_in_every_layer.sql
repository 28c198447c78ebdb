-- The sums of quantity and cost per account and currency are one number each, from raw to report.
with

layers as (
    select
        _account as account,
        coalesce(nullif(currency, ''), 'XXX') as currency,
        sum(quantity) as quantity,
        sum(cost_total) as cost_total
    from raw.usage
    group by _account, coalesce(nullif(currency, ''), 'XXX')
    union all
    select
        account,
        currency,
        sum(quantity) as quantity,
        sum(cost_total) as cost_total
    from marts.fct_usage
    group by account, currency
    union all
    select
        account,
        currency,
        sum(quantity) as quantity,
        sum(cost_total) as cost_total
    from reports.rpt_spend_daily
    group by account, currency
)

select
    account,
    currency,
    min(quantity) as least_quantity,
    max(quantity) as most_quantity,
    min(cost_total) as least_cost_total,
    max(cost_total) as most_cost_total
from layers
group by account, currency
having count(*) <> 3 or min(quantity) <> max(quantity) or min(cost_total) <> max(cost_total)

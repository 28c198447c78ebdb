-- Quantity and cost per account and currency have the same sum in every layer, from raw to report.
-- days: each by itself
with

layers as (
    select
        _account as account,
        currency_code(currency) as currency,
        quantity,
        cost_total,
        'raw' as layer
    from raw.usage
    union all
    select
        account,
        currency,
        quantity,
        cost_total,
        'hour' as layer
    from marts.fct_usage
    union all
    select
        account,
        currency,
        quantity,
        cost_total,
        'day' as layer
    from reports.rpt_spend_daily
    union all
    select
        account,
        currency,
        quantity,
        cost_total,
        'credential' as layer
    from reports.rpt_spend_by_credential
),

sums as (
    select
        account,
        currency,
        layer,
        sum(quantity) as quantity,
        sum(cost_total) as cost_total
    from layers
    group by account, currency, layer
)

select
    account,
    currency,
    min(quantity) as least_quantity,
    max(quantity) as most_quantity,
    min(cost_total) as least_cost_total,
    max(cost_total) as most_cost_total
from sums
group by account, currency
having count(*) <> 4 or min(quantity) <> max(quantity) or min(cost_total) <> max(cost_total)

-- Every charge of raw.billing_events is in fct_billing_event, at the same cost.
-- days: each by itself
with

layers as (
    select
        _account as account,
        cost_total,
        'raw' as layer
    from raw.billing_events
    union all
    select
        account,
        cost_total,
        'fact' as layer
    from marts.fct_billing_event
),

sums as (
    select
        account,
        layer,
        count(*) as charge_count,
        sum(cost_total) as cost_total
    from layers
    group by account, layer
)

select
    account,
    min(charge_count) as least_charge_count,
    max(charge_count) as most_charge_count,
    min(cost_total) as least_cost_total,
    max(cost_total) as most_cost_total
from sums
group by account
having count(*) <> 2 or min(charge_count) <> max(charge_count) or min(cost_total) <> max(cost_total)

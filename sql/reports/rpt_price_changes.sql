-- List price changes and the spend that each affects: look here when a bill is about to change. Model APIs only.
-- grain: account, endpoint_id, changed_at
with

changes as (
    select
        *,
        cast(valid_from as date) as change_date
    from marts.dim_price
    where previous_unit is not null
),

newest as (
    select
        account,
        cast(utc(max(window_start)) as date) as last_date
    from ops.loads
    where resource = 'usage' and is_current
    group by account
),

spend as (
    select
        account,
        usage_date,
        endpoint_id,
        currency,
        sum(cost_total) as cost_total
    from staging.int_usage_daily
    group by account, usage_date, endpoint_id, currency
),

stakes as (
    select
        changes.account,
        changes.endpoint_id,
        changes.valid_from,
        sum(
            case when spend.usage_date > newest.last_date - interval '30 days' then spend.cost_total end
        ) as spend_last_30_days,
        sum(
            case
                when
                    spend.usage_date >= changes.change_date - interval '30 days'
                    and spend.usage_date < changes.change_date
                    then spend.cost_total
            end
        ) as spend_30_days_before
    from changes
    inner join newest
        on changes.account = newest.account
    inner join spend
        on
            changes.account = spend.account
            and changes.endpoint_id = spend.endpoint_id
            and changes.currency = spend.currency
    group by changes.account, changes.endpoint_id, changes.valid_from
)

select
    changes.account,
    changes.endpoint_id,
    endpoints.display_name,
    changes.valid_from as changed_at,  -- first snapshot that showed the new price, UTC
    changes.previous_unit,
    changes.unit,
    changes.previous_currency,
    changes.currency,
    changes.previous_unit_price,
    changes.unit_price,
    changes.change_ratio,
    coalesce(stakes.spend_last_30_days, 0)
        as spend_last_30_days,  -- charged for the endpoint in the last 30 loaded days: the spend at stake now
    coalesce(stakes.spend_30_days_before, 0)
        as spend_30_days_before,  -- charged for the endpoint in the 30 days before the change: the spend at stake then
    changes.is_current  -- whether the new price is still the newest one known
from changes
left join stakes
    on
        changes.account = stakes.account
        and changes.endpoint_id = stakes.endpoint_id
        and changes.valid_from = stakes.valid_from
left join marts.dim_endpoint as endpoints
    on changes.endpoint_id = endpoints.endpoint_id

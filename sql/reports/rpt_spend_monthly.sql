-- Spend per month, and why it differs from the month before: price, volume, new or gone. Model APIs only.
-- grain: account, usage_month, endpoint_id, unit, currency
with

months as (
    select
        account,
        cast(date_trunc('month', usage_date) as date) as usage_month,
        endpoint_id,
        unit,
        currency,
        sum(quantity) as quantity,
        case when count(cost_subtotal) = count(*) then sum(cost_subtotal) end as cost_subtotal,
        case when count(cost_discount) = count(*) then sum(cost_discount) end as cost_discount,
        sum(cost_total) as cost_total
    from staging.int_usage_daily
    group by account, cast(date_trunc('month', usage_date) as date), endpoint_id, unit, currency
),

-- A line that is gone gets one row of zeros in the month after its last month, if that month was extracted.
months_read as (
    select distinct
        account,
        cast(date_trunc('month', utc(window_start)) as date) as usage_month
    from ops.loads
    where resource = 'usage' and is_current
),

gone as (
    select
        months.account,
        cast(months.usage_month + interval '1 month' as date) as usage_month,
        months.endpoint_id,
        months.unit,
        months.currency
    from months
    inner join months_read
        on
            months.account = months_read.account
            and months.usage_month + interval '1 month' = months_read.usage_month
    left join months as following
        on
            months.account = following.account
            and following.usage_month = months.usage_month + interval '1 month'
            and months.endpoint_id = following.endpoint_id
            and months.unit = following.unit
            and months.currency = following.currency
    where following.account is null
),

lines as (
    select * from months
    union all
    select
        *,
        cast(0 as decimal(38, 12)) as quantity,
        cast(0 as decimal(38, 12)) as cost_subtotal,
        cast(0 as decimal(38, 12)) as cost_discount,
        cast(0 as decimal(38, 12)) as cost_total
    from gone
),

compared as (
    select
        lines.*,
        coalesce(previous.quantity, 0) as previous_quantity,
        coalesce(previous.cost_total, 0) as previous_cost_total,
        lines.cost_total - coalesce(previous.cost_total, 0) as cost_change,
        lines.quantity > 0 and coalesce(previous.quantity, 0) > 0 as is_comparable
    from lines
    left join months as previous
        on
            lines.account = previous.account
            and lines.usage_month = previous.usage_month + interval '1 month'
            and lines.endpoint_id = previous.endpoint_id
            and lines.unit = previous.unit
            and lines.currency = previous.currency
),

-- After a tiny quantity the volume part may exceed what an amount can represent. It is null then, as for new lines.
split as (
    select
        *,
        case
            when is_comparable
                then proportion(previous_cost_total, quantity - previous_quantity, previous_quantity)
        end as change_from_volume
    from compared
)

select
    split.account,
    split.usage_month,  -- first day of the month
    split.endpoint_id,
    endpoints.display_name,
    split.unit,
    split.currency,
    split.quantity,
    split.cost_subtotal,
    split.cost_discount,
    split.cost_total,
    split.previous_cost_total,  -- cost_total of the month before; 0 where there was none, or none is loaded
    split.cost_change,  -- cost_total - previous_cost_total; exactly the sum of the three change_from_ columns
    coalesce(split.cost_change - split.change_from_volume, 0)
        as change_from_price,  -- change because one unit cost more or less, after discounts
    coalesce(split.change_from_volume, 0)
        as change_from_volume,  -- change because more or fewer units were used, at last month's cost per unit
    case when split.change_from_volume is null then split.cost_change else 0 end
        as change_from_new_or_gone  /* change of a line that was used in only one of the two months, or hardly at all in
    the month before; for an open month, so far */
from split
left join marts.dim_endpoint as endpoints
    on split.endpoint_id = endpoints.endpoint_id

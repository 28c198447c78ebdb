-- Spend per day, endpoint and billing unit: the main table for dashboards. Model APIs only.
-- grain: account, usage_date, endpoint_id, unit, currency
-- days: usage_date
with

daily as (
    select
        account,
        usage_date,
        endpoint_id,
        unit,
        currency,
        sum(quantity) as quantity,
        case when count(cost_subtotal) = count(*) then sum(cost_subtotal) end as cost_subtotal,
        case when count(cost_discount) = count(*) then sum(cost_discount) end as cost_discount,
        sum(cost_total) as cost_total
    from staging.int_usage_daily
    group by account, usage_date, endpoint_id, unit, currency
),

-- The first known price is also used for the days before it.
list_prices as (
    select
        *,
        row_number() over (partition by account, endpoint_id order by valid_from) = 1 as is_first
    from marts.dim_price
),

priced as (
    select
        daily.*,
        quotient(daily.cost_subtotal, daily.quantity) as effective_unit_price,
        list_prices.unit_price as list_unit_price,
        list_prices.unit as list_unit,
        list_prices.currency as list_currency,
        list_prices.valid_from >= daily.usage_date + interval '1 day' as is_list_price_assumed
    from daily
    left join list_prices
        on
            daily.account = list_prices.account
            and daily.endpoint_id = list_prices.endpoint_id
            and (
                list_prices.is_first
                or list_prices.valid_from < daily.usage_date + interval '1 day'
            )
            and (
                list_prices.valid_to is null
                or list_prices.valid_to >= daily.usage_date + interval '1 day'
            )
)

select
    priced.account,
    priced.usage_date,
    priced.endpoint_id,
    endpoints.display_name,
    priced.unit,
    billed.canonical_unit,
    priced.currency,
    priced.quantity,
    priced.cost_subtotal,
    priced.cost_discount,
    priced.cost_total,
    billed.base_unit,  -- what the unit counts, from the table of units; null where the table does not have it
    quotient(
        priced.cost_total,
        case
            when priced.quantity < quotient(10000000000000000000, billed.factor)
                then priced.quantity * cast(billed.factor as bigint)
        end
    ) as cost_per_base_unit,  -- cost_total / (quantity × factor): makes units of the same kind comparable
    priced.effective_unit_price,  -- cost_subtotal / quantity: what one unit cost before discounts
    priced.list_unit_price,  -- list price of one list_unit at the end of the day; never part of a cost
    priced.list_unit,  -- unit of the list price; it may differ from the unit billed
    case
        when billed.canonical_unit = listed.canonical_unit and priced.currency = priced.list_currency
            then priced.effective_unit_price - priced.list_unit_price
    end as price_difference,  -- effective_unit_price - list_unit_price; null where they cannot be compared
    case
        when priced.list_unit_price is null then 'no list price'
        when billed.canonical_unit <> listed.canonical_unit then 'units differ'
        when priced.currency <> priced.list_currency then 'currencies differ'
        when priced.effective_unit_price is null then 'no effective price'
        else 'compared'
    end as price_comparison,  -- compared, or the reason why the list price and the effective price cannot be compared
    priced.is_list_price_assumed  -- whether the list price was first seen after that day
from priced
left join marts.dim_endpoint as endpoints
    on priced.endpoint_id = endpoints.endpoint_id
left join marts.dim_unit as billed
    on priced.unit = billed.unit
left join marts.dim_unit as listed
    on priced.list_unit = listed.unit

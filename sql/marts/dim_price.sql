-- List price history (type 2): what one unit cost in which period, as far as snapshots show.
-- grain: account, endpoint_id, valid_from
with

snapshots as (
    select
        *,
        lag(unit) over by_time as previous_unit,
        lag(unit_price) over by_time as previous_unit_price,
        lag(currency) over by_time as previous_currency
    from staging.stg_fal__prices
    window by_time as (partition by account, endpoint_id order by snapshot_at)
),

changes as (
    select
        *,
        lead(snapshot_at) over (partition by account, endpoint_id order by snapshot_at) as next_change_at
    from snapshots
    where
        previous_unit is null
        or previous_unit <> unit
        or previous_unit_price <> unit_price
        or previous_currency <> currency
),

newest as (
    select
        account,
        max(snapshot_at) as snapshot_at
    from staging.stg_fal__prices
    group by account
),

listed as (
    select
        prices.account,
        prices.endpoint_id
    from staging.stg_fal__prices as prices
    inner join newest
        on prices.account = newest.account and prices.snapshot_at = newest.snapshot_at
)

select
    changes.account,
    changes.endpoint_id,
    changes.snapshot_at as valid_from,  -- first snapshot that showed this price, UTC
    changes.next_change_at as valid_to,  -- first snapshot that showed another price, UTC; null while current
    changes.unit,
    changes.unit_price,
    changes.currency,
    changes.previous_unit,  -- unit of the previous price; null for the first price
    changes.previous_unit_price,  -- previous list price; null for the first price
    changes.previous_currency,  -- currency of the previous price; null for the first price
    case
        when changes.previous_unit = changes.unit and changes.previous_currency = changes.currency
            then quotient(changes.unit_price, changes.previous_unit_price)
    end as change_ratio,  /* unit_price / previous_unit_price; null for the first price, after a price of zero, and
    where unit or currency changed */
    changes.next_change_at is null as is_current,  -- whether this is the newest price known
    changes.next_change_at is null
    and listed.endpoint_id is null as is_stale  -- whether the newest snapshot of list prices lacks the endpoint
from changes
left join listed
    on changes.account = listed.account and changes.endpoint_id = listed.endpoint_id

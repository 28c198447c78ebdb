-- Accounts of fal whose spend is in this warehouse.
-- grain: account
with

sightings as (
    select
        account,
        used_at as seen_at
    from staging.stg_fal__usage
    union all
    select
        account,
        read_at as seen_at
    from staging.stg_fal__credits
    union all
    select
        account,
        snapshot_at as seen_at
    from staging.stg_fal__models
    union all
    select
        account,
        snapshot_at as seen_at
    from staging.stg_fal__prices
)

select
    account,
    min(seen_at) as first_seen_at,  -- oldest usage or reading, UTC
    max(seen_at) as last_seen_at  -- newest usage or reading, UTC
from sightings
group by account

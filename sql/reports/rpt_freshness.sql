-- How far the data of each resource reach, and what is missing. Look here before you trust a sum.
-- grain: account, resource
-- view: always shows the current state of ops, even when nothing was built since
with

loaded as (
    select
        account,
        resource,
        max(window_end) as loaded_until,
        min(case when not is_settled then window_start end) as first_unsettled,
        max(case when is_settled then window_end end) as last_settled,
        max(last_read_at) as last_extracted_at
    from ops.loads
    where is_current
    group by account, resource
),

failed as (
    select
        account,
        resource,
        count(*) as open_failures
    from ops.failures
    group by account, resource
),

held as (
    select
        account,
        resource,
        count(*) as held_windows,
        max(last_extracted_at) as last_extracted_at
    from ops.holds
    group by account, resource
),

quarantined as (
    select
        account,
        resource,
        count(*) as quarantined_rows
    from ops.quarantine
    where resolved_at is null
    group by account, resource
),

feeds as (
    select
        account,
        resource
    from loaded
    union distinct
    select
        account,
        resource
    from failed
    union distinct
    select
        account,
        resource
    from held
    union distinct
    select
        account,
        resource
    from quarantined
),

newest_build as (
    select max(finished_at) as last_built_at from ops.builds
)

select
    feeds.account,  -- account label; see marts.dim_account
    feeds.resource,  -- collection of the fal API, such as usage
    utc(loaded.loaded_until) as loaded_until,  -- end of the newest loaded window, or its instant, UTC
    utc(
        case
            when loaded.first_unsettled < loaded.last_settled then loaded.first_unsettled
            else loaded.last_settled
        end
    ) as settled_until,  /* every loaded day before this instant is settled, which means extracted at least 24 hours
    after its end; UTC; null for snapshots, and where no day has settled */
    utc(
        greatest(loaded.last_extracted_at, coalesce(held.last_extracted_at, loaded.last_extracted_at))
    ) as last_extracted_at,  -- when the newest extract began, UTC
    coalesce(failed.open_failures, 0) as open_failures,  -- windows whose last extract or load failed
    coalesce(held.held_windows, 0) as held_windows,  /* windows that are held: they keep their proven rows, because fal
    now returns fewer; see ops.holds */
    coalesce(quarantined.quarantined_rows, 0) as quarantined_rows,  -- rows in ops.quarantine that are not resolved
    utc(newest_build.last_built_at) as last_built_at  -- end of the newest build, UTC
from feeds
cross join newest_build
left join loaded
    on feeds.account = loaded.account and feeds.resource = loaded.resource
left join failed
    on feeds.account = failed.account and feeds.resource = failed.resource
left join held
    on feeds.account = held.account and feeds.resource = held.resource
left join quarantined
    on feeds.account = quarantined.account and feeds.resource = quarantined.resource

-- Every model endpoint that appears in the catalogue, in list prices, in usage, in charges or in requests.
-- grain: endpoint_id
with

sightings as (
    select
        endpoint_id,
        first_used_at as first_seen_at,
        last_used_at as last_seen_at
    from staging.int_usage_daily
    union all
    select
        endpoint_id,
        first_requested_at as first_seen_at,
        last_requested_at as last_seen_at
    from staging.int_billing_events_daily
    union all
    select
        endpoint_id,
        first_requested_at as first_seen_at,
        last_requested_at as last_seen_at
    from staging.int_requests_daily
    union all
    select
        endpoint_id,
        snapshot_at as first_seen_at,
        snapshot_at as last_seen_at
    from staging.stg_fal__models
    union all
    select
        endpoint_id,
        snapshot_at as first_seen_at,
        snapshot_at as last_seen_at
    from staging.stg_fal__prices
),

seen as (
    select
        endpoint_id,
        min(first_seen_at) as first_seen_at,
        max(last_seen_at) as last_seen_at
    from sightings
    group by endpoint_id
),

catalogue as (
    select
        *,
        row_number() over (partition by endpoint_id order by snapshot_at desc, account asc) as recency
    from staging.stg_fal__models
),

newest as (
    select
        account,
        max(snapshot_at) as snapshot_at
    from staging.stg_fal__models
    group by account
),

listed as (
    select distinct models.endpoint_id
    from staging.stg_fal__models as models
    inner join newest
        on models.account = newest.account and models.snapshot_at = newest.snapshot_at
)

select
    seen.endpoint_id,
    split_part(seen.endpoint_id, '/', 1) as owner,  -- publisher of the model: the first part of the endpoint id
    coalesce(
        catalogue.group_label, catalogue.group_key, nullif(split_part(seen.endpoint_id, '/', 2), '')
    ) as family,  -- model family in fal's catalogue; otherwise the second part of the endpoint id
    catalogue.display_name,
    catalogue.category,
    case
        when catalogue.category like '%-to-%' then split_part(catalogue.category, '-to-', 2)
    end as output_modality,  -- what the model returns: image, video, audio, …; null where the category does not say
    catalogue.status,
    catalogue.kind,  -- inference or training
    seen.first_seen_at,  -- oldest use, price or catalogue entry, UTC
    seen.last_seen_at,  -- newest use, price or catalogue entry, UTC
    listed.endpoint_id is not null as is_in_catalogue  -- whether the newest snapshot of fal's catalogue lists it
from seen
left join catalogue
    on seen.endpoint_id = catalogue.endpoint_id and catalogue.recency = 1
left join listed
    on seen.endpoint_id = listed.endpoint_id

-- Keys and logins that caused spend, and their owners. An id stays the same when its label is renamed.
-- grain: account, credential_id
with

sightings as (
    select
        account,
        credential_id,
        credential_label,
        api_key_id,
        login_username,
        first_used_at as first_seen_at,
        last_used_at as last_seen_at
    from staging.int_usage_daily
    union all
    select
        account,
        credential_id,
        credential_label,
        api_key_id,
        login_username,
        first_requested_at as first_seen_at,
        last_requested_at as last_seen_at
    from staging.int_billing_events_daily
),

seen as (
    select
        account,
        credential_id,
        min(first_seen_at) as first_seen_at,
        max(last_seen_at) as last_seen_at
    from sightings
    group by account, credential_id
),

-- Several sightings may share the last instant, but only a few do. Sorting all sightings would take longer.
ranked as (
    select
        sightings.*,
        row_number() over (
            partition by sightings.account, sightings.credential_id
            order by
                sightings.credential_label desc nulls last,
                sightings.api_key_id desc nulls last,
                sightings.login_username desc nulls last
        ) as recency
    from sightings
    inner join seen
        on
            sightings.account = seen.account
            and sightings.credential_id = seen.credential_id
            and sightings.last_seen_at = seen.last_seen_at
),

-- A line for one account takes precedence over a line for all accounts.
owners as (
    select
        seen.account,
        seen.credential_id,
        seeds.owner,
        seeds.team,
        seeds.cost_centre,
        row_number() over (
            partition by seen.account, seen.credential_id order by seeds.account desc
        ) as precedence
    from seen
    inner join staging.seed_credential_owner as seeds
        on seen.credential_id = seeds.credential_id and seeds.account in ('', seen.account)
)

select
    seen.account,  -- account label: fal's username, or FALETL_ACCOUNT
    seen.credential_id,  -- key:…, user:…, label:… (where fal gives no id) or none
    case
        when latest.api_key_id is not null then 'api_key'
        when latest.login_username is not null then 'user_token'
        when seen.credential_id = 'none' then 'none'
        when latest.credential_label in ('User token', 'User key') then 'user_token'
        else 'api_key'
    end as kind,  -- api_key, user_token or none
    latest.api_key_id,
    latest.login_username,
    latest.credential_label as label,  -- newest label of the credential
    coalesce(owners.owner, 'UNMAPPED')
        as owner,  -- owner of the credential, from the table of owners; UNMAPPED where it has none
    coalesce(owners.team, 'UNMAPPED')
        as team,  -- team of the owner, from the table of owners; UNMAPPED where it has none
    coalesce(owners.cost_centre, 'UNMAPPED')
        as cost_centre,  -- cost centre of the owner, from the table of owners; UNMAPPED where it has none
    seen.first_seen_at,  -- oldest use of the credential, UTC
    seen.last_seen_at  -- newest use of the credential, UTC
from seen
inner join ranked as latest
    on
        seen.account = latest.account
        and seen.credential_id = latest.credential_id
        and latest.recency = 1
left join owners
    on
        seen.account = owners.account
        and seen.credential_id = owners.credential_id
        and owners.precedence = 1

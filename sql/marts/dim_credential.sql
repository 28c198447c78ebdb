-- Keys and logins that spent: ids stay when a label is renamed.
-- grain: account, credential_id
with

usage_rows as (
    select
        *,
        row_number() over (
            partition by account, credential_id
            order by used_at desc, credential_label desc nulls last
        ) as recency
    from staging.stg_fal__usage
),

seen as (
    select
        account,
        credential_id,
        min(used_at) as first_seen_at,
        max(used_at) as last_seen_at
    from usage_rows
    group by account, credential_id
)

select
    seen.account,
    seen.credential_id,
    case
        when latest.api_key_id is not null then 'api_key'
        when latest.login_username is not null then 'user_token'
        when seen.credential_id = 'none' then 'none'
        when latest.credential_label in ('User token', 'User key') then 'user_token'
        else 'api_key'
    end as kind,  -- api_key, user_token or none
    latest.api_key_id,
    latest.login_username,
    latest.credential_label as label,  -- newest name of the credential
    seen.first_seen_at,  -- oldest hour of use, UTC
    seen.last_seen_at  -- newest hour of use, UTC
from seen
inner join usage_rows as latest
    on
        seen.account = latest.account
        and seen.credential_id = latest.credential_id
        and latest.recency = 1

-- Charges as fal reports them, with instants in UTC and one id per credential.
-- grain: account, event_hash, event_ordinal
-- days: usage_date
with

events as (
    select
        *,
        coalesce(auth_detail, auth_method) as auth_label
    from raw.billing_events
)

select
    _account as account,  -- account label: fal's username, or FALETL_ACCOUNT
    _hash as event_hash,
    _ordinal as event_ordinal,
    utc(timestamp) as requested_at,  -- time of the request, UTC
    cast(utc(timestamp) as date) as usage_date,  -- UTC day
    request_id,
    endpoint_id,
    unit,
    unit_price,
    nullif(percent_discount, 0) as percent_discount,  -- discount in percent; null where there is none
    'USD' as currency,  -- always USD: the field names of billing events say so
    credential_id(api_key_id, login_username, auth_label)
        as credential_id,  -- key:…, user:…, label:… (where fal gives no id) or none
    auth_label as credential_label,  -- label of the credential at that time
    api_key_id,
    login_username,
    quantity,
    cost_subtotal,
    cost_discount,
    cost_total,
    cost_estimate_nano_usd,
    _load_id as load_id  -- the load that brought the row; see ops.loads
from events

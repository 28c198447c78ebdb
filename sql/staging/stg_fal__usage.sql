-- Usage as fal reports it: hours in UTC, one id per credential.
-- grain: none; raw may hold one line in two parts, fct_usage adds them up
with

usage_rows as (
    select
        *,
        coalesce(auth_detail, auth_method) as auth_label
    from raw.usage
)

select
    _account as account,  -- account label: fal's username, or FALETL_ACCOUNT
    utc(bucket) as used_at,  -- start of the hour, UTC
    cast(utc(bucket) as date) as usage_date,  -- UTC day
    endpoint_id,
    unit,
    unit_price,
    nullif(percent_discount, 0) as percent_discount,  -- percentage taken off; null for none
    currency_code(currency) as currency,  -- ISO 4217 code of every amount; XXX when fal gave none
    credential_id(api_key_id, login_username, auth_label)
        as credential_id,  -- key:…, user:…, label:… (where fal told no id) or none
    auth_label as credential_label,  -- name of the credential at that hour
    api_key_id,
    login_username,
    quantity,
    cost_subtotal,
    cost_discount,
    cost_total,
    _load_id as load_id  -- the load that brought the row; see ops.loads
from usage_rows

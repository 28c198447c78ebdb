-- Usage as fal reports it, per hour in UTC, with one id per credential.
-- grain: none; raw may contain one line in two parts, which fct_usage adds up
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
    nullif(percent_discount, 0) as percent_discount,  -- discount in percent; null where there is none
    currency_code(currency) as currency,  -- ISO 4217 code of the row's amounts; XXX when fal gave none
    credential_id(api_key_id, login_username, auth_label)
        as credential_id,  -- key:…, user:…, label:… (where fal gives no id) or none
    auth_label as credential_label,  -- label of the credential in that hour
    api_key_id,
    login_username,
    quantity,
    cost_subtotal,
    cost_discount,
    cost_total,
    _load_id as load_id  -- the load that brought the row; see ops.loads
from usage_rows

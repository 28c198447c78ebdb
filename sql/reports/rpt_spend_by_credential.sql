-- Spend per day and credential, with its owner: shows who spent what. Model APIs only.
-- grain: account, usage_date, credential_id, endpoint_id, unit, currency
-- days: usage_date
select
    days.account,
    days.usage_date,
    days.credential_id,
    credentials.label as credential_label,  -- newest label of the credential
    credentials.kind,  -- api_key, user_token or none
    credentials.owner,  -- owner of the credential, from the table of owners; UNMAPPED where it has none
    credentials.team,
    credentials.cost_centre,
    days.endpoint_id,
    endpoints.display_name,
    days.unit,
    days.currency,
    days.quantity,
    days.cost_subtotal,
    days.cost_discount,
    days.cost_total
from staging.int_usage_daily as days
left join marts.dim_credential as credentials
    on days.account = credentials.account and days.credential_id = credentials.credential_id
left join marts.dim_endpoint as endpoints
    on days.endpoint_id = endpoints.endpoint_id

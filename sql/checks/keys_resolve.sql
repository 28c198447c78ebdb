-- Every key of a fact exists in its dimension.
-- days: each by itself
with

facts as (
    select distinct
        'fct_usage' as fact,
        account,
        usage_date,
        endpoint_id,
        unit,
        credential_id
    from marts.fct_usage
    union all
    select distinct
        'fct_billing_event' as fact,
        account,
        usage_date,
        endpoint_id,
        unit,
        credential_id
    from marts.fct_billing_event
    union all
    select distinct
        'fct_requests' as fact,
        account,
        usage_date,
        endpoint_id,
        null as unit,
        null as credential_id
    from marts.fct_requests
    union all
    select distinct
        'fct_latency' as fact,
        account,
        usage_date,
        endpoint_id,
        null as unit,
        null as credential_id
    from marts.fct_latency
    union all
    select distinct
        'fct_credit_balance' as fact,
        account,
        balance_date as usage_date,
        null as endpoint_id,
        null as unit,
        null as credential_id
    from marts.fct_credit_balance
)

select facts.*
from facts
left join marts.dim_account as accounts
    on facts.account = accounts.account
left join marts.dim_date as dates
    on facts.usage_date = dates.date_day
left join marts.dim_endpoint as endpoints
    on facts.endpoint_id = endpoints.endpoint_id
left join marts.dim_unit as units
    on facts.unit = units.unit
left join marts.dim_credential as credentials
    on
        facts.account = credentials.account
        and facts.credential_id = credentials.credential_id
where
    accounts.account is null
    or dates.date_day is null
    or (facts.endpoint_id is not null and endpoints.endpoint_id is null)
    or (facts.unit is not null and units.unit is null)
    or (facts.credential_id is not null and credentials.credential_id is null)

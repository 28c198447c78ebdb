-- Every key of fct_usage stands in its dimension.
select usage_rows.*
from marts.fct_usage as usage_rows
left join marts.dim_account as accounts
    on usage_rows.account = accounts.account
left join marts.dim_date as dates
    on usage_rows.usage_date = dates.date_day
left join marts.dim_endpoint as endpoints
    on usage_rows.endpoint_id = endpoints.endpoint_id
left join marts.dim_unit as units
    on usage_rows.unit = units.unit
left join marts.dim_credential as credentials
    on
        usage_rows.account = credentials.account
        and usage_rows.credential_id = credentials.credential_id
where
    accounts.account is null
    or dates.date_day is null
    or endpoints.endpoint_id is null
    or units.unit is null
    or credentials.credential_id is null

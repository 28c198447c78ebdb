-- No request is charged under two account labels: the labels would be one account, counted twice.
-- days: each by itself
-- cure: remove one of the two labels with faletl accounts forget
with

requests as (
    select
        request_id,
        min(_account) as account,
        max(_account) as other_account
    from raw.billing_events
    where (select count(*) from marts.dim_account) > 1
    group by request_id
)

select *
from requests
where account <> other_account

-- Requests by outcome per day: what reports read instead of hours.
-- grain: account, usage_date, endpoint_id
-- days: usage_date
select
    account,
    usage_date,
    endpoint_id,
    cast(sum(request_count) as bigint) as request_count,  -- all requests of the day
    cast(sum(success_count) as bigint) as success_count,  -- answered 2xx
    cast(sum(user_error_count) as bigint) as user_error_count,  -- answered 4xx
    cast(sum(error_count) as bigint) as error_count  -- answered 5xx
from staging.stg_fal__analytics
where timeframe = 'hour'
group by account, usage_date, endpoint_id

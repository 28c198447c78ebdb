-- Requests by outcome per day: what dimensions and reports read instead of hours.
-- grain: account, usage_date, endpoint_id
-- days: usage_date
select
    account,
    usage_date,
    endpoint_id,
    min(bucket_at) as first_requested_at,  -- first bucket of the day, UTC
    max(bucket_at) as last_requested_at,  -- last bucket of the day, UTC
    cast(sum(case when timeframe = 'hour' then request_count end) as bigint) as request_count,  -- all requests
    cast(sum(case when timeframe = 'hour' then success_count end) as bigint) as success_count,  -- answered 2xx
    cast(sum(case when timeframe = 'hour' then user_error_count end) as bigint)
        as user_error_count,  -- answered 4xx
    cast(sum(case when timeframe = 'hour' then error_count end) as bigint) as error_count,  -- answered 5xx
    case
        when
            count(case when timeframe = 'hour' then total_billable_duration end)
            = count(case when timeframe = 'hour' then 1 end)
            then sum(case when timeframe = 'hour' then total_billable_duration end)
    end as total_billable_duration  -- execution that counts for billing, in seconds; null where an hour lacks it
from staging.stg_fal__analytics
group by account, usage_date, endpoint_id

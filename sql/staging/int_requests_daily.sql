-- Requests per day and endpoint, by outcome. Dimensions and reports use these sums instead of single hours.
-- grain: account, usage_date, endpoint_id
-- days: usage_date
select
    account,
    usage_date,
    endpoint_id,
    min(bucket_at) as first_requested_at,  -- first hour of the day with requests, UTC
    max(bucket_at) as last_requested_at,  -- last hour of the day with requests, UTC
    cast(sum(case when timeframe = 'hour' then request_count end) as bigint) as request_count,  -- number of requests
    cast(sum(case when timeframe = 'hour' then success_count end) as bigint) as success_count,  -- requests answered 2xx
    cast(sum(case when timeframe = 'hour' then user_error_count end) as bigint)
        as user_error_count,  -- requests answered 4xx
    cast(sum(case when timeframe = 'hour' then error_count end) as bigint) as error_count,  -- requests answered 5xx
    case
        when
            count(case when timeframe = 'hour' then total_billable_duration end)
            = count(case when timeframe = 'hour' then 1 end)
            then sum(case when timeframe = 'hour' then total_billable_duration end)
    end as total_billable_duration  -- billable seconds of execution; null where fal gives none for an hour
from staging.stg_fal__analytics
group by account, usage_date, endpoint_id

-- Requests per hour and endpoint, by outcome, including requests that failed and cost nothing.
-- grain: account, used_at, endpoint_id
-- days: usage_date, row by row
select
    account,
    bucket_at as used_at,  -- start of the hour, UTC
    usage_date,
    endpoint_id,
    request_count,
    success_count,
    user_error_count,
    error_count,
    startup_error_count,
    connection_error_count,
    timeout_error_count,
    runtime_error_count,
    cold_boot_count,
    total_billable_duration
from staging.stg_fal__analytics
where timeframe = 'hour'

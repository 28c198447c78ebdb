-- Requests and their durations as fal reports them, per hour and per day, in UTC.
-- grain: account, timeframe, bucket_at, endpoint_id
select
    _account as account,  -- account label: fal's username, or FALETL_ACCOUNT
    timeframe,
    utc(bucket) as bucket_at,  -- start of the hour or day, UTC
    cast(utc(bucket) as date) as usage_date,  -- UTC day
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
    total_billable_duration,
    p50_prepare_duration,
    p75_prepare_duration,
    p90_prepare_duration,
    p95_prepare_duration,
    p99_prepare_duration,
    p25_duration,
    p50_duration,
    p75_duration,
    p90_duration,
    p95_duration,
    p99_duration,
    p50_cold_boot_duration,
    p75_cold_boot_duration,
    p90_cold_boot_duration,
    _load_id as load_id  -- the load that brought the row; see ops.loads
from raw.analytics

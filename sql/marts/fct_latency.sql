-- How long requests took, per day and endpoint: percentiles, which must never be added up or averaged.
-- grain: account, usage_date, endpoint_id
-- days: usage_date, row by row
select
    account,
    usage_date,
    endpoint_id,
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
    p90_cold_boot_duration
from staging.stg_fal__analytics
where timeframe = 'day'

-- Whether fal keeps its billing rules: failed requests and queue time are free, and billed seconds were run.
-- grain: account, usage_date, endpoint_id, rule
-- days: usage_date
with

feeds as (
    select
        account,
        cast(utc(window_start) as date) as usage_date,
        bool_or(resource = 'analytics') as has_requests,
        bool_or(resource = 'billing_events') as has_charges,
        bool_or(resource = 'usage') as has_usage,
        bool_and(is_settled) as is_settled
    from ops.loads
    where
        is_current
        and not is_provisional
        and resource in ('analytics', 'billing_events', 'usage')
    group by account, cast(utc(window_start) as date)
),

compute as (
    select
        lines.account,
        lines.usage_date,
        lines.endpoint_id,
        sum(lines.quantity) as billed_seconds
    from staging.int_usage_daily as lines
    inner join staging.seed_unit as known
        on lower(trim(lines.unit)) = known.unit
    where known.family = 'compute' and known.factor = 1 and known.base_unit like '%second'
    group by lines.account, lines.usage_date, lines.endpoint_id
),

endpoints as (
    select
        account,
        usage_date,
        endpoint_id
    from staging.int_requests_daily
    union
    select
        account,
        usage_date,
        endpoint_id
    from staging.int_charges_daily
    union
    select
        account,
        usage_date,
        endpoint_id
    from compute
),

known as (
    select
        endpoints.*,
        requests.request_count,
        requests.success_count,
        requests.error_count,
        nullif(requests.total_billable_duration, 0) as total_billable_duration,  -- 0: fal did not measure it
        latency.p99_duration,
        compute.billed_seconds,
        coalesce(charges.edge_request_count, 0) as edge_request_count,
        coalesce(feeds.has_requests, false) as has_requests,
        coalesce(feeds.has_charges, false) as has_charges,
        coalesce(feeds.has_usage, false) as has_usage,
        coalesce(feeds.is_settled, false) as is_settled,
        coalesce(
            charges.charged_request_count, case when feeds.has_charges and feeds.is_settled then 0 end
        ) as charged_request_count
    from endpoints
    left join feeds
        on endpoints.account = feeds.account and endpoints.usage_date = feeds.usage_date
    left join staging.int_requests_daily as requests
        on
            endpoints.account = requests.account
            and endpoints.usage_date = requests.usage_date
            and endpoints.endpoint_id = requests.endpoint_id
    left join staging.int_charges_daily as charges
        on
            endpoints.account = charges.account
            and endpoints.usage_date = charges.usage_date
            and endpoints.endpoint_id = charges.endpoint_id
    left join marts.fct_latency as latency
        on
            endpoints.account = latency.account
            and endpoints.usage_date = latency.usage_date
            and endpoints.endpoint_id = latency.endpoint_id
    left join compute
        on
            endpoints.account = compute.account
            and endpoints.usage_date = compute.usage_date
            and endpoints.endpoint_id = compute.endpoint_id
),

measured as (
    select
        *,
        'failed requests are free' as rule,
        has_requests and has_charges as is_known,
        cast(request_count - error_count as decimal(38, 12)) as promised,
        cast(charged_request_count as decimal(38, 12)) as observed,
        cast(edge_request_count as decimal(38, 12)) as margin
    from known
    union all
    select
        *,
        'queue time is free' as rule,
        has_requests as is_known,
        p99_duration as promised,
        quotient(total_billable_duration, success_count) as observed,
        cast(0 as decimal(38, 12)) as margin
    from known
    where success_count > 0 or success_count is null
    union all
    select
        *,
        'billed seconds were run' as rule,
        has_requests and has_usage as is_known,
        total_billable_duration as promised,
        billed_seconds as observed,
        cast(edge_request_count * coalesce(p99_duration, 0) as decimal(38, 12)) as margin
    from known
    where billed_seconds is not null
)

select
    account,
    usage_date,
    endpoint_id,
    rule,  /* one of: failed requests are free; queue time is free; billed seconds were run (for endpoints that fal
    bills in compute seconds) */
    success_count,
    promised,  /* the largest value that the rule allows. Failed requests are free: number of requests that did not end
    with 5xx (a 4xx may be billed). Queue time is free: p99 of the duration of requests, in seconds. Billed seconds were
    run: seconds of execution that count for billing */
    observed,  /* the value that occurred. Failed requests are free: number of distinct requests charged. Queue time is
    free: billable seconds per successful request. Billed seconds were run: compute seconds charged */
    margin,  -- how far observed may exceed promised: requests close to midnight, which fal may count on the other day
    quotient(observed, promised) as ratio,  -- observed / promised
    case
        when not is_known or promised is null or observed is null then 'unknown'
        when observed <= promised + margin then 'kept'
        when is_settled then 'broken'
        else 'unknown'
    end as status  /* kept: observed is at most promised + margin. broken: observed is larger on a settled day, so ask
    fal. unknown: one of the two figures is missing, or the day is not settled and figures may still change */
from measured

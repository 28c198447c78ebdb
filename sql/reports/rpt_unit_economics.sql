-- Cost per request and per successful request, and error rates, per day and endpoint. Model APIs only.
-- grain: account, usage_date, endpoint_id, currency
with

spend as (
    select
        account,
        usage_date,
        endpoint_id,
        currency,
        sum(cost_total) as cost_total
    from staging.int_usage_daily
    group by account, usage_date, endpoint_id, currency
),

-- Requests that cost nothing have no currency. Nearly every account has only one currency, which they get.
billed as (
    select
        account,
        min(currency) as currency
    from spend
    group by account
    having count(distinct currency) = 1
),

days as (
    select
        coalesce(spend.account, requests.account) as account,
        coalesce(spend.usage_date, requests.usage_date) as usage_date,
        coalesce(spend.endpoint_id, requests.endpoint_id) as endpoint_id,
        currency_code(coalesce(spend.currency, billed.currency)) as currency,
        coalesce(spend.cost_total, 0) as cost_total,
        requests.request_count,
        requests.success_count,
        requests.user_error_count,
        requests.error_count
    from spend
    full join staging.int_requests_daily as requests
        on
            spend.account = requests.account
            and spend.usage_date = requests.usage_date
            and spend.endpoint_id = requests.endpoint_id
    left join billed
        on requests.account = billed.account
)

select
    days.account,
    days.usage_date,
    days.endpoint_id,
    endpoints.display_name,
    days.currency,  -- ISO 4217 code; requests that cost nothing get the account's only currency, else XXX
    days.cost_total,
    days.request_count,  -- requests of the day in all currencies; null where analytics are not loaded
    days.success_count,
    days.user_error_count,
    days.error_count,
    quotient(days.cost_total, days.request_count) as cost_per_request,  -- cost_total / request_count
    quotient(days.cost_total, days.success_count) as cost_per_success,  -- cost_total / success_count
    quotient(days.success_count, days.request_count) as success_rate,  -- success_count / request_count
    quotient(days.user_error_count, days.request_count) as user_error_rate,  -- user_error_count / request_count
    quotient(days.error_count, days.request_count) as error_rate,  -- error_count / request_count
    latency.p50_duration,  -- p50 of the duration of the day's requests, in seconds; fal's figure, never averaged
    latency.p95_duration  -- p95 of the duration of the day's requests, in seconds; fal's figure, never averaged
from days
left join marts.dim_endpoint as endpoints
    on days.endpoint_id = endpoints.endpoint_id
left join marts.fct_latency as latency
    on
        days.account = latency.account
        and days.usage_date = latency.usage_date
        and days.endpoint_id = latency.endpoint_id

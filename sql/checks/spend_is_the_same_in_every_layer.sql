-- The sum of cost_total per account and currency is one number, from raw to report.
with

layers as (
    select
        _account as account,
        coalesce(currency, 'XXX') as currency,
        'raw.usage' as layer,
        cost_total
    from raw.usage
    union all
    select
        account,
        currency,
        'marts.fct_usage' as layer,
        cost_total
    from marts.fct_usage
    union all
    select
        account,
        currency,
        'reports.rpt_spend_daily' as layer,
        cost_total
    from reports.rpt_spend_daily
),

totals as (
    select
        account,
        currency,
        sum(case when layer = 'raw.usage' then cost_total else 0 end) as raw_cost_total,
        sum(case when layer = 'marts.fct_usage' then cost_total else 0 end) as fact_cost_total,
        sum(case when layer = 'reports.rpt_spend_daily' then cost_total else 0 end) as report_cost_total
    from layers
    group by account, currency
)

select * from totals
where raw_cost_total <> fact_cost_total or fact_cost_total <> report_cost_total

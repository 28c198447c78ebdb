-- How long the credits last at recent daily spend. Model APIs only; credits also pay for serverless and compute.
-- grain: account, balance_date
with

readings as (
    select
        *,
        row_number() over (partition by account, balance_date order by read_at desc) as recency
    from marts.fct_credit_balance
),

balances as (
    select
        account,
        balance_date,
        currency,
        balance as current_balance
    from readings
    where recency = 1
),

-- Days that had ended when they were extracted: an unfinished day would make the credits seem to last longer.
full_days as (
    select
        account,
        cast(utc(window_start) as date) as usage_date
    from ops.loads
    where resource = 'usage' and is_current and not is_provisional
),

spend as (
    select
        account,
        usage_date,
        currency,
        sum(cost_total) as cost_total
    from staging.int_usage_daily
    group by account, usage_date, currency
),

burns as (
    select
        balances.account,
        balances.balance_date,
        balances.balance_date <= full_days.usage_date + interval '7 days' as is_last_7_days,
        coalesce(spend.cost_total, 0) as cost_total
    from balances
    inner join full_days
        on
            balances.account = full_days.account
            and balances.balance_date > full_days.usage_date
            and balances.balance_date <= full_days.usage_date + interval '30 days'
    left join spend
        on
            balances.account = spend.account
            and balances.currency = spend.currency
            and full_days.usage_date = spend.usage_date
),

averages as (
    select
        account,
        balance_date,
        quotient(sum(case when is_last_7_days then cost_total end), sum(case when is_last_7_days then 1 end))
            as burn_7_days,
        quotient(sum(cost_total), count(*)) as burn_30_days
    from burns
    group by account, balance_date
),

runways as (
    select
        balances.*,
        averages.burn_7_days,
        averages.burn_30_days,
        case
            when balances.current_balance <= 0 then cast(0 as decimal(38, 12))
            else quotient(
                balances.current_balance, coalesce(nullif(averages.burn_7_days, 0), averages.burn_30_days)
            )
        end as days_left
    from balances
    left join averages
        on balances.account = averages.account and balances.balance_date = averages.balance_date
)

select
    account,
    balance_date,
    currency,
    current_balance,  -- credit left when it was last extracted on that day; negative where more was used than paid for
    burn_7_days,  -- average spend per full day of the 7 days before; null where none of them is loaded
    burn_30_days,  -- average spend per full day of the 30 days before; null where none of them is loaded
    days_left,  /* current_balance / burn_7_days, or / burn_30_days where the 7 days cost nothing; 0 where no credit is
    left; null without spend */
    case when days_left < 36525 then balance_date + cast(floor(days_left) as integer) end
        as empty_on  -- the day on which the credit ends at this burn; null where that is a century away or more
from runways

-- Usage against billing events, day by day: do fal's two ledgers show the same cost? Model APIs only.
-- grain: account, usage_date, endpoint_id, currency
-- days: usage_date
with

feeds as (
    select
        account,
        cast(utc(window_start) as date) as usage_date,
        bool_or(resource = 'usage') as is_usage_loaded,
        bool_or(resource = 'billing_events') as is_events_loaded,
        count(*) = 2 and not bool_or(is_provisional) as is_closed,
        bool_and(is_settled) as is_settled
    from ops.loads
    where is_current and resource in ('usage', 'billing_events')
    group by account, cast(utc(window_start) as date)
),

-- A window may have been refused because of such rows, so they count for all of its endpoints.
quarantined as (
    select
        account,
        cast(utc(window_start) as date) as usage_date,
        bool_or(resource = 'usage') as is_usage_quarantined,
        bool_or(resource = 'billing_events') as is_events_quarantined
    from ops.quarantine
    where resolved_at is null and resource in ('usage', 'billing_events')
    group by account, cast(utc(window_start) as date)
),

-- Windows that keep what was proven before, because fal now returns fewer rows.
held as (
    select
        account,
        cast(utc(window_start) as date) as usage_date,
        bool_or(resource = 'usage') as is_usage_held,
        bool_or(resource = 'billing_events') as is_events_held
    from ops.holds
    where resource in ('usage', 'billing_events')
    group by account, cast(utc(window_start) as date)
),

-- Windows whose last extract was refused by a check.
refused as (
    select
        account,
        cast(utc(window_start) as date) as usage_date,
        bool_or(resource = 'usage') as is_usage_refused,
        bool_or(resource = 'billing_events') as is_events_refused
    from ops.failures
    where exit_code = 3 and resource in ('usage', 'billing_events')
    group by account, cast(utc(window_start) as date)
),

restated as (
    select distinct
        account,
        cast(utc(window_start) as date) as usage_date,
        endpoint_id
    from ops.restatements
    where resource in ('usage', 'billing_events')
),

usage_costs as (
    select
        lines.account,
        lines.usage_date,
        lines.endpoint_id,
        lines.currency,
        count(*) as line_count,
        count(*) > count(coalesce(known.unit, named.unit)) as has_unknown_unit,
        sum(lines.cost_total) as cost_total
    from marts.fct_usage as lines
    left join staging.seed_unit as known
        on lower(trim(lines.unit)) = known.unit
    left join staging.seed_unit as named
        on unit_name(lines.unit) = named.unit
    group by lines.account, lines.usage_date, lines.endpoint_id, lines.currency
),

charges as (
    select
        *,
        'USD' as currency
    from staging.int_charges_daily
),

compared as (
    select
        coalesce(usage_costs.account, charges.account) as account,
        coalesce(usage_costs.usage_date, charges.usage_date) as usage_date,
        coalesce(usage_costs.endpoint_id, charges.endpoint_id) as endpoint_id,
        coalesce(usage_costs.currency, charges.currency) as currency,
        usage_costs.cost_total as usage_cost_total,
        charges.cost_total as events_cost_total,
        coalesce(usage_costs.cost_total, 0) - coalesce(charges.cost_total, 0) as difference,
        (coalesce(usage_costs.line_count, 0) + coalesce(charges.charge_count, 0)) * 0.0000000005 as tolerance,
        charges.charge_count,
        coalesce(usage_costs.has_unknown_unit, false)
        or coalesce(charges.charges_without_unit, 0) > 0 as has_unknown_unit,
        coalesce(charges.repeated_charge_count, 0) > 0 as has_repeated_charge
    from usage_costs
    full join charges
        on
            usage_costs.account = charges.account
            and usage_costs.usage_date = charges.usage_date
            and usage_costs.endpoint_id = charges.endpoint_id
            and usage_costs.currency = charges.currency
),

conspicuous_days as (
    select
        account,
        usage_date
    from held
    union distinct
    select
        account,
        usage_date
    from refused
),

days_with_lines as (
    select distinct
        account,
        usage_date
    from compared
),

-- A held or refused day without any line gets one line of its own.
lines as (
    select * from compared
    union all
    select
        days.account,
        days.usage_date,
        null as endpoint_id,
        'XXX' as currency,
        null as usage_cost_total,
        null as events_cost_total,
        null as difference,
        null as tolerance,
        null as charge_count,
        false as has_unknown_unit,
        false as has_repeated_charge
    from conspicuous_days as days
    left join days_with_lines
        on days.account = days_with_lines.account and days.usage_date = days_with_lines.usage_date
    where days_with_lines.account is null
),

judged as (
    select
        compared.*,
        coalesce(feeds.is_usage_loaded, false) as is_usage_loaded,
        coalesce(feeds.is_events_loaded, false) as is_events_loaded,
        coalesce(feeds.is_closed, false) as is_closed,
        coalesce(feeds.is_settled, false) as is_settled,
        coalesce(held.is_usage_held, false) as is_usage_held,
        coalesce(held.is_events_held, false) as is_events_held,
        coalesce(refused.is_usage_refused, false) as is_usage_refused,
        coalesce(refused.is_events_refused, false) as is_events_refused,
        bool_or(compared.currency <> 'USD') over (
            partition by compared.account, compared.usage_date, compared.endpoint_id
        ) as has_other_currency,
        coalesce(quarantined.is_usage_quarantined, false) as is_usage_quarantined,
        coalesce(quarantined.is_events_quarantined, false) as is_events_quarantined,
        restated.endpoint_id is not null as is_restated,
        case
            when held.account is not null then 'held'
            when refused.account is not null then 'refused'
            when not feeds.is_closed or compared.currency <> 'USD' then 'open'
            when abs(compared.difference) <= compared.tolerance then 'matched'
            when not feeds.is_settled then 'settling'
            else 'differs'
        end as status
    from lines as compared
    left join feeds
        on compared.account = feeds.account and compared.usage_date = feeds.usage_date
    left join held
        on compared.account = held.account and compared.usage_date = held.usage_date
    left join refused
        on compared.account = refused.account and compared.usage_date = refused.usage_date
    left join quarantined
        on compared.account = quarantined.account and compared.usage_date = quarantined.usage_date
    left join restated
        on
            compared.account = restated.account
            and compared.usage_date = restated.usage_date
            and compared.endpoint_id = restated.endpoint_id
)

select
    account,
    usage_date,
    endpoint_id,
    currency,
    usage_cost_total,  -- cost in usage; null where usage has no row for the endpoint: pending or unknown, not zero
    events_cost_total,  -- cost in billing events; null where there are none: pending or unknown, not zero
    case
        when
            (usage_cost_total is not null and events_cost_total is not null)
            or status in ('matched', 'differs')
            then difference
    end as difference,  -- usage minus billing events; once the day is settled, a missing side counts as zero
    charge_count,  -- number of charges; null where there are none
    status,  /* held: the day keeps its proven rows, because fal now returns fewer; refused: a check refused its last
    extract; open: usage or billing events are not loaded for the whole day, or the currency is not USD; settling: the
    costs differ, but charges may still arrive; matched: the costs agree; differs: the costs of a settled day differ */
    case
        when status = 'matched' then null
        when is_usage_held then 'usage held'
        when is_events_held then 'billing events held'
        when is_usage_quarantined then 'usage quarantined'
        when is_events_quarantined then 'billing events quarantined'
        when is_usage_refused then 'usage refused'
        when is_events_refused then 'billing events refused'
        when not is_usage_loaded then 'usage not loaded'
        when not is_events_loaded then 'billing events not loaded'
        when not is_closed then 'day still open'
        when has_other_currency then 'other currency'
        when is_restated then 'restated'
        when not is_settled then 'day not settled'
        when has_repeated_charge then 'charges repeated'
        when has_unknown_unit then 'unit unknown'
        when events_cost_total is null then 'no charges'
        when usage_cost_total is null then 'no usage'
        when events_cost_total < usage_cost_total then 'charges cost less'
        else 'charges cost more'
    end as reason  /* why the two sides are not matched: the first that applies of usage held, billing events held,
    usage quarantined, billing events quarantined, usage refused, billing events refused, usage not loaded, billing
    events not loaded, day still open, other currency (billing events are in USD), restated (fal changed a line of
    the endpoint after the day had ended), day not settled (charges may still arrive), charges repeated (some repeat
    another charge in every identifying field), unit unknown, no charges, no usage, charges cost less, charges cost
    more; null where matched */
from judged

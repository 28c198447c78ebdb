-- Single charges of at least FALETL_RUNAWAY_MIN_COST: the candidates for runaway charges.
-- grain: account, event_hash, event_ordinal
-- days: usage_date
select
    events.account,
    events.event_hash,
    events.event_ordinal,
    events.requested_at,
    events.usage_date,
    events.request_id,
    events.endpoint_id,
    events.credential_id,
    events.unit,  -- billing unit as fal writes it; null where fal gives none
    events.unit_price,
    events.quantity,
    events.currency,
    events.cost_total,
    events.load_id
from staging.stg_fal__billing_events as events
inner join staging.seed_threshold as floors
    on floors.name = 'runaway_min_cost' and events.cost_total >= floors.value

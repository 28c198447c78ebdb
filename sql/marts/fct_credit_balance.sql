-- The credit balance over time: a level, never to be summed. Readings without news go (faletl maintain).
-- grain: account, read_at
select
    account,
    read_at,
    cast(read_at as date) as balance_date,  -- UTC day of the reading
    current_balance as balance,  -- credit left
    currency
from staging.stg_fal__credits

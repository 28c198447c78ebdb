-- The credit balance over time: a level, never to be summed. faletl maintain deletes old readings that repeat a value.
-- grain: account, read_at
select
    account,
    read_at,
    cast(read_at as date) as balance_date,  -- UTC day on which the balance was extracted
    current_balance as balance,  -- credit that is left
    currency
from staging.stg_fal__credits

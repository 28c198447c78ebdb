-- The credit balance, each time it was extracted.
-- grain: account, read_at
select
    _account as account,  -- account label: fal's username, or FALETL_ACCOUNT
    utc(_snapshot_at) as read_at,  -- when the balance was extracted, UTC
    current_balance,
    currency_code(currency) as currency,  -- ISO 4217 code of the row's amounts; XXX when fal gave none
    _load_id as load_id  -- the load that brought the row; see ops.loads
from raw.credits

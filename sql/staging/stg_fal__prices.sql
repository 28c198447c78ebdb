-- List price per unit of each endpoint in each snapshot.
-- grain: account, snapshot_at, endpoint_id
select
    _account as account,  -- account label: fal's username, or FALETL_ACCOUNT
    utc(_snapshot_at) as snapshot_at,  -- instant of the snapshot, UTC
    endpoint_id,
    unit,
    unit_price,
    currency_code(currency) as currency,  -- ISO 4217 code of the row's amounts; XXX when fal gave none
    _load_id as load_id  -- the load that brought the row; see ops.loads
from raw.prices

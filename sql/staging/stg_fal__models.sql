-- The catalogue of model endpoints in each snapshot.
-- grain: account, snapshot_at, endpoint_id
select
    _account as account,  -- account label: fal's username, or FALETL_ACCOUNT
    utc(_snapshot_at) as snapshot_at,  -- instant of the snapshot, UTC
    endpoint_id,
    display_name,
    category,
    description,
    status,
    group_key,
    group_label,
    kind,
    license_type,
    model_url,
    _load_id as load_id  -- the load that brought the row; see ops.loads
from raw.models

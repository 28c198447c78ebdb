-- What the ledger calls current stands in raw.usage, row for row, and nothing else does.
with

held as (
    select
        _account as account,
        _load_id as load_id,
        count(*) as held_rows
    from raw.usage
    group by _account, _load_id
),

entered as (
    select
        account,
        load_id,
        rows as entered_rows
    from ops.loads
    where resource = 'usage' and is_current
)

select
    coalesce(held.load_id, entered.load_id) as load_id,
    held.held_rows,
    entered.entered_rows
from held
full join entered
    on held.account = entered.account and held.load_id = entered.load_id
where coalesce(held.held_rows, 0) <> coalesce(entered.entered_rows, 0)

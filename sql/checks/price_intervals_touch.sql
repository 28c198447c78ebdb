-- Price intervals of an endpoint follow each other without a gap, and only the last one is open.
with

intervals as (
    select
        *,
        lead(valid_from) over (partition by account, endpoint_id order by valid_from) as next_valid_from
    from marts.dim_price
)

select * from intervals
where
    valid_to is distinct from next_valid_from
    or is_current <> (valid_to is null)
    or valid_to <= valid_from

"""From which length a sparse method is faster than dense attention, read from recorded rows."""

__all__ = ["break_even"]


def break_even(rows):
    """The break-even length of each op, set of options and pass that was timed beside dense attention.

    It is the smallest T of the measured grid from which the op is faster than the fastest dense attention of
    the same run, there and at every longer T measured. The op is its kernel; where it has none, plain torch.

    Args:
        rows: of a record.

    Returns:
        A list of dicts: op, options, dtype, pass; T, None where it is slower at the longest length; grid, the
        lengths compared, rising; ratios, dense time over the op's at each.
    """
    own, dense = {}, {}
    for row in (row for row in rows if "ms" in row):
        key, T = (row["op"], str(row.get("options")), row["dtype"], row["pass"]), row["shape"]["T"]
        if row["impl"].endswith((", all tokens", ", all earlier tokens")):
            dense.setdefault(key, {}).setdefault(T, []).append(row["ms"])
        elif row["impl"] in ("triton", "torch"):
            own.setdefault(key, {}).setdefault(row["impl"], {})[T] = row
    results = []
    for key, impls in own.items():
        mine = impls.get("triton") or impls["torch"]
        ratio = {T: min(dense[key][T]) / mine[T]["ms"] for T in sorted(mine) if T in dense.get(key, {})}
        if ratio:
            row, slow = next(iter(mine.values())), max((T for T in ratio if ratio[T] <= 1), default=0)
            results.append({
                "op": row["op"], "options": row["options"], "dtype": row["dtype"], "pass": row["pass"],
                "T": min((T for T in ratio if T > slow), default=None),
                "grid": list(ratio), "ratios": list(ratio.values()),
            })  # fmt: skip
    return results

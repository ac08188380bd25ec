"""Which rows of a data set are held out: the same ones for a tokenizer and its generator."""

# one in so many
_EVERY = 20


def split(count: int) -> tuple[list[int], list[int]]:
    """Rows to learn from, and rows held out.

    Raises:
        ValueError: If there are too few rows for that.
    """
    first = _EVERY // 2
    if count <= first:
        raise ValueError(f"{count} rows are too few; {first + 1} are the least, one held out")
    held_out = range(first, count, _EVERY)
    chosen = set(held_out)
    return [row for row in range(count) if row not in chosen], list(held_out)

"""When a term starts."""


def ramp(step: int, start: int = 0, length: int = 0) -> float:
    """The share of its weight that a term has at a step: 0 before `start`, later 1.

    Over `length` further steps it rises linearly, from more than 0 at `start`. Where it is 0, leave
    the term out of the step, so that nothing of it is computed.

    Args:
        step: The number of the step.
        start: The first step with the term.
        length: How many steps later it has its full weight.

    Raises:
        ValueError: If `length` is negative.

    Examples:
        >>> [ramp(step, start=2, length=4) for step in (0, 1, 4, 8)]
        [0.0, 0.0, 0.6, 1.0]
    """
    if length < 0:
        raise ValueError(f"ramp needs length >= 0 steps, got {length}")
    return min(max(step - start + 1, 0) / (length + 1), 1.0)

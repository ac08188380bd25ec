"""Independent copies of a quantizer, for composites that were given one and a count."""

import copy

from torch import nn

from xq.quantizers.base import Quantizer


def replicate(quantizer: Quantizer, count: int) -> list[Quantizer]:
    """`count` copies, each drawn anew.

    Raises:
        ValueError: If a part cannot be copied, or has tensors but no `reset_parameters`.
    """
    name = type(quantizer).__name__
    for part in quantizer.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if own and not hasattr(part, "reset_parameters"):
            raise ValueError(
                f"{type(part).__name__} in {name} has parameters but no reset_parameters(), so its "
                "copies would be equal; write one, or pass a list of quantizers"
            )
    try:
        copies = [copy.deepcopy(quantizer) for _ in range(count)]
    except Exception as error:
        raise ValueError(f"{name} cannot be copied ({error}); pass a list of quantizers") from error
    for module in copies:
        _reset(module)
    return copies


def _reset(module: nn.Module) -> None:
    # children first: a parent may have its own way to start them
    for part in reversed(list(module.modules())):
        reset = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()

"""What tells quantizers apart: tokens mean something to the one that made them alone."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from xq.config import describe
from xq.quantizers import Codebook, Quantizer, Wrapper

# of a `VQ`: how its codes learn; what they are is among the weights
_NO_MATTER = ("codebook",)
# entries of a list of differences that are worth reading
_SHOWN = 4


def signature(quantizer: Any) -> dict[str, Any]:
    """What a quantizer must share with another to give the same meaning to tokens, as JSON.

    Sizes, constructor arguments, and a hash of all weights in float32. Of a codebook these are the
    codes alone, without the statistics that they are learned from.

    Raises:
        ValueError: If it is no quantizer.
    """
    if not isinstance(quantizer, Quantizer | Wrapper):
        raise ValueError(
            f"a token store belongs to a quantizer, got {type(quantizer).__name__}; "
            "of a tokenizer, pass its .quantizer"
        )
    try:
        config = describe(quantizer)
    except TypeError:
        # a leaf of one's own may have no config(); it goes by its name
        config = {"class": type(quantizer).__name__}
    return {
        "codebook_size": quantizer.codebook_size,
        "code_shape": list(quantizer.code_shape),
        "grids": [list(grid) for grid in quantizer.grids],
        "config": config,
        "weights": _hash(quantizer),
    }


def check_same(what: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises a `ValueError` that begins with `what` and lists where two records differ.

    Arguments that only one of them has do not count: another version of the class made it.
    """
    found = list(_differences(there, json.loads(json.dumps(here)), ""))
    # other weights are no news where arguments differ
    found = [text for text in found if "weights" not in text] or found
    if found:
        more = f"; {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(f"{what}: {'; '.join(found[:_SHOWN])}{more}")


def _hash(quantizer: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in _weights(quantizer):
        exact = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(str(tuple(exact.shape)).encode())
        digest.update(exact.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights(quantizer: nn.Module) -> list[Tensor]:
    state = quantizer.state_dict()
    for name, module in quantizer.named_modules():
        codes = f"{name}.weight"
        if isinstance(module, Codebook) and codes in state:
            prefix = f"{name}."
            state = {k: v for k, v in state.items() if k == codes or not k.startswith(prefix)}
    return list(state.values())


def _differences(there: Any, here: Any, name: str) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        if there.get("class") != here.get("class"):
            name = f"{name}.class".lstrip(".")
            yield from _differences(there.get("class"), here.get("class"), name)
            return
        for key in there:
            if key in here and key not in _NO_MATTER:
                yield from _differences(there[key], here[key], f"{name}.{key}".lstrip("."))
    elif _are_modules(there) and _are_modules(here) and len(there) == len(here):
        for i, (one, other) in enumerate(zip(there, here, strict=True)):
            yield from _differences(one, other, f"{name}.{i}")
    elif there != here:
        yield f"{name} is {_short(there)} there, {_short(here)} here"


def _are_modules(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:10]}..."

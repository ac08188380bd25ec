"""Adapters of peft within a state dict, merged into the weights that they adapt."""

import re
from collections.abc import Mapping

from torch import Tensor

# peft's default; files of weights do not hold it
_ALPHA = 8
_A = re.compile(r"(.+)\.lora_A\.(\w+)\.weight")
_SAVED = re.compile(r"(.+)\.modules_to_save\.(\w+)\.(.+)")


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without adapters: `base + B A * 8 / r`, and trained copies instead of originals.

    Hu et al. 2021, LoRA, section 4.1. The factor is that of peft's default `lora_alpha=8`, as in
    XQ-GAN, where r is 8 too. A state dict without adapters comes back as it is.

    Raises:
        ValueError: If a module has several adapters, or a part of one is missing.
    """
    if not any(".lora_A." in key or ".modules_to_save." in key for key in state):
        return dict(state)
    state = {key.replace(".base_model.model.", "."): tensor for key, tensor in state.items()}
    merged: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".lora_" in key or ".original_module." in key:
            continue
        if match := _SAVED.fullmatch(key):
            key = f"{match[1]}.{match[3]}"
        key = key.replace(".base_layer.", ".")
        if key in merged:
            raise ValueError(f"{key} has several adapters; merge one and save it with peft")
        merged[key] = tensor
    updated: set[str] = set()
    for key, down in state.items():
        if match := _A.fullmatch(key):
            target, up = f"{match[1]}.weight", f"{match[1]}.lora_B.{match[2]}.weight"
            if up not in state or target not in merged:
                raise ValueError(f"{key} lacks its {up if up not in state else target}")
            if target in updated:
                raise ValueError(f"{target} has several adapters; merge one and save it with peft")
            updated.add(target)
            change = state[up].float() @ down.float() * (_ALPHA / len(down))
            weight = merged[target]
            merged[target] = (weight.float() + change.reshape(weight.shape)).to(weight.dtype)
    return merged

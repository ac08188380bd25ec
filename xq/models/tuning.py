"""How much of a pretrained ViT trains: all of it, what surrounds it, or low-rank updates (LoRA).

Fully is the default. Encoder and decoder are set apart:

    add_lora_(model.encoder)
    freeze_(model.decoder)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
"""

import json
import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xq.backbones import PathLike, imported
from xq.models.vit_backbone import ViTPart

# those that XQ-GAN adapts
MLP = r"blocks\.\d+\.mlp\.fc[12]"
_SETTINGS = "lora"


def freeze_(vit: nn.Module) -> nn.Module:
    """Freezes a ViT's backbone; queries, mask token, levels and projections train on.

    As XQ-GAN's "frozen" tuning. An optimizer may hold the frozen weights, it does not move them.

    Args:
        vit: A `ViTEncoder` or `ViTDecoder`.

    Raises:
        ValueError: If it is neither.
    """
    _as_vit("freeze_", vit).backbone.requires_grad_(False)
    return vit


def add_lora_(
    vit: nn.Module, rank: int = 8, alpha: float = 8.0, *, targets: str = MLP, dropout: float = 0.0
) -> nn.Module:
    r"""Adds low-rank updates to layers of a ViT's backbone, in place (Hu et al. 2022, LoRA).

    The layers' own weights stay as they are, bit for bit. As in XQ-GAN, both layers of each MLP get
    updates, the last normalization trains fully, and so does all outside of the backbone. The
    output changes with the first step only. Adds parameters: **build the optimizer afterwards**
    (`check_optimizer` tells).

    Args:
        vit: A `ViTEncoder` or `ViTDecoder`.
        rank: Of the updates.
        alpha: Times the updates, over `rank`.
        targets: A regular expression for the whole name of a layer in the backbone;
            r"blocks\.\d+\.attn\.(qkv|proj)" are those of the attention.
        dropout: Of the updates' input.

    Raises:
        ImportError: If peft is missing; `pip install "xq[vision]"` brings it.
        ValueError: If it has LoRA already, no layer has such a name, or a number does not fit.
    """
    vit = _as_vit("add_lora_", vit)
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"add_lora_ needs rank >= 1, alpha > 0 and 0 <= dropout < 1, got rank={rank}, "
            f"alpha={alpha}, dropout={dropout}"
        )
    if _adapted(vit):
        raise ValueError(
            f"add_lora_ found LoRA layers in this {type(vit).__name__}; merge_lora_ makes them "
            "part of the weights first"
        )
    backbone = vit.backbone
    layers = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not any(re.fullmatch(targets, name) for name, _ in layers):
        names = ", ".join(name for name, _ in layers[:6])
        raise ValueError(
            f"add_lora_ finds no layer for targets={targets!r} in {vit.backbone_name}, whose "
            f"layers are {names} and so on; the expression is for the whole name"
        )
    peft = imported("peft", "add_lora_", "peft")
    settings = {"rank": rank, "alpha": alpha, "targets": targets, "dropout": dropout}
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout)
    peft.inject_adapter_in_model(config, backbone)
    vit.lora = settings
    backbone.norm.requires_grad_(True)
    return vit


def merge_lora_(model: nn.Module) -> nn.Module:
    """Makes the LoRA layers within a model part of the plain weights, in place.

    Names are again those of a model without LoRA, and the whole backbone trains again.

    Args:
        model: What holds LoRA layers.

    Raises:
        ValueError: If there are none.
    """
    for vit in _with_lora("merge_lora_", model).values():
        layers = {n: m for n, m in vit.backbone.named_modules() if hasattr(m, "lora_A")}
        for name, layer in layers.items():
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(vit.backbone.get_submodule(parent), child, layer.get_base_layer())
        del vit.backbone.peft_config
        vit.lora = None
        vit.backbone.requires_grad_(True)
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model but for the weights that LoRA leaves as they were.

    So these are the updates, the last normalizations and all that is outside of the adapted
    backbones: together with the backbones it started from, this is the whole model.

    Args:
        model: What holds LoRA layers.

    Raises:
        ValueError: If there is no LoRA in it.
    """
    left = _left_alone(_with_lora("lora_state_dict", model))
    return {key: value for key, value in model.state_dict().items() if key not in left}


def save_lora(model: nn.Module, path: PathLike) -> None:
    """Writes `lora_state_dict` as safetensors, with what `load_lora_` needs to know.

    Args:
        model: What holds LoRA layers.
        path: The file.

    Raises:
        ValueError: If there is no LoRA in the model.
    """
    settings = {name: vit.lora for name, vit in _with_lora("save_lora", model).items()}
    state = {key: value.detach().contiguous() for key, value in lora_state_dict(model).items()}
    save_file(state, path, metadata={_SETTINGS: json.dumps(settings)})


@torch.no_grad()
def load_lora_(model: nn.Module, path: PathLike) -> nn.Module:
    """Adds what `save_lora` wrote to a model that has the same backbones, in place.

    A model without LoRA gets the layers, one with them takes the file's weights. All of the file is
    read, and all but the backbones' own weights is set.

    Args:
        model: As it was before `add_lora_`, or with its layers.
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of LoRA, or of another model.
    """
    settings, state = _read(path)
    parts = dict(model.named_modules())
    for name, wanted in settings.items():
        vit = parts.get(name)
        if not isinstance(vit, ViTPart):
            raise ValueError(
                f"{path} has LoRA for the part {name!r}, which is no ViT of this model"
            )
        if _adapted(vit) and vit.lora != wanted:
            raise ValueError(f"{path} has LoRA with {wanted}, {name or 'the model'} {vit.lora}")
    before = {name for name, vit in parts.items() if isinstance(vit, ViTPart) and _adapted(vit)}
    if before - settings.keys():
        raise ValueError(f"{path} has no LoRA for {sorted(before - settings.keys())}")
    for name in settings.keys() - before:
        add_lora_(parts[name], **settings[name])
    try:
        _set(model, state, path)
    except ValueError:
        # updates of zero leave the weights as they were
        for name in settings.keys() - before:
            merge_lora_(parts[name])
        raise
    return model


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that does not hold all parameters that train.

    So does one that was built before `add_lora_`, and would leave the updates at zero.

    Args:
        model: What is to be trained.
        optimizer: Of its parameters.

    Raises:
        ValueError: If it lacks some; the message names them.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        raise ValueError(
            f"{type(optimizer).__name__} does not hold {len(lost)} parameters that train "
            f"({', '.join(lost[:3])}); build it after add_lora_, from model.parameters()"
        )


def _as_vit(function: str, vit: nn.Module) -> ViTPart:
    if not isinstance(vit, ViTPart):
        raise ValueError(
            f"{function} takes a ViTEncoder or ViTDecoder, got a {type(vit).__name__}; "
            "for a tokenizer call it with model.encoder and model.decoder"
        )
    return vit


def _adapted(vit: ViTPart) -> bool:
    return vit.lora is not None


def _with_lora(function: str, model: nn.Module) -> dict[str, Any]:
    modules = model.named_modules()
    found = {n: m for n, m in modules if isinstance(m, ViTPart) and _adapted(m)}
    if not found:
        raise ValueError(
            f"{function} finds no LoRA in this {type(model).__name__}; add_lora_ adds it to its "
            "ViTEncoder or ViTDecoder"
        )
    return found


def _left_alone(vits: dict[str, Any]) -> set[str]:
    """The names of the weights that LoRA does not train."""
    left = set()
    for name, vit in vits.items():
        prefix = f"{name}." if name else ""
        for key in vit.backbone.state_dict():
            if ".lora_" not in key and not key.startswith("norm."):
                left.add(f"{prefix}backbone.{key}")
    return left


def _read(path: PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get(_SETTINGS, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if not settings:
        raise ValueError(f"{path} is none of save_lora, which writes what the LoRA layers are")
    return settings, state


def _set(model: nn.Module, state: dict[str, Tensor], path: PathLike) -> None:
    want = lora_state_dict(model)
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or extra:
        raise ValueError(
            f"{path} is of another model: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
        )
    for key, value in want.items():
        if value.shape != state[key].shape:
            raise ValueError(
                f"{path} has {key} of shape {tuple(state[key].shape)}, the model of "
                f"{tuple(value.shape)}"
            )
    for key, value in want.items():
        value.copy_(state[key])

"""What a configuration names: tokenizer, discriminator, perceptual distance, teachers."""

import inspect
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.network import SmallDecoder, SmallEncoder
from xq.backbones import timm_model
from xq.config import build
from xq.distributed import broadcast_
from xq.losses import (
    LPIPS,
    CLIPTeacher,
    ContrastiveLoss,
    DINODiscriminator,
    FeatureAlignment,
    PatchGAN,
    StyleGANDiscriminator,
    Teacher,
    TimmTeacher,
)
from xq.models import Tokenizer, add_lora_, fit_pca_, freeze_, presets
from xq.models.checkpoints import load_checkpoint

# your tokenizer's own classes go here
CLASSES = (SmallEncoder, SmallDecoder)
PRESETS = sorted(name for name, make in vars(presets).items() if inspect.isfunction(make))
DISCRIMINATORS = {
    "dino": DINODiscriminator,
    "patchgan": PatchGAN,
    "stylegan": StyleGANDiscriminator,
}
TUNINGS = ("full", "lora", "frozen")


def make_tokenizer(model: Any) -> Tokenizer:
    """The tokenizer to start from, with what trains of it.

    Raises:
        ValueError: If settings contradict each other, or something is unknown or does not fit.
    """
    if bool(model.preset) and bool(model.tokenizer):
        raise ValueError("model.preset and model.tokenizer are two tokenizers; leave one out")
    if model.pretrained and not model.preset:
        raise ValueError(
            "model.pretrained is for a model.preset; a ViT of model.tokenizer takes pretrained = "
            "true as an argument, or model.weights"
        )
    tokenizer = None
    if model.preset:
        tokenizer = _preset(model)
    elif model.tokenizer:
        tokenizer = build({"class": "Tokenizer", **model.tokenizer}, CLASSES)
    elif not model.init:
        raise ValueError(
            "no tokenizer: --config NAME takes a configuration, --model.preset one of "
            f"{', '.join(PRESETS)}, --init FILE a checkpoint"
        )
    if model.weights:
        _load_backbones_(tokenizer, model.weights)
    if model.init:
        tokenizer = _loaded(tokenizer, model.init)
    assert tokenizer is not None
    for name in ("encoder", "decoder"):
        _tune_(getattr(tokenizer, name), getattr(model, name), model)
        if model.checkpointing:
            part = getattr(tokenizer, name)
            # a transformer may be a part of what it is given as
            networks = [module for module in part.modules() if hasattr(module, "checkpointing")]
            if not networks:
                raise ValueError(
                    f"model.checkpointing is for transformers, not for a {type(part).__name__}"
                )
            for network in networks:
                network.checkpointing = True
    return tokenizer


@torch.no_grad()
def start_at_pca_(tokenizer: Tokenizer, images: Float[Tensor, "b c h w"]) -> None:
    """Lets the linear parts carry the images' principal components; the others start at zero.

    Raises:
        ValueError: If encoder and decoder are no sums with a part "linear", or differ there.
    """
    sums = tokenizer.encoder, tokenizer.decoder
    ends: list[Any] = [getattr(each, "parts", {}) for each in sums]
    if not all("linear" in parts for parts in ends):
        raise ValueError(
            'model.pca needs a Sum with a part "linear" as encoder and as decoder, got '
            f"{' and '.join(type(each).__name__ for each in sums)}"
        )
    forth, back = (parts["linear"] for parts in ends)
    fit_pca_(forth, back, images)
    # dealt out, so that all branches of a product get their share
    branches = getattr(tokenizer.quantizer, "P", 1)
    order = torch.arange(forth.dim).view(-1, branches).T.flatten()
    forth.linear.weight.copy_(forth.linear.weight[order])
    forth.linear.bias.copy_(forth.linear.bias[order])
    back.linear.weight.copy_(back.linear.weight[:, order])
    for name, part in chain(*(parts.items() for parts in ends)):
        if name != "linear":
            part.zero_output_()
    # processes saw images of their own
    broadcast_([p.data for part in (forth, back) for p in part.parameters()])


def compile_(tokenizer: Tokenizer, backend: str) -> None:
    """Compiles the networks in place, piece by piece: blocks of transformers, parts of others.

    What makes the pixels is left out, so that gradients there (the adaptive weight's) stay cheap.

    Raises:
        ValueError: If there is no such backend.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ValueError(f"model.compile is a backend such as {known}; got {backend!r}")
    for part in (tokenizer.encoder, tokenizer.decoder):
        backbone = getattr(part, "backbone", None)
        last = getattr(part, "last_layer", None)
        for child in part.children() if backbone is None else [backbone.blocks]:
            # lists are called item by item
            called = child if isinstance(child, nn.ModuleList | nn.Sequential) else [child]
            for piece in called:
                if not any(p is last for p in piece.parameters()):
                    piece.compile(backend=backend)


def make_discriminator(settings: Any) -> nn.Module | None:
    """The network that judges, or None.

    Raises:
        ValueError: If there is none of that name, or it does not take the arguments.
    """
    if not settings.kind:
        return None
    if settings.kind not in DISCRIMINATORS:
        raise ValueError(
            f"discriminator.kind is one of {', '.join(DISCRIMINATORS)} or empty, "
            f"got {settings.kind!r}"
        )
    try:
        return DISCRIMINATORS[settings.kind](**settings.arguments)
    except TypeError as error:
        raise ValueError(f"discriminator.arguments = {settings.arguments}: {error}") from error


def make_perceptual(loss: Any) -> LPIPS | None:
    """LPIPS where it weighs anything."""
    return LPIPS(loss.net, weights=loss.net_weights or None) if loss.perceptual else None


def make_alignments(config: Any, tokenizer: Tokenizer) -> nn.ModuleDict:
    """A `FeatureAlignment` for each of "semantic" and "detail" that weighs anything.

    Raises:
        ValueError: If a branch does not exist, or the projector cannot be shared.
    """
    found = nn.ModuleDict()
    teachers: dict[tuple[str, str], Teacher] = {}
    dims = getattr(tokenizer.quantizer, "dims", [tokenizer.quantizer.dim])
    for name in ("semantic", "detail"):
        part = getattr(config, name)
        if not part.weight:
            continue
        if not -len(dims) <= part.branch < len(dims):
            raise ValueError(f"{name}.branch = {part.branch}, and there are {len(dims)} branches")
        key = (part.teacher, part.teacher_weights)
        teachers[key] = teachers.get(key) or _teacher(name, part)
        projector = _shared(name, tokenizer, teachers[key]) if part.shared_projector else None
        found[name] = FeatureAlignment(
            teachers[key],
            dims[part.branch],
            level=part.level,
            loss=ContrastiveLoss(part.temperature, normalize=part.normalize),
            projector=projector,
        )
    return found


def coloured(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """Grey images for networks that take colours."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _preset(model: Any) -> Tokenizer:
    if model.preset not in PRESETS:
        raise ValueError(f"model.preset is one of {', '.join(PRESETS)}; got {model.preset!r}")
    make, arguments = getattr(presets, model.preset), build(dict(model.arguments), CLASSES)
    # whatever replaces them all, nothing is downloaded before
    if model.pretrained and not model.weights and not model.init:
        arguments["pretrained"] = True
    try:
        return make(**arguments)
    except TypeError as error:
        raise ValueError(f"model.preset = {model.preset!r} with {arguments}: {error}") from error


def _load_backbones_(tokenizer: Any, weights: str) -> None:
    for part in (tokenizer.encoder, tokenizer.decoder) if tokenizer else ():
        if hasattr(part, "load_backbone_"):
            source = timm_model(
                "model.weights", part.backbone_name, weights=weights, **part.options
            )
            part.load_backbone_(source)
            continue
        raise ValueError(f"model.weights are those of a ViT, not of a {type(part).__name__}")


def _loaded(tokenizer: Tokenizer | None, path: str) -> Tokenizer:
    """A tokenizer read from a file or folder; into the given one, which keeps its settings."""
    if not Path(path).is_dir():
        found = load_checkpoint(path, into=tokenizer)
    else:
        found = Tokenizer.from_pretrained(path, classes=CLASSES)
        if tokenizer is not None:
            try:
                tokenizer.load_state_dict(found.state_dict())
            except RuntimeError as error:
                raise ValueError(f"model.init = {path} is another tokenizer: {error}") from error
            found = tokenizer
    if not isinstance(found, Tokenizer):
        raise ValueError(f"model.init = {path} holds a {type(found).__name__}, no tokenizer")
    return found


def _tune_(part: nn.Module, how: str, model: Any) -> None:
    if how not in TUNINGS:
        raise ValueError(f"model.encoder and model.decoder are {', '.join(TUNINGS)}; got {how!r}")
    if how == "frozen":
        freeze_(part)
    elif how == "lora":
        add_lora_(part, model.lora_rank, model.lora_alpha)


def _teacher(name: str, part: Any) -> Teacher:
    if not part.teacher:
        raise ValueError(f"{name}.weight is {part.weight}, so {name}.teacher is needed")
    weights = {"weights": part.teacher_weights} if part.teacher_weights else {}
    if part.teacher.startswith("clip:"):
        return CLIPTeacher(part.teacher.removeprefix("clip:"), **weights)
    return TimmTeacher(part.teacher, **weights)


def _shared(name: str, tokenizer: Any, teacher: Teacher) -> nn.Module:
    projector = getattr(tokenizer.encoder, "quant_conv", None)
    width = getattr(projector, "in_features", None)
    if width != teacher.token_dim:
        raise ValueError(
            f"{name}.shared_projector needs an encoder whose projection takes the teacher's "
            f"{teacher.token_dim} channels; this {type(tokenizer.encoder).__name__} has {width}"
        )
    assert isinstance(projector, torch.nn.Module)
    return projector

"""What the encoder and the decoder around a vision transformer of timm have in common."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xq.backbones import PathLike, imported, timm_model
from xq.models.cnn_blocks import check_sizes
from xq.models.sizes import Pair, Size, checked_grid, checked_pair, plain_size
from xq.models.vit_weights import copy_weights_, resampled

# of timm's arguments, those that follow from others or would change the number of tokens
_TAKEN = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "image_channels",
    "drop_path_rate": "drop_path",
    "num_classes": "nothing, since there is no classifier",
    "patch_drop_rate": "nothing, since every patch is seen",
    "dynamic_img_size": "image_size",
    "dynamic_img_pad": "image_size",
}


class ViTPart(nn.Module):
    """A vision transformer of timm (`backbone`), its sizes, positions and blocks.

    Args:
        dim: Channels of the quantizer.
        backbone: The model's name in timm.
        image_size: Of images, a side or (height, width).
        patch_size: Of patches, likewise.
        tokens: Of the grid of tokens, likewise.
        drop_path: Rate of stochastic depth of the last block; it grows linearly from zero.
        checkpointing: Whether a training step recomputes blocks rather than keep what is in them.
        image_channels: Channels of images.
        pretrained: Whether timm's weights are downloaded.
        weights: A local file of the backbone.
        options: Further arguments of the model in timm.

    Raises:
        ValueError: If a size does not fit or timm's model is of another kind.
    """

    backbone: Any
    # what `add_lora_` added, if it did
    lora: dict[str, Any] | None

    def __init__(
        self,
        dim: int,
        *,
        backbone: str,
        image_size: Size,
        patch_size: Size,
        tokens: Size,
        drop_path: float,
        checkpointing: bool,
        image_channels: int,
        pretrained: bool,
        weights: PathLike | None,
        options: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.lora = None
        check_sizes(self, dim=dim, image_channels=image_channels)
        self.dim, self.image_channels = dim, image_channels
        self.image_size = checked_pair(self, "image_size", image_size)
        self.patch_size = checked_pair(self, "patch_size", patch_size)
        self.tokens = checked_pair(self, "tokens", tokens)
        self.grid = checked_grid(self, self.image_size, self.patch_size)
        if not 0 <= drop_path < 1:
            raise ValueError(f"{type(self).__name__} needs 0 <= drop_path < 1, got {drop_path}")
        self.drop_path, self.checkpointing = drop_path, checkpointing
        self.backbone_name, self.options = backbone, dict(options or {})
        self.backbone = self._make(pretrained, weights)

    def _make(self, pretrained: bool, weights: PathLike | None) -> nn.Module:
        name = type(self).__name__
        for option in self.options.keys() & _TAKEN.keys():
            raise ValueError(
                f"{name} leaves timm's {option} to {_TAKEN[option]}; take it out of options"
            )
        # without a class token there is no pooling of it, which timm would refuse
        pooling = {} if self.options.get("class_token", True) else {"global_pool": ""}
        try:
            model: Any = timm_model(
                name,
                self.backbone_name,
                pretrained=pretrained,
                weights=weights,
                img_size=self.image_size,
                patch_size=self.patch_size,
                in_chans=self.image_channels,
                drop_path_rate=self.drop_path,
                # which some names turn on, and with it tokens that are no row
                dynamic_img_size=False,
                **pooling | self.options,
            )
        except AssertionError as error:
            raise ValueError(
                f"{name} cannot build timm's {self.backbone_name} with options={self.options}: "
                f"{error}"
            ) from error
        timm = imported("timm", name, "timm")
        plain = type(model) is timm.models.VisionTransformer
        if not plain or model.pos_embed is None:
            raise ValueError(
                f"{name} needs a plain vision transformer with learned positions, got "
                f"{self.backbone_name}, a {type(model).__name__}; vit_base_patch14_dinov2 is one"
            )
        # models that pool a mean have their last normalization behind it
        if isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity):
            model.norm = model.fc_norm
        model.fc_norm, model.attn_pool = nn.Identity(), None
        return model

    @property
    def width(self) -> int:
        """Channels within the transformer."""
        return self.backbone.embed_dim

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON; weights are not among them.

        Raises:
            ValueError: If it has LoRA layers, which the arguments do not tell.
        """
        if self.lora is not None:
            raise ValueError(
                f"{type(self).__name__} has LoRA layers, which a configuration does not hold: "
                "merge_lora_(model) makes them part of the weights, save_lora(model, path) saves "
                "them alone"
            )
        return {
            "dim": self.dim,
            "backbone": self.backbone_name,
            "image_size": plain_size(self.image_size),
            "patch_size": plain_size(self.patch_size),
            "tokens": plain_size(self.tokens),
            "drop_path": self.drop_path,
            "checkpointing": self.checkpointing,
            "image_channels": self.image_channels,
            "options": self.options,
        }

    def load_backbone_(self, source: nn.Module) -> "ViTPart":
        """Copies the weights of another vision transformer into the backbone, in place.

        Positions are resampled to this grid, patch kernels to this patch size.

        Args:
            source: A `Teacher` or a model, of timm or (the image tower) of open_clip.

        Raises:
            ValueError: If its parts, shapes or activation are not those of the backbone.
        """
        name = f"{type(self).__name__}'s {self.backbone_name}"
        copy_weights_(name, self.backbone, source, self.grid, self.patch_size)
        return self

    def _positions(
        self, grid: Pair
    ) -> tuple[Float[Tensor, "1 prefix width"], Float[Tensor, "1 n width"]]:
        """Position embeddings of the tokens before a grid, and of the grid."""
        positions = self.backbone.pos_embed
        prefix = positions.shape[1] - self.grid[0] * self.grid[1]
        return positions[:, :prefix], resampled(positions[:, prefix:], self.grid, grid)

    def _sequence(
        self, x: Float[Tensor, "b n width"], grid: Pair, level: Float[Tensor, " width"]
    ) -> Float[Tensor, "b m width"]:
        """Tokens of a grid behind the class token and registers, with positions and level."""
        before, positions = self._positions(grid)
        parts = [self.backbone.cls_token, self.backbone.reg_token]
        parts = [part.expand(x.shape[0], -1, -1) for part in parts if part is not None]
        if before.shape[1] and parts:
            parts = [torch.cat(parts, dim=1) + before]
        return torch.cat([*parts, x + positions], dim=1) + level

    def _blocks(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "b n width"]:
        """The transformer, without its last normalization."""
        x = self.backbone.norm_pre(self.backbone.pos_drop(x))
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self.backbone.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x


def init_levels_(embedding: nn.Embedding) -> None:
    """Starts level embeddings as XQ-GAN does: a variance of a third over the width."""
    nn.init.trunc_normal_(embedding.weight, std=(3 * embedding.embedding_dim) ** -0.5)

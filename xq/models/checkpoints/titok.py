"""TiTok (Yu et al. 2024): L-32, B-64, S-128, and the "vq8k" models that make pixels at once.

Shapes do not tell what the released configurations have: square images, 64 channels a head, and,
where logits over the codes of MaskGIT's VQGAN are predicted, unit codes and mixed tokens (see
`TiTokEncoder`); the "vq8k" models have neither. Images are in [-1, 1] here, in [0, 1] there.
"""

from typing import Any

from torch import Tensor, nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename, TensorMap
from xq.models.checkpoints.transformer_layout import (
    Shapes,
    count,
    side,
    transformer_rules,
    transformer_sizes,
)
from xq.models.titok import TiTokDecoder, TiTokEncoder
from xq.models.titok_pixels import MaskGITDecoder
from xq.models.tokenizer import Tokenizer
from xq.quantizers import VQ

_TITLE = "TiTok"
_VQGAN = "decoder.head.vqgan."


def _recognise(state: Shapes) -> bool:
    tokens = {"latent_tokens", "encoder.latent_token_positional_embedding", "decoder.mask_token"}
    return tokens <= state.keys()


def _build(state: Shapes) -> nn.Module:
    """The tokenizer with an ordinary `VQ`.

    Raises:
        ValueError: If its image is no square, it has no codebook, or it predicts codes without the
            decoder that makes an image of them.
    """
    if "quantize.embedding.weight" not in state:
        raise ValueError(
            f"{_TITLE} has no quantize.embedding.weight: it is one of the models with continuous "
            "tokens, which have no indices"
        )
    predicts_codes = _predicts_codes(state)
    codebook_size, dim = state["quantize.embedding.weight"].shape
    encoder = TiTokEncoder(dim, mixed=predicts_codes, **_sizes(state, "encoder."))
    vqgan = _vqgan(state) if predicts_codes else None
    decoder = TiTokDecoder(dim, vqgan=vqgan, **_sizes(state, "decoder."))
    return Tokenizer(encoder, VQ(dim, codebook_size, normalize=predicts_codes), decoder)


def _table(state: Shapes) -> KeyTable:
    colours, p, q = state["encoder.patch_embed.weight"].shape[1:]
    return KeyTable(
        [
            *transformer_rules("encoder.", "transformer."),
            *transformer_rules("decoder.", "transformer."),
            Rename("latent_tokens", "encoder.latent_tokens"),
            _as_linear("encoder.patch_embed.weight", "encoder.patches.weight", (colours, p, q)),
            Rename("encoder.patch_embed.bias", "encoder.patches.bias"),
            _as_linear("encoder.conv_out.weight", "encoder.to_tokens.weight"),
            Rename("encoder.conv_out.bias", "encoder.to_tokens.bias"),
            Rename("decoder.decoder_embed.", "decoder.from_tokens."),
            Rename("decoder.mask_token", "decoder.mask_token", _without_batch, _with_batch),
            *(
                Rename(f"{part}{old}", f"{part}{new}")
                for part in ("encoder.", "decoder.")
                for old, new in (
                    ("class_embedding", "class_token"),
                    ("positional_embedding", "positions"),
                    ("latent_token_positional_embedding", "token_positions"),
                )
            ),
            Rename("quantize.embedding.weight", "quantizer.codebook.weight"),
            # averages of its clustering in training
            Drop("quantize.embed_prob"),
            *(_code_rules(state) if _predicts_codes(state) else _pixel_rules()),
        ]
    )


def _pixel_rules() -> list[Rename]:
    return [
        _as_linear("decoder.ffn.0.weight", "decoder.head.patches.weight"),
        Rename("decoder.ffn.0.bias", "decoder.head.patches.bias"),
        Rename("decoder.conv_out.", "decoder.head.conv_out."),
    ]


def _code_rules(state: Shapes) -> list[Rename]:
    last = count(state, "pixel_decoder.up.") - 1
    return [
        _as_linear("decoder.ffn.0.weight", "decoder.head.expand.weight"),
        Rename("decoder.ffn.0.bias", "decoder.head.expand.bias"),
        _as_linear("decoder.ffn.2.weight", "decoder.head.logits.weight"),
        Rename("decoder.ffn.2.bias", "decoder.head.logits.bias"),
        Rename("pixel_quantize.embedding.weight", f"{_VQGAN}codes"),
        *(
            rule
            for level in range(last + 1)
            for old, new in [(f"pixel_decoder.up.{last - level}.", f"{_VQGAN}levels.{level}.")]
            for rule in (
                Rename(f"{old}block.{{i}}.nin_shortcut.", f"{new}0.{{i}}.shortcut."),
                Rename(f"{old}block.", f"{new}0."),
                Rename(f"{old}upsample_conv.", f"{new}1.conv."),
            )
        ),
        *(
            Rename(f"pixel_decoder.{name}", f"{_VQGAN}{name}")
            for name in ("conv_in.", "mid.", "norm_out.", "conv_out.")
        ),
    ]


def _predicts_codes(state: Shapes) -> bool:
    return "decoder.ffn.2.weight" in state


def _sizes(state: Shapes, part: str) -> dict[str, Any]:
    """What the encoder and the decoder have each of their own; images have one size."""
    p, q = state["encoder.patch_embed.weight"].shape[2:]
    seen = _grid_side(state, "encoder.")
    image_size = (p * seen, q * seen)
    tokens, width = state[f"{part}latent_token_positional_embedding"].shape
    grid = _grid_side(state, part)
    return {
        "image_size": image_size,
        "patch_size": (image_size[0] // grid, image_size[1] // grid),
        "tokens": tokens,
        **transformer_sizes(state, width, f"{part}transformer.", _TITLE),
    }


def _grid_side(state: Shapes, part: str) -> int:
    positions, _ = state[f"{part}positional_embedding"].shape
    # the first is that of the class token
    return side(positions - 1, "patches", _TITLE)


def _vqgan(state: Shapes) -> MaskGITDecoder:
    if "pixel_quantize.embedding.weight" not in state:
        raise ValueError(
            f"{_TITLE} predicts the codes of MaskGIT's VQGAN and has no pixel_decoder, so it is of "
            "the first stage of training; the released files are of the second"
        )
    codebook_size, dim = state["pixel_quantize.embedding.weight"].shape
    (channels,) = state["pixel_decoder.norm_out.weight"].shape
    levels = range(count(state, "pixel_decoder.up."))
    widths = [state[f"pixel_decoder.up.{i}.block.0.conv2.weight"].shape[0] for i in levels]
    return MaskGITDecoder(
        dim,
        codebook_size,
        channels=channels,
        multipliers=[width // channels for width in widths],
        blocks=count(state, "pixel_decoder.mid."),
    )


def _as_linear(old: str, new: str, patch: tuple[int, ...] = (1, 1, 1)) -> Rename:
    """The weight of a convolution over whole patches, or of a 1x1 one, for a linear map."""
    back: TensorMap = (
        (lambda t: t[..., None, None]) if patch == (1, 1, 1) else (lambda t: t.unflatten(1, patch))
    )
    return Rename(old, new, lambda t: t.flatten(1), back)


def _without_batch(tensor: Tensor) -> Tensor:
    return tensor[0]


def _with_batch(tensor: Tensor) -> Tensor:
    return tensor[None]


FORMAT = Format("titok", "TiTok", _recognise, _build, _table)

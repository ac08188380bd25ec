"""Published tokenizers of transformers: ViT-VQGAN, BSQ-ViT, TiTok."""

from functools import partial
from typing import Any

from xq.models.plain_vit import PatchDecoder, PatchEncoder
from xq.models.presets.row import Row
from xq.models.titok import TiTokDecoder, TiTokEncoder
from xq.models.titok_pixels import MaskGITDecoder
from xq.models.tokenizer import Tokenizer
from xq.quantizers import BSQ, VQ

_Sizes = dict[str, Any]
_SMALL: _Sizes = {"width": 512, "depth": 8, "heads": 8}
_BASE: _Sizes = {"width": 768, "depth": 12, "heads": 12}
_LARGE: _Sizes = {"width": 1024, "depth": 24, "heads": 16}

_VIT_VQGAN = {"small": _SMALL, "base": _BASE}
_BSQ_VIT_BITS = (18, 36)
# encoder, decoder, tokens, and whether pixels are made at once
_TITOK = {
    "l32": (_LARGE, _LARGE, 32, False),
    "b64": (_BASE, _BASE, 64, False),
    "s128": (_SMALL, _SMALL, 128, False),
    "bl64_vq8k": (_BASE, _LARGE, 64, True),
    "bl128_vq8k": (_BASE, _LARGE, 128, True),
    "sl256_vq8k": (_SMALL, _LARGE, 256, True),
}


def vit_vqgan(size: str = "base") -> Tokenizer:
    """ViT-VQGAN (Yu et al. 2022, section 3): 8192 unit codes of 32 channels.

    1024 tokens for 256 x 256 pixels, 13312 bits an image. Images are in [-1, 1] as everywhere here.
    No weights were released.

    Args:
        size: "small" (8 blocks of width 512) or "base" (12 of 768), of encoder and decoder.

    Raises:
        ValueError: If there is no such size.
    """
    sizes = _VIT_VQGAN[_known("vit_vqgan", size, _VIT_VQGAN)]
    encoder = PatchEncoder(32, feedforward=True, **sizes)
    return Tokenizer(encoder, VQ(32, 8192, normalize=True), PatchDecoder(32, **sizes))


def bsq_vit(bits: int = 18) -> Tokenizer:
    """BSQ-ViT (Zhao et al. 2024, section 4): a ViT-B encoder and decoder, entropies of single bits.

    1024 tokens for 256 x 256 pixels: 18432 bits an image, or 36864.

    Args:
        bits: Of a token, 18 or 36.

    Raises:
        ValueError: If there is none with so many.
    """
    _known("bsq_vit", bits, _BSQ_VIT_BITS)
    return Tokenizer(PatchEncoder(bits), BSQ(bits, group_size=1), PatchDecoder(bits))


def titok(name: str = "l32") -> Tokenizer:
    """TiTok (Yu et al. 2024, and what its authors released later), for 256 x 256 pixels.

    "l32", "b64" and "s128" are the paper's: 32, 64, 128 tokens of 12 bits, so 384, 768, 1536 bits
    an image; they predict the codes of MaskGIT's VQGAN, whose decoder is a part of them. The later
    "bl64_vq8k", "bl128_vq8k" and "sl256_vq8k" make pixels at once: 64, 128, 256 tokens of 13 bits,
    so 832, 1664, 3328 bits.

    Args:
        name: One of these: the sizes of encoder and decoder (small, base, large), the tokens.

    Raises:
        ValueError: If there is none of that name.
    """
    first, second, tokens, at_once = _TITOK[_known("titok", name, _TITOK)]
    encoder: Any = partial(TiTokEncoder, tokens=tokens, **first)
    decoder: Any = partial(TiTokDecoder, tokens=tokens, **second)
    if at_once:
        return Tokenizer(encoder(64), VQ(64, 8192), decoder(64))
    quantizer = VQ(12, 4096, normalize=True)
    return Tokenizer(encoder(12, mixed=True), quantizer, decoder(12, vqgan=MaskGITDecoder()))


def _known(preset: str, wanted: Any, known: Any) -> Any:
    if wanted not in known:
        names = ", ".join(repr(name) for name in known)
        raise ValueError(f"{preset} is published as {names}, got {wanted!r}")
    return wanted


def _row(name: str, make: Any, rfid: float | None = None, source: str = "") -> Row:
    return Row(name, make, 256, rfid, source)


ROWS = (
    _row("ViT-VQGAN small", partial(vit_vqgan, "small")),
    _row("ViT-VQGAN base", partial(vit_vqgan, "base")),
    _row("BSQ-ViT 18", partial(bsq_vit, 18), 1.14, "BSQ-ViT, README"),
    _row("BSQ-ViT 36", partial(bsq_vit, 36), 0.41, "BSQ-ViT, README"),
    _row("TiTok-L-32", partial(titok, "l32"), 2.21, "TiTok, README"),
    _row("TiTok-B-64", partial(titok, "b64"), 1.70, "TiTok, README"),
    _row("TiTok-S-128", partial(titok, "s128"), 1.71, "TiTok, README"),
    _row("TiTok-BL-64 VQ", partial(titok, "bl64_vq8k"), 2.06, "TiTok, README"),
    _row("TiTok-BL-128 VQ", partial(titok, "bl128_vq8k"), 1.49, "TiTok, README"),
    _row("TiTok-SL-256 VQ", partial(titok, "sl256_vq8k"), 1.03, "TiTok, README"),
)

"""The tokenizers of XQ-GAN (Li et al. 2024, arXiv 2412.01762) and RobustTok, at full size.

All are for images of 256 x 256 pixels: DINOv2's ViT-B with patches of 16 pixels as encoder and
decoder, stochastic depth 0.1. With `pretrained=True` both start from DINOv2, as in the paper.
"""

from functools import partial
from typing import Any

from xq.backbones import PathLike
from xq.models.cnn import CNNDecoder, CNNEncoder
from xq.models.presets.row import Row
from xq.models.tokenizer import Tokenizer
from xq.models.vit import ViTDecoder, ViTEncoder
from xq.quantizers import (
    BSQ,
    VQ,
    Perturbed,
    ProductQuantizer,
    Pyramid,
    Quantizer,
    Refine,
    ResidualQuantizer,
    Wrapper,
)

SCALES = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)

# channels of a code, by the size of the codebook
_VQ_CHANNELS = {4096: 64, 8192: 32}
_CHANNELS = 32


def vq(
    codebook_size: int = 4096, *, pretrained: bool = False, weights: PathLike | None = None
) -> Tokenizer:
    """XQ-GAN's VQ: one grid of 16 x 16 normalized codes.

    256 tokens; 3072 bits with 4096 codes, of 64 channels, 3328 with 8192, of 32. Released with
    RobustTok (Qiu et al. 2025); reconstruction FID 0.91 and 0.81 in its repository.

    Args:
        codebook_size: 4096 or 8192.
        pretrained: Downloads DINOv2 to start from.
        weights: A local file of DINOv2's ViT-B instead.

    Raises:
        ValueError: If there is none of that size.
    """
    _check("vq", codebook_size, tuple(_VQ_CHANNELS))
    return xqgan_sc(_unit_vq(codebook_size), pretrained=pretrained, weights=weights)


def vp2(
    codebook_size: int = 4096, *, pretrained: bool = False, weights: PathLike | None = None
) -> Tokenizer:
    """XQ-GAN's VP2: a product of two grids of 16 x 16 normalized codes.

    2 x 256 tokens; 6144 bits with 4096 codes, 7168 with 16384. Reconstruction FID 0.94 (0.90 in the
    repository) and 0.64 in the paper.

    Args:
        codebook_size: 4096 or 16384.
        pretrained: Downloads DINOv2 to start from.
        weights: A local file of DINOv2's ViT-B instead.

    Raises:
        ValueError: If there is none of that size.
    """
    _check("vp2", codebook_size, (4096, 16384))
    branch = VQ(_CHANNELS, codebook_size, normalize=True)
    return xqgan_sc(ProductQuantizer(branch, 2), pretrained=pretrained, weights=weights)


def msvr10p2(
    codebook_size: int = 4096, *, pretrained: bool = False, weights: PathLike | None = None
) -> Tokenizer:
    """XQ-GAN's MSVR10P2: a product of two residuals over ten scales up to 11 x 11.

    2 x 286 tokens; 6864, 7436 and 8008 bits with 4096, 8192 and 16384 codes. Reconstruction FID
    0.80, 0.70 and 0.67 in the paper. With 4096 codes it is ImageFolder's (Li et al. 2024, arXiv
    2410.01756), and what the files trained on LAION and IMed hold. It is trained with
    `DepthDropout(10, 0.1, 3)`.

    Args:
        codebook_size: 4096, 8192 or 16384.
        pretrained: Downloads DINOv2 to start from.
        weights: A local file of DINOv2's ViT-B instead.

    Raises:
        ValueError: If there is none of that size.
    """
    _check("msvr10p2", codebook_size, (4096, 8192, 16384))
    return _multiscale(VQ(_CHANNELS, codebook_size, metric="cosine"), pretrained, weights)


def msbr10p2(
    codebook_size: int = 4096, *, pretrained: bool = False, weights: PathLike | None = None
) -> Tokenizer:
    """XQ-GAN's MSBR10P2: as `msvr10p2` with binary codes on a sphere.

    2 x 286 tokens; 6864 bits with 4096 codes, of 12 channels, 8008 with 16384, of 14.
    Reconstruction FID 0.86 and 0.78 in the paper. It is trained with `DepthDropout(10, 0.1, 3)` and
    an entropy penalty of weight 0.1.

    Args:
        codebook_size: 4096 or 16384.
        pretrained: Downloads DINOv2 to start from.
        weights: A local file of DINOv2's ViT-B instead.

    Raises:
        ValueError: If there is none of that size.
    """
    _check("msbr10p2", codebook_size, (4096, 16384))
    # the original's entropy is that of single bits
    return _multiscale(BSQ(codebook_size.bit_length() - 1, group_size=1), pretrained, weights)


def robusttok(*, pretrained: bool = False, weights: PathLike | None = None) -> Tokenizer:
    """RobustTok (Qiu et al. 2025, arXiv 2503.08354): `vq(4096)` that learns with perturbed tokens.

    256 tokens, 3072 bits. Reconstruction FID 1.02 in its repository. A training loop sets
    `tokenizer.quantizer.progress`; without training it is `vq(4096)`.

    Args:
        pretrained: Downloads DINOv2 to start from.
        weights: A local file of DINOv2's ViT-B instead.
    """
    return xqgan_sc(
        Perturbed(_unit_vq(4096), 100, alpha=1.0, beta=0.1), pretrained=pretrained, weights=weights
    )


def xqgan_sc(
    quantizer: Quantizer | Wrapper,
    *,
    image_size: int = 256,
    tokens: int | None = None,
    branches: int | None = None,
    pretrained: bool = False,
    weights: PathLike | None = None,
) -> Tokenizer:
    """XQ-GAN's pipeline of vision transformers ("SC") around any quantizer.

    ViT-B with patches of 16 pixels; other backbones and patches are arguments of `ViTEncoder` and
    `ViTDecoder`.

    Args:
        quantizer: Any tree, or one in a wrapper that takes vectors channel-last.
        image_size: Side of the images, a multiple of 16.
        tokens: Side of the grid of tokens. By default that of the last scale, or as many as
            patches.
        branches: Sets of query tokens; by default as many as a product has branches.
        pretrained: Downloads DINOv2 to start from.
        weights: A local file of DINOv2's ViT-B instead.

    Raises:
        ValueError: If a size does not fit.
    """
    if tokens is None:
        tokens = quantizer.grids[-1][0] if quantizer.scales else image_size // 16
    if branches is None:
        branches = quantizer.P if isinstance(quantizer, ProductQuantizer) else 1
    part: dict[str, Any] = {"image_size": image_size, "tokens": tokens, "drop_path": 0.1}
    part |= {"pretrained": pretrained, "weights": weights}
    return Tokenizer(
        ViTEncoder(quantizer.dim, branches=branches, **part),
        quantizer,
        ViTDecoder(quantizer.dim, **part),
    )


def xqgan_v(quantizer: Quantizer | Wrapper) -> Tokenizer:
    """XQ-GAN's convolutional pipeline ("V") around any quantizer: LlamaGen's VQ-16 network.

    A token for 16 x 16 pixels, so 256 for a quantizer without scales. Also what the original cannot
    do: products, which take their parts of the channels, and several scales.

    Args:
        quantizer: Any tree, or one in a wrapper that takes vectors channel-last.
    """
    return Tokenizer(CNNEncoder(quantizer.dim), quantizer, CNNDecoder(quantizer.dim))


def _unit_vq(codebook_size: int) -> VQ:
    return VQ(_VQ_CHANNELS[codebook_size], codebook_size, normalize=True)


def _multiscale(leaf: Quantizer, pretrained: bool, weights: PathLike | None) -> Tokenizer:
    pyramid = Pyramid(SCALES, [Refine(leaf.dim) for _ in range(4)])
    residual = ResidualQuantizer(leaf, multiscale=pyramid)
    return xqgan_sc(ProductQuantizer(residual, 2), pretrained=pretrained, weights=weights)


def _check(name: str, codebook_size: int, sizes: tuple[int, ...]) -> None:
    if codebook_size not in sizes:
        raise ValueError(
            f"{name} is published with {' and '.join(map(str, sizes))} codes, got {codebook_size}; "
            "xqgan_sc(quantizer) takes any other"
        )


_PAPER = "Li et al. 2024, XQ-GAN"
_ROBUST = "RobustTok's repository"
ROWS = (
    Row("VQ-4096", partial(vq, 4096), 256, 0.91, _ROBUST),
    Row("VQ-8192", partial(vq, 8192), 256, 0.81, _ROBUST),
    Row("RobustTok", robusttok, 256, 1.02, _ROBUST),
    Row("VP2-4096", partial(vp2, 4096), 256, 0.94, _PAPER),
    Row("VP2-16384", partial(vp2, 16384), 256, 0.64, _PAPER),
    Row("MSVR10P2-4096", partial(msvr10p2, 4096), 256, 0.80, _PAPER),
    Row("MSVR10P2-8192", partial(msvr10p2, 8192), 256, 0.70, _PAPER),
    Row("MSVR10P2-16384", partial(msvr10p2, 16384), 256, 0.67, _PAPER),
    Row("MSBR10P2-4096", partial(msbr10p2, 4096), 256, 0.86, _PAPER),
    Row("MSBR10P2-16384", partial(msbr10p2, 16384), 256, 0.78, _PAPER),
)

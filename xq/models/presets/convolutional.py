"""Published tokenizers of convolutions."""

from functools import partial

from xq.models.cnn import CNNDecoder, CNNEncoder
from xq.models.magvit2 import MAGVIT2Decoder, MAGVIT2Encoder
from xq.models.presets.row import Row
from xq.models.tokenizer import Tokenizer
from xq.quantizers import IBQ, LFQ, VQ, GumbelVQ, ResidualQuantizer


def vqgan(codebook_size: int = 1024) -> Tokenizer:
    """VQGAN, f16 (Esser et al. 2021), as taming-transformers released it with 1024 and 16384 codes.

    An image of 256 x 256 pixels is 16 x 16 tokens: 2560 bits with 1024 codes, 3584 with 16384.

    Args:
        codebook_size: Number of codes, of 256 channels.

    Raises:
        ValueError: If it is below 1.
    """
    return Tokenizer(CNNEncoder(256), VQ(256, codebook_size), CNNDecoder(256))


def vqgan_gumbel() -> Tokenizer:
    """VQGAN, f8, with Gumbel-softmax and 8192 codes, as taming-transformers released it.

    An image of 256 x 256 pixels is 32 x 32 tokens, 13312 bits.
    """
    multipliers = (1, 1, 2, 4)
    return Tokenizer(
        CNNEncoder(256, multipliers=multipliers),
        GumbelVQ(256, 8192),
        CNNDecoder(256, multipliers=multipliers),
    )


def rqgan() -> Tokenizer:
    """RQ-VAE, 8 x 8 x 4 (Lee et al. 2022, section 3.1): four codes of one codebook a place.

    An image of 256 x 256 pixels is 8 x 8 x 4 tokens of 16384 codes, 3584 bits. Here the codes learn
    by gradient; the paper's follow running means, which is `codebook=EMACodebook` of its `VQ`.
    """
    multipliers = (1, 1, 2, 2, 4, 4)
    return Tokenizer(
        CNNEncoder(256, multipliers=multipliers),
        ResidualQuantizer(VQ(256, 16384), depth=4, shared=True),
        CNNDecoder(256, multipliers=multipliers),
    )


def var_vqvae() -> Tokenizer:
    """VAR's multi-scale tokenizer (Tian et al. 2024, section 3.2): ten scales up to 16 x 16.

    An image of 256 x 256 pixels is 680 tokens of 4096 codes, 8160 bits.
    """
    return Tokenizer(
        CNNEncoder(32, channels=160, z_channels=32, quant_kernel=3),
        ResidualQuantizer(VQ(32, 4096), depth=10, multiscale=True),
        CNNDecoder(32, channels=160, z_channels=32, quant_kernel=3),
    )


def llamagen_vq8() -> Tokenizer:
    """LlamaGen's VQ-8 (Sun et al. 2024, section 2.1): 16384 unit codes of 8 channels.

    An image of 256 x 256 pixels is 32 x 32 tokens, 14336 bits.
    """
    return _llamagen((1, 2, 2, 4))


def llamagen_vq16() -> Tokenizer:
    """LlamaGen's VQ-16 (Sun et al. 2024, section 2.1): 16384 unit codes of 8 channels.

    An image of 256 x 256 pixels is 16 x 16 tokens, 3584 bits.
    """
    return _llamagen((1, 1, 2, 2, 4))


def magvit2_lfq() -> Tokenizer:
    """Open-MAGVIT2 (Luo et al. 2024, section 3.1): lookup-free, 18 bits a token.

    An image of 256 x 256 pixels is 16 x 16 tokens, 4608 bits. The numbers of MAGVIT-v2 itself (Yu
    et al. 2024) are of a larger network that was not released.
    """
    return Tokenizer(MAGVIT2Encoder(18), LFQ(18), MAGVIT2Decoder(18))


def ibq(codebook_size: int = 16384) -> Tokenizer:
    """IBQ (Shi et al. 2024), released with 1024, 8192, 16384 and 262144 codes of 256 channels.

    An image of 256 x 256 pixels is 16 x 16 tokens: 3584 bits with 16384 codes.

    Args:
        codebook_size: Number of codes.

    Raises:
        ValueError: If it is below 1.
    """
    return Tokenizer(CNNEncoder(256, blocks=4), IBQ(256, codebook_size), CNNDecoder(256, blocks=4))


def _llamagen(multipliers: tuple[int, ...]) -> Tokenizer:
    return Tokenizer(
        CNNEncoder(8, multipliers=multipliers),
        VQ(8, 16384, normalize=True),
        CNNDecoder(8, multipliers=multipliers),
    )


_TAMING = "taming-transformers, README, against the validation images"
_LLAMAGEN = "LlamaGen, README"
_IBQ = "SEED-Voken, docs/IBQ.md"

ROWS = (
    Row("VQGAN 1024", vqgan, 256, 7.94, _TAMING),
    Row("VQGAN 16384", partial(vqgan, 16384), 256, 4.98, _TAMING),
    # its figure is of a model trained on OpenImages
    Row("VQGAN Gumbel f8", vqgan_gumbel, 256, None, ""),
    Row("RQGAN", rqgan, 256, 4.73, "Lee et al. 2022, table 4"),
    Row("VAR", var_vqvae, 256, 0.90, "Li et al. 2024, XQ-GAN, abstract"),
    Row("LlamaGen VQ-8", llamagen_vq8, 256, 0.59, _LLAMAGEN),
    Row("LlamaGen VQ-16", llamagen_vq16, 256, 2.19, _LLAMAGEN),
    Row("Open-MAGVIT2", magvit2_lfq, 256, 1.17, "Luo et al. 2024, abstract"),
    Row("IBQ 1024", partial(ibq, 1024), 256, 2.24, _IBQ),
    Row("IBQ 8192", partial(ibq, 8192), 256, 1.87, _IBQ),
    Row("IBQ 16384", ibq, 256, 1.37, _IBQ),
    Row("IBQ 262144", partial(ibq, 262144), 256, 1.00, _IBQ),
)

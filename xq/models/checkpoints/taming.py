"""VQGAN of taming-transformers (Esser et al. 2021): f16 with 1024 or 16384 codes, f8 with Gumbel.

The checkpoints hold LPIPS and the discriminator below `loss.`, which are left out.
"""

from torch import Tensor, nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename
from xq.models.checkpoints.taming_layout import Shapes, block_count, cnn, cnn_rules, is_taming
from xq.models.tokenizer import Tokenizer
from xq.quantizers import VQ, GumbelVQ

# IBQ's files have the same names but more blocks, and another search
_BLOCKS = 2


def _recognise(state: Shapes) -> bool:
    is_plain = is_taming(state) and "quantize.embedding.weight" in state
    return is_plain and block_count(state) == _BLOCKS


def _build(state: Shapes) -> nn.Module:
    codebook_size, dim = state["quantize.embedding.weight"].shape
    encoder, decoder = cnn(state)
    return Tokenizer(encoder, VQ(dim, codebook_size), decoder)


def _table(state: Shapes) -> KeyTable:
    codebook = Rename("quantize.embedding.weight", "quantizer.codebook.weight")
    return KeyTable([*cnn_rules(state), codebook, Drop("loss.")])


def _recognise_gumbel(state: Shapes) -> bool:
    return is_taming(state) and "quantize.embed.weight" in state


def _build_gumbel(state: Shapes) -> nn.Module:
    codebook_size, dim = state["quantize.embed.weight"].shape
    encoder, decoder = cnn(state)
    return Tokenizer(encoder, GumbelVQ(dim, codebook_size), decoder)


def _gumbel_table(state: Shapes) -> KeyTable:
    return KeyTable(
        [
            *cnn_rules(state),
            Rename("quantize.embed.weight", "quantizer.codebook.weight"),
            Rename("quantize.proj.weight", "quantizer.scores.weight", _as_linear, _as_convolution),
            Rename("quantize.proj.bias", "quantizer.scores.bias"),
            Drop("loss."),
        ]
    )


def _as_linear(weight: Tensor) -> Tensor:
    return weight[..., 0, 0]


def _as_convolution(weight: Tensor) -> Tensor:
    return weight[..., None, None]


FORMATS = (
    Format("taming", "taming-transformers VQGAN", _recognise, _build, _table),
    Format(
        "taming_gumbel",
        "taming-transformers VQGAN with Gumbel",
        _recognise_gumbel,
        _build_gumbel,
        _gumbel_table,
    ),
)

"""RQ-VAE of rq-vae-transformer (Lee et al. 2022): 8 x 8 x 4 codes for 256 x 256 images."""

from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename
from xq.models.checkpoints.taming_layout import Shapes, cnn, cnn_rules, is_taming
from xq.models.tokenizer import Tokenizer
from xq.quantizers import VQ, ResidualQuantizer


def _recognise(state: Shapes) -> bool:
    return is_taming(state) and _weight(0) in state


def _build(state: Shapes) -> nn.Module:
    """The tokenizer with its codes as parameters; the file's running averages are left out."""
    depth, dim = _depth(state), state[_weight(0)].shape[1]
    codebooks = [VQ(dim, state[_weight(k)].shape[0] - 1) for k in range(depth)]
    quantizer = (
        ResidualQuantizer(codebooks[0], depth, shared=True)
        if _is_shared(state)
        else ResidualQuantizer(codebooks)
    )
    encoder, decoder = cnn(state)
    return Tokenizer(encoder, quantizer, decoder)


def _table(state: Shapes) -> KeyTable:
    kept = 1 if _is_shared(state) else _depth(state)
    return KeyTable(
        [
            *cnn_rules(state),
            *(
                Rename(_weight(k), f"quantizer.steps.{k}.codebook.weight", _codes, _padded)
                for k in range(kept)
            ),
            *(Drop(_weight(k)) for k in range(kept, _depth(state))),
            # running averages: the codes alone decide what is encoded and decoded
            Drop("quantizer.codebooks.{k}.cluster_size_ema"),
            Drop("quantizer.codebooks.{k}.embed_ema"),
        ]
    )


def _weight(k: int) -> str:
    return f"quantizer.codebooks.{k}.weight"


def _depth(state: Shapes) -> int:
    return next(k for k in count() if _weight(k) not in state)


def _is_shared(state: Shapes) -> bool:
    """Whether all codebooks are copies of one, as in the released files.

    A file does not say; so values are compared, and without values codebooks of one size count as
    copies.
    """
    first, *others = (state[_weight(k)] for k in range(_depth(state)))
    if any(other.shape != first.shape for other in others):
        return False
    return first.is_meta or all(torch.equal(first, other) for other in others)


def _codes(weight: Tensor) -> Tensor:
    """Without the last row, a zero that pads."""
    return weight[:-1]


def _padded(codes: Tensor) -> Tensor:
    return F.pad(codes, (0, 0, 0, 1))


FORMAT = Format("rqvae", "RQ-VAE", _recognise, _build, _table)

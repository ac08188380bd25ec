"""IBQ of SEED-Voken (Shi et al. 2024), with 1024 to 262144 codes."""

from torch import nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename
from xq.models.checkpoints.taming_layout import Shapes, block_count, cnn, cnn_rules, is_taming
from xq.models.tokenizer import Tokenizer
from xq.quantizers import IBQ

# taming-transformers' files have the same names but fewer blocks, and another search
_BLOCKS = 4


def _recognise(state: Shapes) -> bool:
    is_plain = is_taming(state) and "quantize.embedding.weight" in state
    return is_plain and block_count(state) == _BLOCKS


def _build(state: Shapes) -> nn.Module:
    codebook_size, dim = state["quantize.embedding.weight"].shape
    encoder, decoder = cnn(state)
    return Tokenizer(encoder, IBQ(dim, codebook_size), decoder)


def _table(state: Shapes) -> KeyTable:
    codebook = Rename("quantize.embedding.weight", "quantizer.codebook.weight")
    return KeyTable([*cnn_rules(state), codebook, Drop("loss.")])


FORMAT = Format("ibq", "SEED-Voken IBQ", _recognise, _build, _table)

"""VAR's multi-scale tokenizer (Tian et al. 2024): `vae_ch160v4096z32.pth`."""

from torch import nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename
from xq.models.checkpoints.taming_layout import Shapes, cnn, cnn_rules
from xq.models.tokenizer import Tokenizer
from xq.quantizers import VQ, Pyramid, Refine, ResidualQuantizer
from xq.quantizers.grids import published_scales

_HITS = "quantize.ema_vocab_hit_SV"
# what the file counts the uses of, a row each
_SCALES = published_scales(10)


def _recognise(state: Shapes) -> bool:
    fused = {"encoder.mid.attn_1.qkv.weight", "decoder.up.0.block.0.conv1.weight"}
    return {*fused, "quantize.embedding.weight"} <= state.keys()


def _build(state: Shapes) -> nn.Module:
    """The tokenizer with VAR's ten scales up to 16 x 16; no file tells them.

    For other scales, such as those of 512 x 512 images, call `with_scales`.

    Raises:
        ValueError: If the file was made with another number of scales.
    """
    hits = state.get(_HITS)
    if hits is not None and len(hits) != len(_SCALES):
        raise ValueError(
            f"VAR's {_HITS} has {len(hits)} rows, so its scales are not the {len(_SCALES)} of "
            f"{_SCALES}, and the file does not tell them: read it `into` a tokenizer that has them"
        )
    codebook_size, dim = state["quantize.embedding.weight"].shape
    refine = [Refine(dim) for _ in _refinements(state)]
    quantizer = ResidualQuantizer(
        VQ(dim, codebook_size), multiscale=Pyramid(_SCALES, refine), shared=True
    )
    encoder, decoder = cnn(state)
    return Tokenizer(encoder, quantizer, decoder)


def _table(state: Shapes) -> KeyTable:
    return KeyTable(
        [
            *cnn_rules(state),
            Rename("quantize.embedding.weight", "quantizer.steps.0.codebook.weight"),
            *(
                Rename(f"{old}.", f"quantizer.grid.refine.{i}.")
                for i, old in enumerate(_refinements(state))
            ),
            Drop(_HITS),
        ]
    )


def _refinements(state: Shapes) -> list[str]:
    """The names of its convolutions after upsampling: some that scales share, one, or one each."""
    prefix, suffix = "quantize.quant_resi.", ".weight"
    names = [key.removesuffix(suffix) for key in state if key.startswith(prefix)]
    return sorted({name for name in names if f"{name}{suffix}" in state}, key=lambda n: (len(n), n))


FORMAT = Format("var", "VAR multi-scale VQVAE", _recognise, _build, _table)

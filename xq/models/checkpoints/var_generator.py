"""Generators of VAR (Tian et al. 2024: `var_d16.pth` to `var_d30.pth`) and of XQ-GAN.

XQ-GAN's `ar-ckpt-last.pth` holds its tokenizer too: `load_checkpoint(path, weights="generator")`
reads the generator.
"""

from torch import Tensor, nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename
from xq.models.checkpoints.taming_layout import Shapes
from xq.models.var import VAR
from xq.quantizers.grids import published_scales

# by how many tokens there are: scales and branches, which no shape tells
_RELEASED = {680: (published_scales(10), 1), 286: ((1, 1, 2, 3, 3, 4, 5, 6, 8, 11), 2)}
# of each branch of the tokenizers
_CHANNELS = 32


def _recognise(state: Shapes) -> bool:
    names = {"pos_1LC", "word_embed.weight", "head_nm.ada_lin.1.weight"}
    return {*names, "blocks.0.attn.scale_mul_1H11"} <= state.keys()


def _build(state: Shapes) -> nn.Module:
    """The generator with the scales and branches of the released ones, which no file tells.

    Raises:
        ValueError: If it is of another tokenizer.
    """
    tokens, levels = state["pos_1LC"].shape[1], len(state["lvl_embed.weight"])
    width, dim = state["word_embed.weight"].shape
    grids, branches = _RELEASED.get(tokens, ((), 0))
    if len(grids) != levels or dim != branches * _CHANNELS:
        raise ValueError(
            f"this generator has {tokens} tokens of {levels} scales and {dim} channels, unlike "
            "those that were released, and the file does not tell its scales and branches: read it "
            "`into` a VAR that has them, VAR.of(quantizer, ...)"
        )
    return VAR(
        dim,
        len(state["head.weight"]) // branches,
        grids,
        code_shape=(branches,) if branches > 1 else (),
        classes=len(state["class_emb.weight"]) - 1,
        depth=len([key for key in state if key.endswith(".attn.scale_mul_1H11")]),
        width=width,
        heads=state["blocks.0.attn.scale_mul_1H11"].shape[1],
    )


def _table(state: Shapes) -> KeyTable:
    block = "blocks.{i}."
    return KeyTable(
        [
            Rename("pos_start", "start"),
            Rename("pos_1LC", "positions"),
            Rename("word_embed.", "embed."),
            Rename("class_emb.", "class_embed."),
            Rename("lvl_embed.", "level_embed."),
            Rename(
                f"{block}attn.scale_mul_1H11", f"{block}attention.log_scale", Tensor.flatten, _back
            ),
            Rename(f"{block}attn.q_bias", f"{block}attention.q_bias"),
            Rename(f"{block}attn.v_bias", f"{block}attention.v_bias"),
            Rename(f"{block}attn.mat_qkv.", f"{block}attention.qkv."),
            Rename(f"{block}attn.proj.", f"{block}attention.projection."),
            Rename(f"{block}ffn.fc1.", f"{block}expand."),
            Rename(f"{block}ffn.fc2.", f"{block}contract."),
            Rename(f"{block}ada_lin.1.", f"{block}modulation."),
            Rename("head_nm.ada_lin.1.", "modulation."),
            Rename("head.", "predict."),
            # made anew
            Drop(f"{block}attn.zero_k_bias"),
            Drop("lvl_1L"),
            Drop("attn_bias_for_masking"),
            # stands for masked tokens in a training scheme of XQ-GAN
            Drop("empty_emb"),
        ]
    )


def _back(scale: Tensor) -> Tensor:
    return scale.view(1, -1, 1, 1)


FORMAT = Format("var_generator", "VAR generator", _recognise, _build, _table)

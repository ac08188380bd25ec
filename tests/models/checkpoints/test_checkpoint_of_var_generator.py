"""Released generators of VAR and XQ-GAN: every name, at full size, has its place."""

import pytest
import torch
from key_lists import listed, shapes
from torch import Tensor

from xq.models import VAR
from xq.models.checkpoints import formats, load_checkpoint
from xq.models.checkpoints.var_generator import FORMAT
from xq.quantizers import VQ, ProductQuantizer, ResidualQuantizer
from xq.quantizers.grids import published_scales

XQGAN_SCALES = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)
DEPTHS = (16, 20, 24, 30)


def d17() -> dict[str, Tensor]:
    return listed("var_generator")["d17_of_two_branches"]


def released(depth: int) -> dict[str, Tensor]:
    """VAR's file of that depth: the same names as those of XQ-GAN's, which copies it."""
    width, sizes = 64 * depth, {}
    scales = {1088 * k: width * k for k in (1, 2, 3, 4, 6)} | {17: depth, 286: 680}
    for name, tensor in d17().items():
        first = not name.startswith("blocks.")
        if first or name.startswith("blocks.0."):
            shape = [scales.get(size, size) for size in tensor.shape]
            sizes |= {name.replace("s.0.", f"s.{i}."): shape for i in range(1 if first else depth)}
    # 4096 codes and 32 channels, of one branch
    sizes |= {"head.weight": [4096, width], "head.bias": [4096], "word_embed.weight": [width, 32]}
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


def made_anew(state: dict[str, Tensor]) -> set[str]:
    """What there is no need to keep."""
    buffers = {"lvl_1L", "attn_bias_for_masking", "empty_emb"}
    return {key for key in state if key in buffers or key.endswith(".zero_k_bias")}


def there_and_back(state: dict[str, Tensor]) -> VAR:
    assert [format.name for format in formats().values() if format.recognise(state)] == [
        "var_generator"
    ]
    model = FORMAT.read(state)
    assert isinstance(model, VAR)
    back = shapes(FORMAT.table(state).revert(model.state_dict()))
    lost = made_anew(state)
    assert back == {key: shape for key, shape in shapes(state).items() if key not in lost}
    return model


def test_xqgan_d17():
    state = d17()
    assert len(made_anew(state)) == 2 + 17
    model = there_and_back(state)
    with torch.device("meta"):
        pyramid = ResidualQuantizer(VQ(32, 4096), multiscale=XQGAN_SCALES)
        want = VAR.of(ProductQuantizer(pyramid, P=2), classes=1000, depth=17)
    assert model.config() == want.config()
    assert not model.training


def test_a_model_trained_with_masked_tokens():
    there_and_back(d17() | {"empty_emb": torch.empty(1, 1, 1088, device="meta")})


@pytest.mark.parametrize("depth", DEPTHS)
def test_var(depth):
    model = there_and_back(released(depth))
    with torch.device("meta"):
        quantizer = ResidualQuantizer(VQ(32, 4096), depth=10, multiscale=True)
        want = VAR.of(quantizer, depth=depth)
    assert want.grids == tuple((side, side) for side in published_scales(10))
    assert model.config() == want.config()


def small() -> tuple[VAR, dict[str, Tensor]]:
    """A model and what the original would save of one like it."""
    model = VAR(6, 5, (1, 2), code_shape=(2,), classes=3, depth=2, width=8, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    theirs = FORMAT.table({}).revert(model.state_dict())
    buffers = {"lvl_1L": torch.tensor([[0, 1, 1, 1, 1]]), "empty_emb": torch.zeros(1, 1, 8)}
    biases = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(8) for i in range(2)}
    return model, theirs | buffers | biases


def test_generator_beside_its_tokenizer(tmp_path):
    model, theirs = small()
    trainer = {"vae_local": {"w": torch.ones(1)}, "var_wo_ddp": theirs, "config": {"depth": 2}}
    torch.save({"epoch": 3, "trainer": trainer}, tmp_path / "ar-ckpt-last.pth")
    into = VAR(**model.config())
    read = load_checkpoint(tmp_path / "ar-ckpt-last.pth", weights="generator", into=into)
    assert read is into
    inputs, labels = torch.randn(3, 4, 6), torch.tensor([0, 2, -1])
    assert torch.equal(read(inputs, labels), model.eval()(inputs, labels))


def test_what_no_file_tells(tmp_path):
    _, theirs = small()
    torch.save(theirs, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=r"5 tokens of 2 scales and 6 channels.*read it `into` a"):
        load_checkpoint(tmp_path / "var.pth")


def test_published_tokens_of_other_channels():
    state = d17() | {"word_embed.weight": torch.empty(1088, 32, device="meta")}
    with pytest.raises(ValueError, match="286 tokens of 10 scales and 32 channels, unlike those"):
        FORMAT.read(state)


def test_shared_modulation_is_refused():
    """Of the 512 x 512 model, which has one for all blocks."""
    state = released(16)
    state = {key: t for key, t in state.items() if ".ada_lin." not in key or "head" in key}
    state |= {"blocks.0.ada_gss": torch.empty(1, 1, 6, 1024, device="meta")}
    with pytest.raises(ValueError, match=r"no place for 1 tensors \(blocks.0.ada_gss\)"):
        FORMAT.read(state)


def test_missing_and_misfitting():
    state = d17()
    del state["blocks.3.attn.q_bias"]
    with pytest.raises(ValueError, match=r"lacks 1 \(blocks.3.attention.q_bias"):
        FORMAT.read(state)
    state = d17() | {"pos_start": torch.empty(1, 4, 1088, device="meta")}
    with pytest.raises(ValueError, match=r"start of shape \(1, 4, 1088\)"):
        FORMAT.read(state)

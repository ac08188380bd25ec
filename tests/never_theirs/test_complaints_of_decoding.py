"""What users of other libraries report about indices and decoding; see docs/complaints.md."""

import pytest
import torch
from family import EMA, LEAVES, nest, step

from xq.quantizers import (
    FSQ,
    LFQ,
    VQ,
    ChannelFirst,
    ProductQuantizer,
    Projected,
    ResidualQuantizer,
    indices_to_signs,
    signs_to_indices,
)


@pytest.mark.parametrize("name", LEAVES)
def test_complaint_01_decode_gives_z_bit_for_bit(name: str) -> None:
    """Codes of indices are not what was returned (lucidrains/vector-quantize-pytorch#44, #224)."""
    tree = nest(LEAVES[name]())
    layouts = [(tree, (30, 8)), (tree, (2, 3, 5, 8)), (ChannelFirst(tree), (2, 8, 3, 5))]
    layouts.append((ChannelFirst(Projected(tree, 6)), (2, 6, 7)))
    for training in (True, False):
        tree.train(training)
        for quantizer, shape in layouts:
            # what draws at random does so in training with gradients
            with torch.set_grad_enabled(not (training and tree.noisy)):
                z, indices, _ = quantizer(torch.randn(shape))
                assert z.shape == shape
                assert torch.equal(quantizer.decode(indices), z)
                assert torch.equal(quantizer.decode(indices.to(torch.uint8)), z)


@pytest.mark.parametrize("bits", [24, 36, 53, 62])
def test_complaint_02_indices_of_many_bits_are_exact(bits: int) -> None:
    """Decoding gives garbage: indices summed in float32 lose bits above 24 (npq-vit#4)."""
    lfq = LFQ(bits, regularize=False)
    z, indices, _ = lfq(torch.randn(500, bits))
    assert torch.equal(lfq.decode(indices), z)
    # neighbours of the largest index keep apart
    top = torch.tensor([2**bits - 1, 2**bits - 2, 2**bits - 3])
    assert torch.equal(lfq.encode(lfq.decode(top)), top)
    with pytest.raises(ValueError, match="62"):
        LFQ(63, regularize=False)


def test_complaint_03_one_order_of_bits_both_ways() -> None:
    """From signs to an index and back took opposite orders of bits (SEED-Voken#10)."""
    lfq = LFQ(5)
    # channel 0 is bit 0
    x = torch.tensor([[3.0, -1.0, 0.5, -2.0, -0.1]])
    assert lfq.encode(x).tolist() == [0b00101]
    assert lfq.decode(torch.tensor([0b00101])).tolist() == [[1.0, -1.0, 1.0, -1.0, -1.0]]
    every = torch.arange(32)
    assert torch.equal(signs_to_indices(indices_to_signs(every, 5)), every)
    assert torch.equal(lfq.encode(lfq.decode(every)), every)


@pytest.mark.parametrize("name", LEAVES)
def test_complaint_04_indices_are_in_range_in_every_precision(name: str) -> None:
    """Negative indices, or as large as their number (lucidrains/vector-quantize-pytorch#207)."""
    quantizer = LEAVES[name]()
    x = torch.randn(40, 4) * torch.logspace(-6, 4, 40)[:, None]
    x = torch.cat([x, torch.zeros(1, 4), -torch.zeros(1, 4), torch.ones(1, 4), -torch.ones(1, 4)])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        near = x.to(dtype)
        for training in (True, False):
            out = quantizer.train(training)(near)
            assert out.indices.dtype == torch.int64
            assert out.indices.min() >= 0
            assert out.indices.max() < quantizer.codebook_size
            assert out.z.dtype == dtype
        if dtype.itemsize < 4:
            assert torch.equal(quantizer.encode(near), quantizer.encode(near.float()))


@pytest.mark.parametrize("bound", ["even", "symmetric", "ifsq", "clamp", "paper", "vqp"])
def test_complaint_04_levels_stay_in_range_at_the_ends(bound: str) -> None:
    """Rounding in bfloat16 gives a level too many (lucidrains/vector-quantize-pytorch#107)."""
    fsq = FSQ([8, 7, 3, 1000], bound=bound)
    ends = torch.tensor([-torch.inf, -1e30, -1.0, 0.0, 1.0, 1e30, torch.inf])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        _, indices, _ = fsq(ends.to(dtype)[:, None].expand(-1, 4))
        assert indices.min() >= 0
        assert indices.max() < fsq.codebook_size
        # the largest input has the last level of every channel
        assert indices.max() == indices[-1] == fsq.codebook_size - 1


@pytest.mark.parametrize("codebook", ["ema", "vq", "revived", "unit vq"])
def test_complaint_05_codes_and_indices_rebuild(codebook: str) -> None:
    """From saved codes and indices one gets zeros (lucidrains/vector-quantize-pytorch#102)."""
    trained, fresh = LEAVES[codebook](), LEAVES[codebook]()
    for _ in range(3):
        step(trained, torch.randn(50, 4))
    z, indices, _ = trained.eval()(torch.randn(20, 4))
    fresh.codebook.load_codes(trained.codebook.codes().detach())
    assert torch.equal(fresh.decode(indices), z)
    assert torch.equal(fresh.eval().encode(z), indices)


@pytest.mark.parametrize("training", [True, False])
def test_complaint_06_depth_is_heeded_in_training(training: bool) -> None:
    """n_quantizers is ignored in training mode (descript-audio-codec#40, #106)."""
    quantizer = ProductQuantizer(ResidualQuantizer(VQ(2, 9, codebook=EMA), 4), P=2).train(training)
    x = torch.randn(5, 3, 4)
    for depth in (1, 2, 4):
        z, indices, _ = quantizer(x, depth)
        assert torch.equal(z, quantizer.decode(indices[..., :depth]))
    several = quantizer(x, torch.tensor([1, 2, 3, 4, 2]))
    for k, depth in enumerate((1, 2, 3, 4, 2)):
        assert torch.equal(several.z[k], quantizer.decode(several.indices[k, ..., :depth]))

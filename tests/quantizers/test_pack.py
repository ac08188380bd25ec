import numpy as np
import pytest
import torch

from xq.quantizers import BSQ, ProductQuantizer, ResidualQuantizer, pack, unpack
from xq.quantizers.pack import _BLOCK

SHAPES = [(1,), (7,), (8,), (65,), (3, 65), (2, 3, 5), (0,), (2, 0), (0, 5)]


def one_row(row: list[int], bits: int) -> list[int]:
    """All bits as one large integer: the lowest of the first index come first."""
    whole = sum(index << (i * bits) for i, index in enumerate(row))
    return list(whole.to_bytes(-(-len(row) * bits // 8), "little"))


def drawn(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    """Indices over the whole range, its ends among them."""
    random = np.random.default_rng(bits)
    indices = random.integers(0, 1 << bits, shape, dtype=np.int64)
    ends = indices.reshape(-1)
    ends[:1], ends[-1:] = 0, (1 << bits) - 1
    return torch.from_numpy(indices)


@pytest.mark.parametrize("bits", range(1, 63))
def test_like_one_large_integer(bits):
    for shape in SHAPES:
        indices = drawn(shape, bits)
        packed = pack(indices, bits)
        *rows, count = shape
        size = -(-count * bits // 8)
        assert packed.dtype == torch.uint8
        assert packed.shape == (*rows, size)
        for i in np.ndindex(*rows):
            assert packed[i].tolist() == one_row(indices[i].tolist(), bits)
        again = unpack(packed, bits, count)
        assert again.dtype == torch.int64
        assert torch.equal(again, indices)


@pytest.mark.parametrize("bits", [3, 10, 31])
def test_beyond_one_block(bits):
    indices = drawn((2, _BLOCK + 77), bits)
    packed = pack(indices, bits)
    assert torch.equal(unpack(packed, bits, indices.shape[-1]), indices)
    low = np.arange(bits)
    plain = (indices.numpy()[..., None] >> low & 1).astype(np.uint8).reshape(2, -1)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(plain, axis=-1, bitorder="little"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64])
def test_arrays_of_any_width(dtype):
    indices = drawn((3, 11), 7).numpy().astype(dtype)
    indices.setflags(write=False)
    packed = pack(indices, 7)
    assert isinstance(packed, np.ndarray)
    assert packed.dtype == np.uint8
    assert packed.tolist() == pack(torch.from_numpy(indices.astype(np.int64)), 7).tolist()
    packed.setflags(write=False)
    again = unpack(packed, 7, 11)
    assert again.dtype == np.int64
    np.testing.assert_array_equal(again, indices)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_whole_bytes_are_little_endian_integers(bits):
    indices = drawn((5, 3), bits)
    want = np.ascontiguousarray(indices.numpy().astype(f"<u{bits // 8}")).view(np.uint8)
    np.testing.assert_array_equal(pack(indices, bits).numpy(), want)


def test_strided_input_and_narrow_tensors():
    indices = drawn((6, 10), 5)
    assert torch.equal(pack(indices.t(), 5), pack(indices.t().contiguous(), 5))
    assert torch.equal(pack(indices.to(torch.uint8), 5), pack(indices, 5))
    packed = torch.stack([pack(indices, 5)] * 2, -1)[..., 0]
    assert torch.equal(unpack(packed, 5, 10), indices)


def test_the_tokens_of_images():
    quantizer = ProductQuantizer(ResidualQuantizer(BSQ(5), multiscale=(1, 2, 3)), P=2)
    tokens = quantizer.encode(torch.randn(4, 3, 3, 10))
    packed = pack(tokens.flatten(1), 5)
    assert packed.shape == (4, -(-14 * 2 * 5 // 8))
    again = unpack(packed, 5, 28).unflatten(1, (14, 2))
    assert torch.equal(again, tokens)
    assert torch.equal(quantizer.decode(again), quantizer.decode(tokens))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu():
    for bits in (1, 13, 62):
        indices = drawn((3, 65), bits)
        packed = pack(indices.cuda(), bits)
        assert torch.equal(packed.cpu(), pack(indices, bits))
        assert torch.equal(unpack(packed, bits, 65).cpu(), indices)


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        ([3, 16], 4, r"pack keeps 4 bits an index, so 0\.\.15, got 3\.\.16"),
        ([-1, 2], 4, r"pack keeps 4 bits an index, so 0\.\.15, got -1\.\.2"),
        ([0.5], 4, r"pack expects integer indices, got (torch\.)?float"),
        ([True], 4, r"pack expects integer indices, got (torch\.)?bool"),
        (3, 4, r"pack expects an axis of indices"),
        ([1], 0, r"pack takes 1 to 62 bits an index, got 0"),
        ([1], 63, r"pack takes 1 to 62 bits an index, got 63"),
    ],
)
def test_what_cannot_be_packed(kind, values, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(kind(values), bits)


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
@pytest.mark.parametrize(
    ("values", "bits", "count", "message"),
    [
        ([1, 2], 4, 5, r"5 indices of 4 bits in 3 bytes \(uint8\) a row, .* shape \(2,\)"),
        ([1, 2], 4, 2, r"2 indices of 4 bits in 1 bytes"),
        ([1, 2], 4, -1, r"-1 indices of 4 bits"),
        ([1, 2], 63, 1, r"unpack takes 1 to 62 bits an index, got 63"),
        (3, 4, 2, r"got torch.uint8 of shape \(\)"),
    ],
)
def test_what_cannot_be_unpacked(kind, values, bits, count, message):
    dtype = torch.uint8 if kind is torch.tensor else np.uint8
    with pytest.raises(ValueError, match=message):
        unpack(kind(values, dtype=dtype), bits, count)


def test_bytes_are_unsigned():
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(2,\)"):
        unpack(torch.tensor([1, 2]), 8, 2)

"""Indices as bits side by side: what tokens weigh on disk and on the wire."""

import math
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from xq.quantizers.bits import MAX_BITS

# bits of the words that are filled; 64 / gcd(64, bits) indices fill whole ones
_WORD = 64
# indices at a time: long rows for torch, little memory beside the result
_BLOCK = 1 << 20

ArrayT = TypeVar("ArrayT", Tensor, np.ndarray)


def pack(indices: ArrayT, bits: int) -> ArrayT:
    """Packs the last axis without gaps, `bits` bits an index, the lowest first.

    Each row starts at a byte of its own, so `pack(tokens.flatten(1), bits)` gives a row of bytes
    for each sample. The bits are those of `numpy.packbits` with `bitorder="little"`; with 8, 16 or
    32 of them, bytes of little-endian integers.

    Args:
        indices: Integers `(..., count)` from 0 to `2**bits - 1`, a tensor or a numpy array.
        bits: Of an index, 1 to 62.

    Returns:
        `uint8`, `(..., ceil(count * bits / 8))`, a tensor or an array as `indices` is.

    Raises:
        ValueError: If `bits` is out of range, or `indices` are no integers or out of range.

    Examples:
        >>> tokens = torch.randint(4096, (10, 572))
        >>> packed = pack(tokens, bits=12)
        >>> packed.shape, packed.dtype
        (torch.Size([10, 858]), torch.uint8)
        >>> torch.equal(unpack(packed, bits=12, count=572), tokens)
        True
    """
    _check_bits("pack", bits)
    if isinstance(indices, Tensor):
        return _packed(_checked_indices(indices, bits), bits)
    if indices.dtype.kind not in "iu":
        raise ValueError(f"pack expects integer indices, got {indices.dtype}")
    values = torch.from_numpy(np.array(indices, np.int64))
    return _packed(_checked_indices(values, bits), bits).numpy()


def unpack(packed: ArrayT, bits: int, count: int) -> ArrayT:
    """The inverse of `pack`.

    Args:
        packed: What it returned.
        bits: As it was given.
        count: Indices in a row, which the bytes alone do not tell.

    Returns:
        `int64`, `(..., count)`, a tensor or an array as `packed` is.

    Raises:
        ValueError: If `bits` is out of range, or `packed` does not hold `count` of them.
    """
    _check_bits("unpack", bits)
    if isinstance(packed, Tensor):
        return _unpacked(_checked_bytes(packed, bits, count), bits, count)
    values = _checked_bytes(torch.from_numpy(np.array(packed)), bits, count)
    return _unpacked(values, bits, count).numpy()


def _check_bits(name: str, bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{name} takes 1 to {MAX_BITS} bits an index, got {bits}")


def _checked_indices(indices: Tensor, bits: int) -> Int[Tensor, "*rows count"]:
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"pack expects integer indices, got {indices.dtype}")
    if indices.ndim == 0:
        raise ValueError("pack expects an axis of indices, got a single one; make it index[None]")
    indices = indices.long()
    if indices.numel():
        low, high = (int(v) for v in torch.aminmax(indices))
        if low < 0 or high >= 1 << bits:
            raise ValueError(
                f"pack keeps {bits} bits an index, so 0..{(1 << bits) - 1}, got {low}..{high}"
            )
    return indices


def _checked_bytes(packed: Tensor, bits: int, count: int) -> UInt8[Tensor, "*rows bytes"]:
    want = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or count < 0 or packed.shape[-1:] != (want,):
        raise ValueError(
            f"unpack expects {count} indices of {bits} bits in {want} bytes (uint8) a row, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    return packed


def _packed(indices: Int[Tensor, "*rows count"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    *rows, count = indices.shape
    places, words = _places(bits)
    groups = -(-count // len(places))
    grouped = F.pad(indices, (0, groups * len(places) - count)).reshape(-1, len(places))
    packed = grouped.new_empty(len(grouped), words)
    for block, out in zip(_blocks(grouped, places), _blocks(packed, places), strict=True):
        # a row for each place in the group: long contiguous ones
        columns = block.t().contiguous()
        filled = columns.new_zeros(words, len(block))
        for column, (word, shift) in zip(columns, places, strict=True):
            filled[word].bitwise_or_(column << shift)
            if shift + bits > _WORD:
                filled[word + 1].bitwise_or_(column >> (_WORD - shift))
        out.copy_(filled.t())
    whole = packed.view(torch.uint8).reshape(*rows, groups * words * _WORD // 8)
    return whole[..., : -(-count * bits // 8)].contiguous()


def _unpacked(
    packed: UInt8[Tensor, "*rows bytes"], bits: int, count: int
) -> Int[Tensor, "*rows {count}"]:
    *rows, size = packed.shape
    places, words = _places(bits)
    groups = -(-count // len(places))
    whole = F.pad(packed, (0, groups * words * _WORD // 8 - size))
    grouped = whole.reshape(-1, words * _WORD // 8).view(torch.int64)
    indices = grouped.new_empty(len(grouped), len(places))
    for block, out in zip(_blocks(grouped, places), _blocks(indices, places), strict=True):
        filled = block.t().contiguous()
        columns = filled.new_empty(len(places), len(block))
        for column, (word, shift) in zip(columns, places, strict=True):
            # the sign is one of the bits, and >> would repeat it
            here = min(bits, _WORD - shift)
            column.copy_(filled[word] >> shift).bitwise_and_((1 << here) - 1)
            if here < bits:
                rest = filled[word + 1] & ((1 << (bits - here)) - 1)
                column |= rest << here
        out.copy_(columns.t())
    return indices.reshape(*rows, groups * len(places))[..., :count].contiguous()


def _places(bits: int) -> tuple[list[tuple[int, int]], int]:
    """For each index of a group: the word that it starts in, and at which bit; how many words."""
    count = _WORD // math.gcd(_WORD, bits)
    return [divmod(i * bits, _WORD) for i in range(count)], count * bits // _WORD


def _blocks(rows: Tensor, places: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    return rows.split(max(_BLOCK // len(places), 1))

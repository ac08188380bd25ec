"""Nearest codes on a GPU: scores and their minimum in one kernel, never n * k of them in memory.

The first kernel keeps the lowest score of each small group of codes and names the best group; the
second looks again at the members of that group alone. So a score costs its products and little
more than one instruction, where to keep the place of each minimum takes three.

Checked in Triton's interpreter and compiled for several GPUs, but not yet run on one: its speed
is unmeasured, and with it every choice in `blocks_for` and in the three constants above it.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

_MAX_DIM = 512
# Triton 3.6 still refuses products over 8 channels
_LEAST_CHANNELS = 8 if [int(part) for part in triton.__version__.split(".")[:2]] >= [3, 9] else 16

# programs that fill the largest GPUs several times; where tokens make fewer, codes are split too
_PROGRAMS = 2048
# codes below which a further split costs more than it gains
_LEAST_SPAN = 512
# what a program of the second kernel works on
_SECOND_TOKENS = 32


class Blocks(NamedTuple):
    """What one program works on at a time, and the warps and pipeline stages it does so with."""

    tokens: int
    codes: int
    channels: int
    group: int
    warps: int
    stages: int


def blocks_for(dim: int) -> Blocks:
    """Chosen by the machine code that the compilers make of it for sm_80 and sm_90.

    A thread has 64 scores in patches of 4 * 4, and a minimum and its place for each 4. Of the
    instructions in the loop 87 % are multiply-adds with 32 channels, 74 % with 8. Contiguous tokens
    spill no register, where 64 channels at once would; for more than 32, steps of 16 pad least
    and take 33 KiB of shared memory.
    """
    channels = _LEAST_CHANNELS if dim <= 8 else 32 if 16 < dim <= 32 else 16
    return Blocks(tokens=128, codes=64, channels=channels, group=4, warps=4, stages=3)


def refusal(x: Tensor) -> str | None:
    """Why `nearest_triton` cannot take these tensors, None if it can."""
    kind, dim = x.device.type, x.shape[-1]
    interpreted = not isinstance(_best_group, triton.JITFunction)
    if kind not in ("cuda", "xpu") and not interpreted:
        return f"the tensors are on {kind}"
    if kind == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "Triton needs a GPU of compute capability 8.0"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32 and the tensors are {x.dtype}"
    if dim > _MAX_DIM:
        return f"dim {dim} exceeds {_MAX_DIM}"
    return None


def nearest_triton(
    x: Float[Tensor, "n dim"],
    rows: Float32[Tensor, "k width"],
    centre: Float32[Tensor, " dim"],
    normalize: bool,
) -> Int64[Tensor, " n"]:
    """Index of the nearest row, the lowest on ties; 0 for a vector with NaN.

    Args:
        x: Vectors of any strides; computed with in float32.
        rows: Points relative to `centre`, each followed by half its squared length (infinity for
            one that shall not be found) and then by any padding. Copied, unless they lie side by
            side, `rows.stride(0) == 1`, and fill whole blocks of 64.
        centre: What to subtract from `x`.
        normalize: Whether to scale `x` to unit length first.
    """
    (n, dim), blocks = x.shape, blocks_for(x.shape[1])
    found = torch.empty(n, dtype=torch.int64, device=x.device)
    if n == 0:
        return found
    columns = _side_by_side(rows, dim, blocks.codes)
    tiles, k = triton.cdiv(n, blocks.tokens), columns.shape[1]
    parts = max(min(_PROGRAMS // tiles, k // _LEAST_SPAN), 1)
    span = triton.cdiv(triton.cdiv(k, parts), blocks.codes) * blocks.codes
    parts = triton.cdiv(k, span)
    split = parts > 1
    lows = torch.empty(parts if split else 0, n, device=x.device)
    groups = found.new_empty(parts, n) if split else found
    tensors = (x, columns, centre.contiguous(), lows, groups)
    strides = (*x.stride(), columns.stride(0))
    fixed = (dim, normalize, split)
    tiling = {"BLOCK_D": blocks.channels, "GROUP": blocks.group, "num_warps": blocks.warps}
    _launch(
        _best_group,
        (tiles, parts),
        *(*tensors, n, k, span, *strides, *fixed, blocks.tokens),
        BLOCK_K=blocks.codes,
        num_stages=blocks.stages,
        **tiling,
    )
    grid = (triton.cdiv(n, _SECOND_TOKENS),)
    _launch(
        _best_member, grid, *tensors, found, n, parts, *strides, *fixed, _SECOND_TOKENS, **tiling
    )
    return found


def _side_by_side(
    rows: Float32[Tensor, "k width"], dim: int, block: int
) -> Float32[Tensor, "channels columns"]:
    """As columns, whose loads are contiguous and free of bank conflicts, filled up to a block."""
    k, missing = len(rows), -len(rows) % block
    if missing == 0 and rows.stride(0) == 1:
        return rows.t()
    columns = rows.new_zeros(dim + 1, k + missing)
    columns[:, :k] = rows[:, : dim + 1].t()
    columns[dim, k:].fill_(torch.inf)
    return columns


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    # Triton launches on the current device, whatever its arguments lie on
    device = arguments[0].device
    on_cpu = device.type == "cpu"
    with nullcontext() if on_cpu else torch.get_device_module(device).device(device):
        # said because a later Triton is to round each product of a multiply-add by default
        kernel[grid](*arguments, **options, enable_fp_fusion=True)


@triton.jit
@no_type_check
def _scale(x_ptr, token, n, x_row, x_col, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    squares = tl.zeros(token.shape, tl.float32)
    for start in range(0, DIM, BLOCK_D):
        channel = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        live = (token < n)[:, None] & (channel < DIM)
        x = tl.load(x_ptr + token[:, None] * x_row + channel * x_col, mask=live, other=0.0)
        squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    return 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)


@triton.jit
@no_type_check
def _minus_tokens(x_ptr, centre_ptr, scale, token, channel, n, x_row, x_col, DIM: tl.constexpr):
    # half precision is widened before any product: the interpreter's of bfloat16 are wrong
    live = (channel < DIM)[None, :]
    x = x_ptr + token[:, None] * x_row + channel[None, :] * x_col
    x = tl.load(x, mask=(token < n)[:, None] & live, other=0.0).to(tl.float32)
    return tl.load(centre_ptr + channel[None, :], mask=live, other=0.0) - x * scale[:, None]


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _best_group(
    x_ptr,
    columns_ptr,
    centre_ptr,
    low_ptr,
    group_ptr,
    n,
    k,
    span,
    x_row,
    x_col,
    columns_row,
    DIM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of tokens against one part of the codes: the first code of the best group."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, k)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if NORMALIZE:
        scale = _scale(x_ptr, token, n, x_row, x_col, DIM, BLOCK_D)
    # each lane has its own minimum; NaN is never below it, nor is the infinity of an unfit code
    lows = tl.full((BLOCK_N, BLOCK_K // GROUP), float("inf"), tl.float32)
    tiles = tl.zeros((BLOCK_N, BLOCK_K // GROUP), tl.int32)
    half_ptr = columns_ptr + tl.full((), DIM, tl.int64) * columns_row
    # a step ahead of their use, since the compiler pipelines only what enters the product
    half = tl.load(half_ptr + first + tl.arange(0, BLOCK_K))
    for start in range(first, last, BLOCK_K):
        code = start + tl.arange(0, BLOCK_K)
        scores = tl.broadcast_to(half[None, :], (BLOCK_N, BLOCK_K))
        half = tl.load(half_ptr + BLOCK_K + code, mask=code < last - BLOCK_K, other=0.0)
        # one round up to 32 channels: the compiler then drops this loop and holds the tokens
        for at in range(0, DIM, BLOCK_D):
            channel = (at + tl.arange(0, BLOCK_D)).to(tl.int64)
            x = _minus_tokens(x_ptr, centre_ptr, scale, token, channel, n, x_row, x_col, DIM)
            points = columns_ptr + channel[:, None] * columns_row + code[None, :]
            points = tl.load(points, mask=(channel < DIM)[:, None], other=0.0)
            # in ieee precision it becomes plain multiply-adds on operands from shared memory, so
            # that writing these out would gain nothing, however few the channels
            scores = tl.dot(x, points, scores, input_precision="ieee")
        low = tl.min(tl.reshape(scores, (BLOCK_N, BLOCK_K // GROUP, GROUP)), 2)
        less = low < lows
        lows = tl.where(less, low, lows)
        tiles = tl.where(less, start, tiles)
    groups = tiles + (tl.arange(0, BLOCK_K // GROUP) * GROUP)[None, :]
    low = tl.min(lows, 1)
    group = tl.min(tl.where(lows == low[:, None], groups, 2147483647), 1)
    at = tl.program_id(1).to(tl.int64) * n + token
    if SPLIT:
        tl.store(low_ptr + at, low, mask=token < n)
    tl.store(group_ptr + at, group.to(tl.int64), mask=token < n)


@triton.jit(do_not_specialize=["n", "parts"])
@no_type_check
def _best_member(
    x_ptr,
    columns_ptr,
    centre_ptr,
    low_ptr,
    group_ptr,
    found_ptr,
    n,
    parts,
    x_row,
    x_col,
    columns_row,
    DIM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The best group of all parts, and the best of its codes."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.load(group_ptr + token, mask=token < n, other=0)
    if SPLIT:
        low = tl.load(low_ptr + token, mask=token < n, other=0.0)
        at = token
        for _ in range(1, parts):
            at += n
            other = tl.load(low_ptr + at, mask=token < n, other=0.0)
            group = tl.where(other < low, tl.load(group_ptr + at, mask=token < n, other=0), group)
            low = tl.minimum(low, other)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if NORMALIZE:
        scale = _scale(x_ptr, token, n, x_row, x_col, DIM, BLOCK_D)
    code = group[:, None] + tl.arange(0, GROUP)[None, :]
    scores = tl.load(columns_ptr + tl.full((), DIM, tl.int64) * columns_row + code)
    for start in range(0, DIM, BLOCK_D):
        channel = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = _minus_tokens(x_ptr, centre_ptr, scale, token, channel, n, x_row, x_col, DIM)
        points = columns_ptr + channel[None, None, :] * columns_row + code[:, :, None]
        points = tl.load(points, mask=(channel < DIM)[None, None, :], other=0.0)
        scores += tl.sum(x[:, None, :] * points, 2)
    scores = tl.where(scores < float("inf"), scores, float("inf"))
    tl.store(found_ptr + token, group + tl.argmin(scores, 1), mask=token < n)

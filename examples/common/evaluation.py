"""How good a tokenizer is on held-out pictures, and what it makes of some of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.parts import coloured
from common.pictures import save_grid, save_progress
from common.usage import usage_by_part
from xq.distributed import all_reduce_sum_
from xq.losses import LPIPS
from xq.metrics import CodebookUsage
from xq.models import Tokenizer


@torch.no_grad()
def evaluate(
    tokenizer: Tokenizer,
    batches: Iterator[tuple[Float[Tensor, "b c h w"], list[str]]],
    perceptual: LPIPS | None,
    device: torch.device,
) -> dict[str, Any]:
    """Means over the pictures of all processes, and the codes that they use.

    PSNR is the mean of the pictures' own; "distance" is the mean squared error plus LPIPS, by
    which the best checkpoint is chosen.
    """
    usage = CodebookUsage.of(tokenizer.quantizer).to(device)
    # squared error, PSNR, LPIPS, pictures
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, _ in batches:
        images = images.to(device)
        made, quantized = tokenizer(images)
        made = made.float().clamp(-1, 1)
        usage.update(quantized.indices)
        error = (made - images).square().flatten(1).mean(1).double()
        sums[0] += error.sum()
        sums[1] += (10 * (4 / error).log10()).sum()
        if perceptual is not None:
            sums[2] += perceptual.distances(coloured(made), coloured(images)).double().sum()
        sums[3] += len(images)
    all_reduce_sum_([sums])
    error, psnr, lpips, count = sums.tolist()
    # collective, too
    found = usage.compute()
    numbers: dict[str, Any] = {"psnr": psnr / count, "distance": (error + lpips) / count}
    if perceptual is not None:
        numbers["lpips"] = lpips / count
    numbers["used"] = usage_by_part(found.used, tokenizer.quantizer)
    numbers["perplexity"] = usage_by_part(found.perplexity, tokenizer.quantizer)
    return numbers


@torch.no_grad()
def draw(
    tokenizer: Tokenizer, images: Float[Tensor, "b c h w"], out: Path, step: int
) -> list[Path]:
    """Writes pictures and reconstructions, and one of them coarse to fine; the files."""
    indices = tokenizer.encode(images)
    made = tokenizer.decode(indices).float().clamp(-1, 1)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"grid-{step:08d}.png"]
    save_grid(files[0], coloured(images), coloured(made), zoom=1)
    if tokenizer.quantizer.depth > 1:
        files.append(out / f"partials-{step:08d}.png")
        parts = [coloured(part.float()) for part in tokenizer.partials(indices[:1])]
        save_progress(files[1], coloured(images[:1]), parts)
    return files

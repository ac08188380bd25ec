"""The multi-scale quantizer step by step, as VAR and XQ-GAN describe it, to time xq against.

Written from the papers and the facts of those codes, and as fast as that form allows: maps with
channels first, `F.interpolate`, one matrix of distances a scale, two mean squared errors a scale.
Where the two codes differ from xq in what they compute (sums instead of means over scales, the
entropy on the full grid), it follows xq, so that outputs and gradients can be compared before
anything is timed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xq.quantizers import BSQ, VQ, ProductQuantizer, Pyramid, ResidualQuantizer
from xq.quantizers.grids import shared_refinement


class LoopOutput(NamedTuple):
    """As `Quantized`, with the losses side by side."""

    z: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor
    entropy: Tensor


class VARLoop(nn.Module):
    """The same quantizer as `product`, with copies of its weights.

    Args:
        product: Over pyramids that share one VQ (euclidean or cosine) or BSQ among their scales.
        entropy: Adds the entropy penalty of BSQ by a softmax over all of its codes.
    """

    def __init__(self, product: ProductQuantizer, *, entropy: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_Branch(branch, entropy) for branch in product.branches)

    def forward(self, x: Tensor) -> LoopOutput:
        """Quantizes maps `(b, h, w, dim)`; indices are `(b, t, P)`."""
        maps = x.permute(0, 3, 1, 2).chunk(len(self.branches), dim=1)
        outputs = [branch(f) for branch, f in zip(self.branches, maps, strict=True)]
        z, indices, *losses = zip(*outputs, strict=True)
        return LoopOutput(
            torch.cat(z, dim=1).permute(0, 2, 3, 1),
            torch.stack(indices, dim=-1),
            *(sum(terms) / len(outputs) for terms in losses),
        )


class _Branch(nn.Module):
    def __init__(self, residual: ResidualQuantizer, entropy: bool) -> None:
        super().__init__()
        leaf, grid = residual.steps[0], residual.grid
        assert isinstance(grid, Pyramid)
        assert residual.shared
        self.codes = _Codebook(leaf) if isinstance(leaf, VQ) else _Signs(leaf, entropy)
        self.sizes = grid.sizes
        self.ratios, self.shared = [], []
        self.refine = nn.ModuleList()
        for refine in grid.refine:
            conv = nn.Conv2d(refine.dim, refine.dim, 3, padding=1)
            conv.load_state_dict(refine.state_dict())
            self.refine.append(conv)
            self.ratios.append(refine.ratio)
        for k in range(len(self.sizes)):
            self.shared.append(shared_refinement(k, len(self.sizes), len(self.refine)))

    def forward(self, f: Tensor) -> tuple[Tensor, ...]:
        f = self.codes.normalized(f).contiguous()
        fixed = f.detach()
        rest, f_hat = fixed.clone(), torch.zeros_like(f)
        indices, commitment, codebook, entropy = [], 0.0, 0.0, 0.0
        last = len(self.sizes) - 1
        for k, (h, w) in enumerate(self.sizes):
            down = rest if k == last else F.interpolate(rest, (h, w), mode="area")
            found = self.codes.search(down.permute(0, 2, 3, 1).reshape(-1, f.shape[1]))
            entropy = entropy + self.codes.entropy(f, f_hat.detach(), (h, w))
            step = self.codes.embed(found).view(-1, h, w, f.shape[1]).permute(0, 3, 1, 2)
            if k < last:
                step = F.interpolate(step, self.sizes[-1], mode="bicubic")
            # those codes keep all maps channel-first in memory
            step = step.contiguous()
            if self.refine:
                conv, ratio = self.refine[self.shared[k]], self.ratios[self.shared[k]]
                step = step * (1 - ratio) + conv(step) * ratio
            f_hat = f_hat + step
            rest -= step.detach()
            commitment = commitment + F.mse_loss(f_hat.detach(), f)
            codebook = codebook + F.mse_loss(f_hat, fixed)
            indices.append(found.view(-1, h * w))
        scales = len(self.sizes)
        z = f + (f_hat - f).detach()
        losses = (commitment / scales, codebook / scales, entropy / scales)
        return (z, torch.cat(indices, dim=1), *losses)


class _Codebook(nn.Module):
    """Learned codes; all distances of a scale in one matrix."""

    def __init__(self, vq: VQ) -> None:
        super().__init__()
        assert not vq.normalize
        self.cosine = vq.metric == "cosine"
        self.weight = nn.Parameter(vq.codebook.codes().detach().clone())

    def normalized(self, f: Tensor) -> Tensor:
        return f

    @torch.no_grad()
    def search(self, x: Tensor) -> Tensor:
        codes = self.weight
        if self.cosine:
            return (F.normalize(x, dim=-1) @ F.normalize(codes, dim=-1).t()).argmax(dim=1)
        distances = x.square().sum(1, keepdim=True) + codes.square().sum(1)
        return distances.addmm_(x, codes.t(), alpha=-2).argmin(dim=1)

    def embed(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight)

    def entropy(self, f: Tensor, f_hat: Tensor, size: tuple[int, int]) -> Tensor:
        return f.new_zeros(())


class _Signs(nn.Module):
    """The corners of a cube; with entropy, a softmax over all of them for each token."""

    powers: Tensor
    codes: Tensor

    def __init__(self, bsq: BSQ, entropy: bool) -> None:
        super().__init__()
        assert isinstance(bsq, BSQ)
        self.scale, self.temperature, self.regularize = bsq.scale, bsq.temperature, entropy
        self.register_buffer("powers", 2 ** torch.arange(bsq.dim))
        if entropy:
            self.register_buffer("codes", bsq.dequantize(torch.arange(bsq.codebook_size)))

    def normalized(self, f: Tensor) -> Tensor:
        return F.normalize(f, dim=1)

    @torch.no_grad()
    def search(self, x: Tensor) -> Tensor:
        return ((x > 0) * self.powers).sum(-1)

    def embed(self, indices: Tensor) -> Tensor:
        signs = (indices[:, None] & self.powers) != 0
        return torch.where(signs, self.scale, -self.scale)

    def entropy(self, f: Tensor, f_hat: Tensor, size: tuple[int, int]) -> Tensor:
        if not self.regularize:
            return f.new_zeros(())
        down = F.interpolate(f - f_hat, size, mode="area").permute(0, 2, 3, 1)
        logits = 2 / self.temperature * down.reshape(-1, f.shape[1]) @ self.codes.t()
        p = logits.softmax(-1)
        per_token = -(p * logits.log_softmax(-1)).sum(-1).mean()
        mean = p.mean(0)
        batch = -(mean * mean.log()).sum()
        maximum = -f.new_tensor(1 / len(self.codes)).log()
        return per_token + maximum - batch

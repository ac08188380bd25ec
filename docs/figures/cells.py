"""The cells of quantizers in two dimensions: which vectors share a code."""

import colorsys

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from docs.figures.drawing import INK, figure
from xq.quantizers import BSQ, FSQ, LFQ, VQ, ProductQuantizer, Quantizer, ResidualQuantizer

REACH = 1.5
# pixels of a side
SIDE = 480


def drawn() -> Figure:
    """Six panels: VQ, RQ, PQ above, LFQ, BSQ, FSQ below."""
    fig = figure(9.0, 6.7)
    panels = fig.subplots(2, 3)
    for axes, (title, quantizer) in zip(panels.flat, quantizers().items(), strict=True):
        panel(axes, title, quantizer)
    return fig


def quantizers() -> dict[str, Quantizer]:
    """What the panels show, with codes that are set, not drawn."""
    plane = VQ(2, 10)
    angles = torch.arange(10) * 2.4
    radii = 0.42 * torch.arange(10).add(0.5).sqrt()
    plane.codebook.load_codes(torch.stack([radii * angles.cos(), radii * angles.sin()], dim=1))

    coarse, fine = VQ(2, 4), VQ(2, 4)
    coarse.codebook.load_codes(torch.tensor([[-0.9, 0.5], [0.7, 0.9], [-0.4, -0.8], [0.9, -0.5]]))
    fine.codebook.load_codes(torch.tensor([[-0.35, 0.1], [0.3, 0.3], [0.1, -0.35], [0.0, 0.05]]))

    across, down = VQ(1, 4), VQ(1, 4)
    across.codebook.load_codes(torch.tensor([[-1.1], [-0.5], [0.1], [1.0]]))
    down.codebook.load_codes(torch.tensor([[-1.0], [-0.2], [0.3], [1.1]]))
    return {
        "VQ, 10 codes": plane,
        "RQ, 4 codes, then 4": ResidualQuantizer([coarse, fine]),
        "PQ, 4 codes a channel": ProductQuantizer([across, down]),
        "LFQ, 2 bits": LFQ(2),
        "BSQ, 2 bits": BSQ(2),
        "FSQ, 5 levels a channel": FSQ([5, 5]),
    }


@torch.no_grad()
def panel(axes: Axes, title: str, quantizer: Quantizer) -> None:
    """The plane in the colours of its codes, and the codes."""
    line = torch.linspace(-REACH, REACH, SIDE)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    indices = quantizer.encode(points)
    flat = indices.reshape(SIDE * SIDE, -1)
    codes, cell = flat.unique(dim=0, return_inverse=True)
    cell = cell.view(SIDE, SIDE)
    image = torch.tensor([pastel(i) for i in range(len(codes))])[cell]
    image[borders(cell, 2)] = 1.0
    if quantizer.code_shape == (2,) and isinstance(quantizer, ResidualQuantizer):
        image[borders(indices[..., 0], 3)] = torch.tensor([0.12, 0.14, 0.19])
    reach = (-REACH, REACH)
    axes.imshow(image.numpy(), origin="lower", extent=(*reach, *reach), interpolation="none")
    z = quantizer.decode(codes.view(-1, *quantizer.code_shape))
    if isinstance(quantizer, BSQ):
        axes.add_patch(Circle((0, 0), 1, fill=False, color=INK, linewidth=1))
    axes.plot(*z.T.tolist(), "o", color=INK, markersize=5, markeredgecolor="white")
    axes.set(xlim=reach, ylim=reach, xticks=[], yticks=[])
    axes.set_title(title, fontsize=12, color=INK)
    axes.spines[:].set_visible(False)


def pastel(i: int) -> tuple[float, float, float]:
    """A light colour, unlike those of its neighbours in number."""
    return colorsys.hls_to_rgb((0.56 + 0.381966 * i) % 1, 0.76 + 0.06 * (i % 3), 0.55)


def borders(cell: torch.Tensor, width: int) -> torch.Tensor:
    """The pixels at most `width` from another cell."""
    different = torch.zeros_like(cell, dtype=torch.bool)
    for axis in (0, 1):
        for step in range(1, width + 1):
            moved = cell.roll(step, axis)
            moved.narrow(axis, 0, step).copy_(cell.narrow(axis, 0, step))
            different |= moved != cell
    return different

"""The best and the worst reconstructions of a data set, as a picture."""

import heapq
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.data import to_image
from common.pictures import GAP, INK, QUIET
from common.whole import written_whole
from xq.distributed import rank, world_size

# of a panel; smaller pictures are enlarged to it
_SIDE, _TEXT, _MARGIN = 160, 22, 74


class Shown(NamedTuple):
    """A picture, its reconstruction and what that is worth, in dB; ties go to earlier rows."""

    psnr: float
    order: int
    image: UInt8[Tensor, "3 h w"]
    made: UInt8[Tensor, "3 h w"]


class Extremes:
    """Keeps the few best and the few worst that it is shown, no others.

    Args:
        keep: How many of each.
    """

    def __init__(self, keep: int = 5) -> None:
        self.keep = keep
        self.best: list[Shown] = []
        self.worst: list[Shown] = []

    def add(
        self,
        rows: range,
        values: Float[Tensor, " b"],
        images: UInt8[Tensor, "b 3 h w"],
        made: UInt8[Tensor, "b 3 h w"],
    ) -> None:
        """Shows it reconstructions with their PSNR."""
        for i, value in enumerate(values.tolist()):
            # a slice would keep its batch in memory
            shown = Shown(value, -rows[i], images[i].cpu().clone(), made[i].cpu().clone())
            self.best = heapq.nlargest(self.keep, [*self.best, shown], key=_by_psnr)
            self.worst = heapq.nsmallest(self.keep, [*self.worst, shown], key=_by_psnr)

    def gather(self) -> None:
        """Those of all processes, on the first one."""
        if world_size() == 1:
            return
        parts: list[tuple[list[Shown], list[Shown]]] | None
        parts = [([], [])] * world_size() if rank() == 0 else None
        dist.gather_object((self.best, self.worst), parts)
        if parts is not None:
            best, worst = ([one for part in parts for one in part[k]] for k in (0, 1))
            self.best = heapq.nlargest(self.keep, best, key=_by_psnr)
            self.worst = heapq.nsmallest(self.keep, worst, key=_by_psnr)

    def save(self, path: Path, title: str) -> None:
        """Draws originals with their reconstructions below, the best ones and the worst ones."""
        columns = len(self.best)
        block = 2 * _SIDE + GAP + _TEXT + 2 * GAP
        size = (_MARGIN + columns * (_SIDE + GAP) + GAP, 2 * block + _TEXT + 2 * GAP)
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((GAP, GAP), title, INK, ImageFont.load_default(13))
        for k, (name, shown) in enumerate((("best", self.best), ("worst", self.worst))):
            top = _TEXT + 2 * GAP + k * block
            draw.text((GAP, top + _SIDE - 10), name, INK, ImageFont.load_default(16))
            for i, one in enumerate(shown):
                left = _MARGIN + i * (_SIDE + GAP)
                for row, pixels in enumerate((one.image, one.made)):
                    panel = to_image(pixels).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
                    sheet.paste(panel, (left, top + row * (_SIDE + GAP)))
                text = f"{one.psnr:.2f} dB, row {-one.order}"
                place = (left + _SIDE / 2, top + 2 * _SIDE + GAP + 4)
                draw.text(place, text, QUIET, ImageFont.load_default(12), anchor="ma")
        with written_whole(path) as beside:
            sheet.save(beside, format="PNG")


def _by_psnr(shown: Shown) -> tuple[float, int]:
    return shown.psnr, shown.order

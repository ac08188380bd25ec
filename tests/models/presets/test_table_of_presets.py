"""The printed table of all presets."""

import torch
from torch import nn

from xq.models import Tokenizer
from xq.models.presets import Row
from xq.models.presets.__main__ import measure, rows, table
from xq.quantizers import VQ, ChannelFirst, EMACodebook, ProductQuantizer


class Patches(nn.Module):
    """Eight pixels a side to a vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 8, stride=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def small() -> Tokenizer:
    codes = VQ(4, 32, codebook=EMACodebook)
    return Tokenizer(Patches(8), ChannelFirst(ProductQuantizer(codes, 2)), nn.Identity())


def test_size():
    size = measure(Row("small", small, 32, None, ""))
    # the codes are buffers here, and count all the same
    assert size == (8 * 3 * 64 + 8 + 2 * 32 * 4, 16, 2, 16 * 2 * 5)


def test_lines():
    text = table([Row("small", small, 32, 1.234, "Somebody"), Row("b", small, 64, None, "x")])
    lines = text.splitlines()
    head = "preset parameters image tokens bits rFID published, not measured here source"
    assert " ".join(lines[0].split()) == head
    assert " ".join(lines[2].split()) == "small 0.0 M 32 2 x 16 160 1.23 Somebody"
    assert " ".join(lines[3].split()) == "b 0.0 M 64 2 x 64 640 -"
    end = lines[0].index("here") + len("here")
    assert lines[2][:end].endswith("1.23")
    assert lines[3][:end].endswith("-")


def test_all_rows_have_names_and_sources():
    found = rows()
    assert len({row.name for row in found}) == len(found) > 20
    assert all(row.source for row in found if row.rfid is not None)
    assert all(row.rfid is None or 0 < row.rfid < 10 for row in found)


def test_all_presets():
    lines = table(rows()).splitlines()
    assert [line.split("  ")[0] for line in lines[2 : 2 + len(rows())]] == [r.name for r in rows()]
    (line,) = (line for line in lines if line.startswith("MSVR10P2-4096"))
    assert line.split()[1:8] == ["172.3", "M", "256", "2", "x", "286", "6864"]
    assert line.endswith("0.80  Li et al. 2024, XQ-GAN")
    assert max(map(len, lines)) <= 160

"""Open-MAGVIT2's names against a plain reading of what they mean, function by function."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xq.models import MAGVIT2Decoder, MAGVIT2Encoder, Tokenizer
from xq.models.checkpoints.open_magvit2 import FORMAT
from xq.quantizers import LFQ

MULTIPLIERS, BLOCKS, DIM = (1, 2, 2), 2, 5
SIZES = {"channels": 64, "multipliers": MULTIPLIERS, "blocks": BLOCKS}


@pytest.fixture(scope="module")
def file() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tokenizer = Tokenizer(MAGVIT2Encoder(DIM, **SIZES), LFQ(DIM), MAGVIT2Decoder(DIM, **SIZES))
    levels = {f"encoder.down.{i}.block.0.conv1.weight": torch.zeros(0) for i in range(3)}
    state = FORMAT.table(levels).revert(tokenizer.state_dict())
    # norms that change nothing would hide a mistake
    return {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in state.items()}


class Naive:
    """The network as its names tell it."""

    def __init__(self, file: dict[str, Tensor]) -> None:
        self.file = file

    def conv(self, name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, self.file[f"{name}.weight"], self.file.get(f"{name}.bias"), **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.file[f"{name}.weight"], self.file[f"{name}.bias"]
        return F.silu(F.group_norm(x, 32, weight, bias, eps=1e-6))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.file[f"{name}.weight"], self.file[f"{name}.bias"])

    def blocks(self, name: str, x: Tensor) -> Tensor:
        for j in range(BLOCKS):
            block = f"{name}.{j}"
            h = self.conv(f"{block}.conv1", self.norm(f"{block}.norm1", x), padding=1)
            h = self.conv(f"{block}.conv2", self.norm(f"{block}.norm2", h), padding=1)
            shortcut = f"{block}.nin_shortcut"
            x = h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.file else x)
        return x

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x, padding=1)
        for i in range(len(MULTIPLIERS)):
            x = self.blocks(f"encoder.down.{i}.block", x)
            if i < len(MULTIPLIERS) - 1:
                x = self.conv(f"encoder.down.{i}.downsample", x, stride=2, padding=1)
        x = self.blocks("encoder.mid_block", x)
        return self.conv("encoder.conv_out", self.norm("encoder.norm_out", x))

    def styled(self, name: str, x: Tensor, z: Tensor) -> Tensor:
        deviation = (z.flatten(2).var(-1, unbiased=True) + 1e-6).sqrt()
        scale, shift = (
            self.linear(f"{name}.gamma", deviation),
            self.linear(f"{name}.beta", z.mean((2, 3))),
        )
        return F.group_norm(x, 32, eps=1e-6) * scale[..., None, None] + shift[..., None, None]

    def double(self, name: str, x: Tensor) -> Tensor:
        x = self.conv(f"{name}.conv1", x, padding=1)
        batch, depth, height, width = x.shape
        channels = depth // 4
        made = x.new_zeros(batch, channels, 2 * height, 2 * width)
        for row in range(2):
            for column in range(2):
                start = (2 * row + column) * channels
                made[:, :, row::2, column::2] = x[:, start : start + channels]
        return made

    def decode(self, z: Tensor) -> Tensor:
        x = self.blocks("decoder.mid_block", self.conv("decoder.conv_in", z, padding=1))
        for i in reversed(range(len(MULTIPLIERS))):
            x = self.blocks(f"decoder.up.{i}.block", self.styled(f"decoder.adaptive.{i}", x, z))
            if i > 0:
                x = self.double(f"decoder.up.{i}.upsample", x)
        return self.conv("decoder.conv_out", self.norm("decoder.norm_out", x), padding=1)


@torch.no_grad()
def test_reads_what_the_names_mean(file):
    assert FORMAT.recognise(file)
    tokenizer, naive = FORMAT.read(file), Naive(file)
    images = torch.randn(2, 3, 12, 20)
    encoded = naive.encode(images)
    torch.testing.assert_close(
        tokenizer.encoder(images).movedim(-1, 1), encoded, atol=1e-4, rtol=1e-4
    )
    signs = torch.where(encoded > 0, 1.0, -1.0)
    made, _ = tokenizer(images)
    torch.testing.assert_close(made, naive.decode(signs), atol=1e-3, rtol=1e-4)


def test_back_to_the_same_file(file):
    back = FORMAT.table(file).revert(FORMAT.read(file).state_dict())
    assert back.keys() == file.keys()
    assert all(torch.equal(tensor, file[key]) for key, tensor in back.items())

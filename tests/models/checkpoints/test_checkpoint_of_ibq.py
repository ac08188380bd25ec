"""A checkpoint of SEED-Voken as Lightning saves it: averages without dots, and the loss."""

import pytest
import torch

from xq.models import CNNDecoder, CNNEncoder, Tokenizer
from xq.models.checkpoints import load_checkpoint
from xq.models.checkpoints.ibq import FORMAT
from xq.quantizers import IBQ

SIZES = {"channels": 8, "multipliers": (1, 2), "blocks": 4, "z_channels": 6}


def theirs(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    names = ["encoder.mid.attn_1.q.weight"]
    names += [f"encoder.down.{i}.block.0.conv1.weight" for i in (0, 1)]
    like = {name: torch.zeros(0) for name in names}
    return FORMAT.table(like).revert(tokenizer.state_dict())


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_averages_and_weights(tmp_path, weights):
    model, averages = (
        Tokenizer(CNNEncoder(4, **SIZES), IBQ(4, 10), CNNDecoder(4, **SIZES)) for _ in range(2)
    )
    state = theirs(model) | {"loss.discriminator.main.0.weight": torch.zeros(1)}
    state |= {"model_ema." + k.replace(".", ""): v for k, v in theirs(averages).items()}
    state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "last.ckpt")
    tokenizer = load_checkpoint(tmp_path / "last.ckpt", weights=weights)
    images = torch.randn(1, 3, 8, 8)
    wanted = averages if weights == "ema" else model
    assert torch.equal(tokenizer.encode(images), wanted.eval().encode(images))
    assert torch.equal(tokenizer(images).image, wanted(images).image)

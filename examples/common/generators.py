"""VAR and AR alike, as far as training and sampling go, and as folders that know their tokens."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.whole import written_whole
from xq.models import AR, VAR, Tokenizer, teacher_forcing
from xq.pretrained import Pretrained
from xq.signature import check_same, signature

# beside the two files of save_pretrained: whose tokens the generator makes
_TOKENS = "tokens.json"


class Objective(nn.Module):
    """The loss of a generator in one forward pass, as data parallelism wants it.

    Args:
        model: The generator.
    """

    def __init__(self, model: VAR | AR) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, given: Tensor, labels: Int[Tensor, " b"], tokens: Int[Tensor, "b ..."]
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy of an index, or of a bit, in nats.

        Args:
            given: See `given_for`.
            labels: Classes, -1 for none.
            tokens: As the store has them.
        """
        return self.model.loss(self.model(given, labels), tokens)


def given_for(model: VAR | AR, quantizer: Any, tokens: Int[Tensor, "b ..."]) -> Tensor:
    """What a generator reads while it learns: sums of scales, or the tokens themselves."""
    return teacher_forcing(quantizer, tokens) if isinstance(model, VAR) else tokens


def make_generator(
    kind: str, quantizer: Any, token_shape: tuple[int, ...], *, dropout: float, **options: Any
) -> VAR | AR:
    """A new generator of a quantizer's tokens.

    Args:
        kind: "var", "var-bits" with a prediction for each bit of LFQ and BSQ, or "ar".
        quantizer: Whose tokens.
        token_shape: Of a row of the store.
        dropout: Rate of dropout in an AR, of stochastic depth in a VAR.
        options: Arguments of both: classes, depth, width, heads, class_drop.

    Raises:
        ValueError: If sizes do not fit, or a VAR is to make tokens without scales.
    """
    if kind == "ar":
        places = token_shape[: len(token_shape) - len(quantizer.code_shape)]
        return AR.of(quantizer, places, dropout=dropout, **options)
    head = "bits" if kind == "var-bits" else "codes"
    return VAR.of(quantizer, head=head, drop_path=dropout, **options)


def save_generator(model: VAR | AR, quantizer: Any, folder: Path) -> None:
    """Writes the generator, and whose tokens it makes."""
    model.save_pretrained(folder)
    with written_whole(folder / _TOKENS) as path:
        path.write_text(json.dumps(signature(quantizer), indent=2) + "\n")


def load_generator(folder: str | Path, tokenizer: Tokenizer) -> VAR | AR:
    """Reads what `save_generator` wrote, in eval mode.

    Raises:
        OSError: If it is not there.
        ValueError: If it makes the tokens of another tokenizer, or is damaged.
    """
    path = Path(folder) / _TOKENS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no folder of a generator; examples/train_generator.py writes one"
        )
    there = json.loads(path.read_text())
    check_same(f"{folder} generates other tokens", there, signature(tokenizer.quantizer))
    model: Any = Pretrained.from_pretrained(folder)
    return model


@torch.no_grad()
def generate(
    model: VAR | AR, quantizer: Any, labels: Int[Tensor, " b"], **options: Any
) -> Int[Tensor, "b ..."]:
    """Tokens of images of these classes, for `tokenizer.decode`; options of `model.generate`."""
    if isinstance(model, VAR):
        return model.generate(quantizer, labels, **options)
    return model.generate(labels, **options)

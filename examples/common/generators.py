"""VAR, AR and RAR alike, in training and sampling, and as folders that know their tokens."""

import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.whole import written_whole
from xq.models import AR, RAR, VAR, Tokenizer, teacher_forcing
from xq.pretrained import Pretrained
from xq.signature import check_same, signature

Generator: TypeAlias = VAR | AR | RAR

# beside the two files of save_pretrained: whose tokens the generator makes
_TOKENS = "tokens.json"


class Objective(nn.Module):
    """The loss of a generator in one forward pass, as data parallelism wants it.

    Args:
        model: The generator.
    """

    def __init__(self, model: Generator) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        given: Tensor,
        labels: Int[Tensor, " b"],
        tokens: Int[Tensor, "b ..."],
        order: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy of an index, or of a bit, in nats.

        Args:
            given: See `given_for`.
            labels: Classes, -1 for none.
            tokens: As the store has them.
            order: In which a RAR is to predict them.
        """
        if order is None:
            return self.model.loss(self.model(given, labels), tokens)
        model: Any = self.model
        return model.loss(model(given, labels, order), tokens, order)


def given_for(model: Generator, quantizer: Any, tokens: Int[Tensor, "b ..."]) -> Tensor:
    """What a generator reads while it learns: sums of scales, or the tokens themselves."""
    return teacher_forcing(quantizer, tokens) if isinstance(model, VAR) else tokens


def make_generator(
    kind: str, quantizer: Any, token_shape: tuple[int, ...], *, dropout: float, **options: Any
) -> Generator:
    """A new generator of a quantizer's tokens.

    Args:
        kind: "var", "var-bits" with a prediction for each bit of LFQ and BSQ, "ar" or "rar".
        quantizer: Whose tokens.
        token_shape: Of a row of the store.
        dropout: Rate of dropout in an AR or RAR, of stochastic depth in a VAR.
        options: Arguments of all: classes, depth, width, heads, class_drop.

    Raises:
        ValueError: If sizes do not fit, or a VAR is to make tokens without scales.
    """
    if kind in ("ar", "rar"):
        places = token_shape[: len(token_shape) - len(quantizer.code_shape)]
        return (AR if kind == "ar" else RAR).of(quantizer, places, dropout=dropout, **options)
    head = "bits" if kind == "var-bits" else "codes"
    return VAR.of(quantizer, head=head, drop_path=dropout, **options)


def save_generator(model: Generator, quantizer: Any, folder: Path) -> None:
    """Writes the generator, and whose tokens it makes."""
    model.save_pretrained(folder)
    with written_whole(folder / _TOKENS) as path:
        path.write_text(json.dumps(signature(quantizer), indent=2) + "\n")


def load_generator(folder: str | Path, tokenizer: Tokenizer) -> Generator:
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
    model: Generator, quantizer: Any, labels: Int[Tensor, " b"], **options: Any
) -> Int[Tensor, "b ..."]:
    """Tokens of images of these classes, for `tokenizer.decode`; options of `model.generate`.

    Raises:
        ValueError: If an argument is out of range, or the model has no such option.
    """
    if "power" in options and not isinstance(model, RAR):
        name = type(model).__name__
        raise ValueError(f"--power is how late guidance grows in a RAR; the generator is of {name}")
    if isinstance(model, VAR):
        return model.generate(quantizer, labels, **options)
    return model.generate(labels, **options)

"""What generators are conditioned on, classes and texts, and the checks that they share."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from xq.precision import eager

# beyond it a softmax over all codes has more weights than the blocks
MOST_CODES = 2**20


class Classes(nn.Module):
    """Class labels as one vector each, with one more for "no class".

    Args:
        classes: How many there are.
        width: Channels of a vector.
    """

    length = 1

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, width)

    def forward(
        self, labels: Int[Tensor, " b"], dropped: Bool[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b 1 width"]:
        return self.table(class_rows(labels, dropped, self.classes))[:, None]

    def checked(self, owner: nn.Module, labels: Tensor, *, look: bool) -> Tensor:
        """The labels in int64.

        Raises:
            ValueError: If they are not `(b,)` integers of known classes.
        """
        return checked_labels(owner, labels, self.classes, look=look)


class Text(nn.Module):
    """Embeddings of a text, through two layers; a learned sequence stands for "no text".

    Args:
        length: How many embeddings a text has.
        channels: Of an embedding.
        width: Channels of a vector for the transformer.
    """

    def __init__(self, length: int, channels: int, width: int) -> None:
        super().__init__()
        self.length, self.channels = length, channels
        self.null = nn.Parameter(torch.randn(length, channels) / channels**0.5)
        self.expand = nn.Linear(channels, width, bias=False)
        self.contract = nn.Linear(width, width, bias=False)

    def forward(
        self, text: Float[Tensor, "b n c"], dropped: Bool[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b n width"]:
        text = text.to(self.null.dtype)
        if dropped is not None:
            text = torch.where(dropped[:, None, None], self.null, text)
        return self.contract(F.gelu(self.expand(text), approximate="tanh"))

    def checked(self, owner: nn.Module, text: Tensor, *, look: bool) -> Tensor:
        """The text as it is; its numbers are not looked at.

        Raises:
            ValueError: If it is not `(b, length, channels)` floating-point embeddings.
        """
        shape = (self.length, self.channels)
        if text.ndim != 3 or tuple(text.shape[1:]) != shape or not text.is_floating_point():
            raise ValueError(
                f"{type(owner).__name__} expects texts as (b, {self.length}, {self.channels}) "
                f"floating-point embeddings, got {text.dtype} of shape {tuple(text.shape)}; pad "
                "or cut them to that length"
            )
        return text


def class_rows(
    labels: Int[Tensor, " b"], dropped: Bool[Tensor, " b"] | None, classes: int
) -> Int[Tensor, " b"]:
    """Rows of a table of classes whose last one is "no class"."""
    none = labels < 0 if dropped is None else dropped | (labels < 0)
    return torch.where(none, classes, labels)


def checked_labels(owner: nn.Module, labels: Tensor, classes: int, *, look: bool) -> Tensor:
    """Class labels in int64; their values are looked at only if asked for.

    Raises:
        ValueError: If they are not `(b,)` integers in -1..classes - 1.
    """
    name = type(owner).__name__
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{name} expects labels as one class id an image, integers of shape (b,), got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    if look and eager(labels) and labels.numel():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < -1 or high >= classes:
            raise ValueError(
                f"{name} has the classes 0..{classes - 1}, and -1 for none, got labels "
                f"{low}..{high}; build it with as many `classes` as the data set has"
            )
    return labels.long()


def check_rates(owner: nn.Module, **rates: float) -> None:
    """Refuses rates of dropout that are none.

    Raises:
        ValueError: If one is not in 0 <= rate < 1.
    """
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{type(owner).__name__} needs 0 <= {name} < 1, got {rate}")

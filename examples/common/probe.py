"""A linear probe: how well classes can be told from features by a linear map, in closed form."""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from common.samples import Folder
from xq.distributed import all_reduce_sum_
from xq.models import Tokenizer
from xq.quantizers import ChannelFirst, Wrapper

NOTE = (
    "continuous: the encoder's vectors, averaged over places; quantized: the codes' vectors, the "
    "same; each channel brought to mean 0 and deviation 1, one-hot classes, ridge regression with "
    "penalty 1e-3 in closed form; share of pictures whose class comes first"
)
_PENALTY = 1e-3
# below this share of the largest deviation a channel is constant
_CONSTANT = 1e-6


class Probe:
    """Ridge regression from features to classes; sums over what it is shown, in float64.

    Args:
        dim: Channels of a feature.
        classes: How many there are.
        device: Of the sums.
    """

    def __init__(self, dim: int, classes: int, device: torch.device) -> None:
        self.classes = classes
        # a constant channel, so that sums and number come with the products
        self.products = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.targets = torch.zeros(dim + 1, classes, dtype=torch.float64, device=device)
        self.hits = torch.zeros(2, dtype=torch.float64, device=device)
        self.weight = self.bias = self.targets[:0]

    def update(self, features: Float[Tensor, "b dim"], labels: Tensor) -> None:
        """Learns from features and their classes."""
        x = torch.cat([features.double(), features.new_ones(len(features), 1)], 1)
        self.products += x.T @ x
        self.targets += x.T @ F.one_hot(labels, self.classes).double()

    def solve(self) -> None:
        """The map that fits what all processes were shown best."""
        all_reduce_sum_([self.products, self.targets])
        products, targets = (x / self.products[-1, -1] for x in (self.products, self.targets))
        mean, shares = products[:-1, -1], targets[-1]
        covariance = products[:-1, :-1] - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        constant = deviation <= _CONSTANT * deviation.max()
        scale = torch.where(constant, 0.0, 1 / deviation)
        correlation = covariance * scale[:, None] * scale
        correlation.diagonal().add_(_PENALTY)
        towards = (targets[:-1] - torch.outer(mean, shares)) * scale[:, None]
        self.weight = torch.linalg.solve(correlation, towards) * scale[:, None]
        self.bias = shares - mean @ self.weight

    def score(self, features: Float[Tensor, "b dim"], labels: Tensor) -> None:
        """Counts which features are given their class."""
        right = (features.double() @ self.weight + self.bias).argmax(1) == labels
        self.hits += torch.stack([right.sum(), right.new_tensor(len(labels), dtype=torch.int64)])

    def accuracy(self) -> float:
        """The share of them, over all processes."""
        hits = self.hits.clone()
        all_reduce_sum_([hits])
        return (hits[0] / hits[1]).item()


class FolderProbes:
    """Probes of what the encoder makes of pictures, and of the codes; classes are folders.

    Args:
        tokenizer: Whose vectors they are.
        source: A folder with a folder for each class, to learn from.
        data: One of this kind, which `score` is given.
        side: Of the pictures.
        device: Of the sums.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If there are fewer than two classes, or `data` has others.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: str, data: str, side: int, device: torch.device
    ) -> None:
        self.tokenizer, self.samples = tokenizer, _folder("--probe", source)
        names = _classes(self.samples, source)
        if len(names) < 2:
            raise ValueError(f"--probe {source} holds one class; a folder for each one is needed")
        others = _classes(_folder("--data", data), data)
        if unknown := sorted(set(others) - set(names)):
            raise ValueError(
                f"--probe {source} lacks {len(unknown)} of the {len(others)} classes of --data "
                f"{data}: {', '.join(unknown[:5])}"
            )
        self.lookup = torch.tensor([names.index(name) for name in others], device=device)
        dim = tokenizer.quantizer.dim
        kinds = ("continuous", "quantized")
        self.probes = {kind: Probe(dim, len(names), device) for kind in kinds}

    def fit(self, z: Tensor, indices: Tensor, labels: list[int]) -> None:
        """Learns from vectors and tokens of pictures of `source`."""
        for kind, features in self._features(z, indices).items():
            self.probes[kind].update(features, torch.tensor(labels, device=z.device))

    def solve(self) -> None:
        """Ends the learning."""
        for one in self.probes.values():
            one.solve()

    def score(self, z: Tensor, indices: Tensor, labels: list[int]) -> None:
        """Counts which pictures of `data` are given their class."""
        for kind, features in self._features(z, indices).items():
            self.probes[kind].score(features, self.lookup[labels])

    def accuracy(self) -> dict[str, float]:
        """Of each probe, over all processes."""
        return {kind: one.accuracy() for kind, one in self.probes.items()}

    def _features(self, z: Tensor, indices: Int[Tensor, "..."]) -> dict[str, Tensor]:
        vectors = {"continuous": z, "quantized": self.tokenizer.quantizer.decode(indices)}
        axis = 1 if _is_channel_first(self.tokenizer.quantizer) else -1
        return {
            kind: v.movedim(axis, -1).flatten(1, -2).double().mean(1) for kind, v in vectors.items()
        }


def _folder(option: str, path: str) -> Folder:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{option} {path} is no folder; a probe needs one for each class")
    try:
        return Folder(Path(path))
    except ValueError as error:
        raise ValueError(f"{option} {path} holds no pictures") from error


def _classes(samples: Folder, root: str) -> list[str]:
    """Names in the order of their labels."""
    return [str(folder.relative_to(root)) for folder in samples.labels]


def _is_channel_first(quantizer: object) -> bool:
    while isinstance(quantizer, Wrapper):
        if isinstance(quantizer, ChannelFirst):
            return True
        quantizer = quantizer.quantizer
    return False

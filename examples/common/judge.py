"""A small classifier of pictures, and what it says of others beside real ones."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.metrics import FrechetDistance

FEATURES = 64
# side of the block means that are the other features
BLOCKS = 8


class Classifier(nn.Module):
    """Three convolutions, a mean, and a linear map."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, FEATURES)):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(FEATURES, classes)

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b features"]:
        """What the classes are read from."""
        return self.layers(images).mean((2, 3))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        return self.last(self.features(images))


def learned(
    data: tuple[Tensor, Tensor], classes: int, steps: int, device: torch.device
) -> Classifier:
    """A classifier, trained with flips."""
    images, labels = data
    classifier = Classifier(classes).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        batch = images[rows].to(device)
        flip = torch.rand(len(batch), 1, 1, 1, device=device) < 0.5
        batch = torch.where(flip, batch.flip(3), batch)
        loss = F.cross_entropy(classifier(batch), labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


class Verdict(NamedTuple):
    """What is said of some pictures.

    Attributes:
        like_their_class: The share that the classifier takes for what they should be.
        frechet: Distance of the classifier's features from those of held-out pictures.
        pixels: Distance of the means of 8 x 8 blocks.
    """

    like_their_class: float
    frechet: float
    pixels: float


class Judge:
    """Compares pictures with held-out ones.

    Args:
        classifier: Gives features and classes.
        held_out: Pictures and labels.
        count: How many of them to compare with.
    """

    def __init__(self, classifier: Classifier, held_out: tuple[Tensor, Tensor], count: int) -> None:
        self.classifier, self.count = classifier, min(count, len(held_out[1]))
        chosen = torch.randperm(len(held_out[1]))[: self.count]
        self.references = self._features(held_out[0][chosen])

    def __call__(self, images: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"]) -> Verdict:
        features = self._features(images)
        device = self.classifier.last.weight.device
        with torch.no_grad():
            found = self.classifier.last(features[0].to(device)).argmax(1).cpu()
        like = (found == labels).double().mean().item()
        return Verdict(like, *map(distance, features, self.references))

    @torch.no_grad()
    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = self.classifier.last.weight.device
        parts = [self.classifier.features(part.to(device)).cpu() for part in images.split(256)]
        return torch.cat(parts), F.adaptive_avg_pool2d(images.mean(1), BLOCKS).flatten(1)


def distance(made: Float[Tensor, "n dim"], real: Float[Tensor, "m dim"]) -> float:
    """The Frechet distance of two sets of features."""
    frechet = FrechetDistance(made.shape[1])
    frechet.made.update(made)
    frechet.reference.update(real)
    return float(frechet.compute())

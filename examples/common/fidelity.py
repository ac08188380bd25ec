"""FID, Inception score, KID, precision and recall with torch-fidelity's network, batch by batch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from xq.backbones import imported
from xq.distributed import all_reduce_sum_, gather_rows, rank

# torch-fidelity's own choices
_SEED, _SPLITS, _SUBSETS, _SUBSET, _NEIGHBOURS = 2020, 10, 100, 1000, 3
_POOL, _LOGITS = "2048", "logits_unbiased"
# pictures whose distances to all others are in memory at a time
_BLOCK = 2000


def note(count: int, against: int) -> str:
    """What is done, with so many pictures on either side."""
    subset = min(_SUBSET, count, against)
    return (
        "bytes, resized to 299 x 299 as TensorFlow 1 does and normalised by torch-fidelity's "
        f"InceptionV3; 2048 pooled channels; Inception score over {min(_SPLITS, count)} splits; "
        f"KID over {_SUBSETS} subsets of {subset}; precision and recall with {_NEIGHBOURS} "
        "neighbours"
    )


def load_inception(weights: str, device: torch.device) -> Any:
    """torch-fidelity's InceptionV3 for FID.

    Args:
        weights: A local file, weights-inception-2015-12-05-6726825d.pth; or "download".
        device: Where it works.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If the download fails.
        ValueError: If the file does not fit.
    """
    imported("torch_fidelity", "--inception", "torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = None if weights == "download" else weights
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"--inception finds no file {path}")
    try:
        if path:
            # torch-fidelity would execute what is in it
            torch.load(path, map_location="cpu", weights_only=True)
        extractor = FeatureExtractorInceptionV3("inception", [_POOL, _LOGITS], path)
    except OSError as error:
        raise OSError(
            f"torch-fidelity's weights cannot be downloaded ({error}); --inception FILE takes them"
        ) from error
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"--inception cannot use {weights}, no such weights: {reason}") from error
    return extractor.to(device)


class Inception:
    """Pooled features and logits of pictures in bytes.

    Args:
        extractor: What `load_inception` gives.
        device: Where it works.
    """

    def __init__(self, extractor: Any, device: torch.device) -> None:
        self.extractor, self.device = extractor, device
        pool, logits = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        self.dim, self.classes = pool.shape[1], logits.shape[1]

    @torch.no_grad()
    def __call__(
        self, pixels: UInt8[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b dim"], Float[Tensor, "b classes"]]:
        found = self.extractor.convert_features_tuple_to_dict(
            self.extractor(pixels.to(self.device))
        )
        return found[_POOL], found[_LOGITS]


class InceptionScore:
    """Inception score (Salimans et al. 2016) from sums: torch-fidelity's splits, known beforehand.

    Args:
        count: How many pictures there will be.
        inception: Whose logits they are.
    """

    def __init__(self, count: int, inception: Inception) -> None:
        splits = min(_SPLITS, count)
        shuffled = np.random.RandomState(_SEED).permutation(count)
        self.split = torch.zeros(count, dtype=torch.int64)
        for k in range(splits):
            self.split[shuffled[k * count // splits : (k + 1) * count // splits]] = k
        self.split = self.split.to(inception.device)
        options: Any = {"dtype": torch.float64, "device": inception.device}
        self.shares = torch.zeros(splits, inception.classes, **options)
        self.negentropies = torch.zeros(splits, **options)
        self.numbers = torch.zeros(splits, **options)

    def update(self, logits: Float[Tensor, "b classes"], rows: range) -> None:
        """Adds the pictures of these rows."""
        where, logits = self.split[rows.start : rows.stop], logits.double()
        shares, logarithms = logits.softmax(1), logits.log_softmax(1)
        self.shares.index_add_(0, where, shares)
        self.negentropies.index_add_(0, where, (shares * logarithms).sum(1))
        self.numbers.index_add_(0, where, torch.ones_like(shares[:, 0]))

    def compute(self) -> dict[str, float]:
        """Mean and deviation over the splits, of all processes."""
        sums = [x.clone() for x in (self.shares, self.negentropies, self.numbers)]
        all_reduce_sum_(sums)
        shares, negentropies, numbers = sums
        mean = shares / numbers[:, None]
        scores = (negentropies / numbers - torch.xlogy(mean, mean).sum(1)).exp()
        return {"is": scores.mean().item(), "is_deviation": scores.std(correction=0).item()}


class FeatureFile:
    """Features of all processes in the order of their rows, in a file that the first one keeps.

    Memory does not grow with them; the file does, by 8 KB a picture.

    Args:
        path: The file.
        count: How many there will be.
        dim: Channels of a feature.
    """

    def __init__(self, path: Path, count: int, dim: int) -> None:
        self.count, self.filled = count, 0
        self.file = np.memmap(path, np.float32, "w+", shape=(count, dim)) if rank() == 0 else None

    def append(self, features: Float[Tensor, "b dim"]) -> None:
        """Adds those of a batch, of which each process has its part."""
        features = gather_rows(features.float(), self.count)
        if self.file is not None:
            self.file[self.filled : self.filled + len(features)] = features.cpu().numpy()
        self.filled += len(features)

    def features(self) -> Float[Tensor, "n dim"]:
        """All of them, read as they are looked at."""
        return torch.from_numpy(self.file)


def distances(made: FeatureFile, reference: FeatureFile) -> dict[str, float]:
    """torch-fidelity's KID, precision and recall, on the process that keeps the files."""
    if made.file is None or reference.file is None:
        return {}
    from torch_fidelity import metric_kid, metric_prc

    both = made.features(), reference.features()
    options: dict[str, Any] = {"verbose": False, "rng_seed": _SEED}
    subset = min(_SUBSET, made.count, reference.count)
    kid = metric_kid.kid_features_to_metric(
        *both, **options, kid_subsets=_SUBSETS, kid_subset_size=subset
    )
    manifolds = metric_prc.prc_features_to_metric(
        *both, **options, prc_neighborhood=_NEIGHBOURS, prc_batch_size=_BLOCK, save_cpu_ram=True
    )
    return {
        "kid": kid[metric_kid.KEY_METRIC_KID_MEAN],
        "kid_deviation": kid[metric_kid.KEY_METRIC_KID_STD],
        "precision": manifolds[metric_prc.KEY_METRIC_PRECISION],
        "recall": manifolds[metric_prc.KEY_METRIC_RECALL],
    }

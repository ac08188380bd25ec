"""Metrics of two processes, one of which may be without data, are those of one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xq.metrics import FeatureMoments, FrechetDistance, RunningUtilisation

GRIDS = ((1, 1), (2, 2))


def measured(part: Callable[[Any], Any]) -> dict[str, Any]:
    """Numbers of what `part` leaves of each batch."""
    generator = torch.Generator().manual_seed(0)
    distance, utilisation = FrechetDistance(5), RunningUtilisation(30, (2,), GRIDS)
    for size in (4, 4, 1):
        features = torch.randn(2, size, 5, generator=generator) + 2
        distance.made.update(part(features[0]))
        distance.reference.update(part(features[1] * 2))
        utilisation.update(part(torch.randint(30, (size, 5, 2), generator=generator)))
    mean, covariance = distance.made.compute()
    return {
        "distance": distance.compute(),
        "mean": mean,
        "covariance": covariance,
        "utilisation": utilisation.compute(),
    }


def measure(rank: int, join: Callable[[], None]) -> list[dict[str, Any]]:
    join()
    lonely = FeatureMoments(3)
    if rank == 0:
        lonely.update(torch.eye(3))
    parts = measured(lambda x: x[rank * len(x) // 2 : (rank + 1) * len(x) // 2])
    return [parts, {"lonely": lonely.compute().covariance}]


@pytest.mark.distributed
def test_two_processes_say_what_one_says(on_processes):
    want = measured(lambda x: x)
    assert 0 < want["utilisation"].min() < 1
    for parts, alone in on_processes(measure):
        torch.testing.assert_close(parts["distance"], want["distance"], rtol=1e-12, atol=0)
        torch.testing.assert_close(parts["mean"], want["mean"], rtol=1e-12, atol=0)
        torch.testing.assert_close(parts["covariance"], want["covariance"], rtol=1e-12, atol=1e-14)
        assert torch.equal(parts["utilisation"], want["utilisation"])
        torch.testing.assert_close(alone["lonely"], torch.cov(torch.eye(3).double()))

"""Orthogonality of codes, against all their cosines."""

import pytest
import torch
import torch.nn.functional as F

from xq.quantizers import VQ, orthogonality


@pytest.mark.parametrize(("size", "dim"), [(9, 4), (4, 9), (5, 5), (1, 3)])
def test_value_and_gradient_equal_the_mean_over_pairs(size: int, dim: int) -> None:
    codes = torch.randn(size, dim, dtype=torch.float64, requires_grad=True)
    pairs = F.cosine_similarity(codes[:, None], codes[None], dim=-1)
    naive = (pairs - torch.eye(size)).square().sum() / size**2
    value = orthogonality(codes)
    torch.testing.assert_close(value, naive)
    found, wanted = (torch.autograd.grad(v, codes)[0] for v in (value, naive))
    torch.testing.assert_close(found, wanted)


def test_orthogonal_codes_have_none() -> None:
    codes = 3 * torch.linalg.qr(torch.randn(6, 6)).Q
    torch.testing.assert_close(orthogonality(codes), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(orthogonality(codes[:4]), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_more_codes_than_channels_have_a_least() -> None:
    codes = torch.cat([torch.eye(4), -torch.eye(4)])
    torch.testing.assert_close(orthogonality(codes), torch.tensor(1 / 4 - 1 / 8))


def test_minimizing_it_turns_codes_apart() -> None:
    vq = VQ(8, 8)
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        orthogonality(vq.codebook.codes()).backward()
        optimizer.step()
    assert orthogonality(vq.codebook.codes()) < 1e-4


@pytest.mark.parametrize(
    "codes", [torch.zeros(2, 3, 4), torch.zeros(0, 3), torch.zeros(3), torch.ones(3, 3).long()]
)
def test_what_is_no_codebook(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"orthogonality takes codes \(codebook_size, dim\)"):
        orthogonality(codes)

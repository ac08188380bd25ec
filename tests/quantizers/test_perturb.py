"""Perturbed: which codes are replaced, how often, and by which."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from xq.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    Perturbed,
    ProductQuantizer,
    Projected,
    ResidualQuantizer,
    robust_schedule,
)


def ranks(vq: VQ, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """How many codes are nearer to each vector than the one it has."""
    order = vq.candidates(vq.bound(x), vq.codebook_size)
    return (order == indices[..., None]).long().argmax(-1)


@pytest.mark.parametrize("training", [False, True])
def test_without_gradients_or_in_eval_mode_nothing_is_perturbed(training: bool) -> None:
    vq = VQ(4, 32)
    perturbed = Perturbed(vq, 8, beta=1.0).train(training)
    x = torch.randn(4, 10, 4)
    with torch.set_grad_enabled(not training):
        got, want = perturbed(x), vq(x)
    assert torch.equal(got.z, want.z)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(perturbed.encode(x), want.indices)


@pytest.mark.parametrize("normalize", [False, True])
def test_tokens_and_vectors_agree(normalize: bool) -> None:
    vq = VQ(4, 32, normalize=normalize)
    perturbed = Perturbed(vq, 8, beta=0.5)
    x = torch.randn(6, 50, 4, requires_grad=True)
    z, indices, losses = perturbed(x)
    want = vq(x)
    assert torch.equal(perturbed.decode(indices), z)
    changed = indices != want.indices
    # half the images, and of these seven in eight tokens or so; all others as they were
    assert sorted(changed.any(-1).tolist()) == [False] * 3 + [True] * 3
    assert 0.75 < changed[changed.any(-1)].float().mean() < 0.97
    found = ranks(vq, x, indices)
    assert found.max() == 7
    # losses are those of the nearest codes, and so the codes' own gradient
    assert all(torch.equal(a, b) for a, b in zip(losses, want.losses, strict=True))
    (grad,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(vq.bound(x).sum(), x)
    torch.testing.assert_close(grad, expected)
    (codes,) = torch.autograd.grad(losses.codebook, vq.codebook.parameters())
    assert codes.any()


def test_all_near_codes_are_equally_likely() -> None:
    vq = VQ(3, 20)
    perturbed = Perturbed(vq, 5, beta=1.0)
    x = torch.randn(20, 500, 3)
    counts = torch.bincount(ranks(vq, x, perturbed(x).indices).flatten(), minlength=20)
    assert counts[5:].sum() == 0
    # 2000 expected, standard deviation 40
    assert ((counts[:5] - 2000).abs() < 200).all()


@pytest.mark.parametrize(
    ("alpha", "delta", "share"), [(0.5, 20, 0.475), (0.2, 4, 0.15), (0.0, 9, 0.0)]
)
def test_tokens_are_replaced_with_probability_alpha(alpha: float, delta: int, share: float) -> None:
    vq = VQ(3, 20)
    x = torch.randn(10, 1000, 3)
    changed = Perturbed(vq, delta, alpha=alpha, beta=1.0)(x).indices != vq(x).indices
    # the nearest code is among those drawn
    assert abs(changed.float().mean() - share) < 0.02


def test_the_number_of_images_is_right_on_average() -> None:
    vq = VQ(3, 20)
    perturbed = Perturbed(vq, 20, beta=0.1)
    x = torch.randn(4, 9, 3)
    want = vq(x).indices
    changed = [(perturbed(x).indices != want).any(-1) for _ in range(200)]
    images = torch.stack(changed).float()
    # one of four in 40 % of the batches, and each as often as the others
    assert set(images.sum(-1).tolist()) == {0.0, 1.0}
    assert abs(images.mean() - 0.1) < 0.025
    assert (images.mean(0) > 0.04).all()


def test_beta_of_zero_and_one() -> None:
    vq, x = VQ(3, 20), torch.randn(5, 40, 3)
    want = vq(x).indices
    assert torch.equal(Perturbed(vq, 20, beta=0.0)(x).indices, want)
    assert (Perturbed(vq, 20, beta=1.0)(x).indices != want).any(-1).all()
    assert Perturbed(vq, 20)(x[:0]).indices.shape == (0, 40)


def test_a_generator_repeats_the_draw_and_leaves_torch_alone() -> None:
    x = torch.randn(5, 40, 3)
    vq = VQ(3, 20)
    state = torch.get_rng_state()
    a, b = (
        Perturbed(vq, 9, beta=0.5, generator=torch.Generator().manual_seed(3))(x).indices
        for _ in range(2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, vq(x).indices)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_schedule() -> None:
    values = [robust_schedule(epoch / 200) for epoch in (0, 40, 80, 120, 200)]
    assert values == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    vq, x = VQ(3, 20), torch.randn(10, 400, 3)
    perturbed = Perturbed(vq, 9, beta=1.0)
    perturbed.progress = 1.0
    found = ranks(vq, x, perturbed(x).indices)
    # alpha 0.5 and delta int(4.5): half the tokens, three of four of them to another code
    assert found.max() == 3
    assert abs((found > 0).float().mean() - 0.375) < 0.03
    perturbed = Perturbed(vq, 9, beta=1.0, schedule=lambda progress: 0.0)
    assert torch.equal(perturbed(x).indices, vq(x).indices)


def test_averages_learn_from_the_nearest_codes() -> None:
    plain = VQ(4, 16, codebook=partial(EMACodebook, decay=0.5))
    perturbed = Perturbed(copy.deepcopy(plain), 8, beta=1.0)
    for _ in range(3):
        x = torch.randn(4, 20, 4)
        z, indices, _ = perturbed(x)
        plain(x)
        assert torch.equal(perturbed.decode(indices), z)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(perturbed.state_dict()[f"quantizer.{key}"], tensor)


@pytest.mark.parametrize("make", [lambda: LFQ(6), lambda: BSQ(6)])
def test_sign_codes_flip_their_cheapest_bits(make: Callable[[], Any]) -> None:
    leaf = make()
    perturbed = Perturbed(leaf, 4, beta=1.0)
    x = torch.randn(3, 200, 6)
    z, indices, _ = perturbed(x)
    assert torch.equal(perturbed.decode(indices), z)
    near = leaf.candidates(leaf.bound(x), 4)
    assert (near == indices[..., None]).any(-1).all()
    assert 0.6 < (indices != leaf.encode(x)).float().mean() < 0.9


def test_other_wrappers_go_around_it() -> None:
    wrapped = ChannelFirst(Projected(Perturbed(VQ(3, 20), 20, beta=1.0), 8))
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    z, indices, losses = wrapped(x)
    assert (indices != wrapped.encode(x)).float().mean() > 0.8
    assert torch.equal(wrapped.decode(indices), z)
    (z.sum() + losses.total()).backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    perturbed = Perturbed(VQ(3, 20), 20, beta=1.0)
    z, indices, _ = perturbed(torch.randn(4, 9, 3).to(dtype))
    assert z.dtype == dtype
    assert torch.equal(perturbed.decode(indices).to(dtype), z)


def test_copies_and_configuration() -> None:
    perturbed = Perturbed(VQ(3, 20), 7, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(perturbed)
    x = torch.randn(20, 9, 3)
    assert torch.equal(twin(x).indices, perturbed(x).indices)
    assert perturbed.config() == {
        "quantizer": perturbed.config()["quantizer"],
        "delta": 7,
        "alpha": 1.0,
        "beta": 0.1,
        "schedule": {"function": "robust_schedule"},
    }
    assert "delta=7, alpha=1.0, beta=0.1" in repr(perturbed)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "delta": (lambda: Perturbed(VQ(3, 20), 21), r"needs delta in 1..20, the codes of VQ, got 21"),
    "no delta": (lambda: Perturbed(VQ(3, 20), 0), "got 0"),
    "alpha": (lambda: Perturbed(VQ(3, 20), 2, alpha=1.5), "got alpha=1.5 and beta=0.1"),
    "beta": (lambda: Perturbed(VQ(3, 20), 2, beta=-1.0), "got alpha=1.0 and beta=-1.0"),
    "residual": (
        lambda: Perturbed(ResidualQuantizer(VQ(3, 20), 2), 2),
        "candidates of a leaf such as VQ, ResidualQuantizer has none",
    ),
    "product": (
        lambda: Perturbed(ProductQuantizer(VQ(3, 20), P=2), 2),
        "ProductQuantizer has none",
    ),
    "fsq": (lambda: Perturbed(FSQ([3, 3]), 2), "FSQ has none"),
    "wrapper": (
        lambda: Perturbed(Projected(VQ(3, 20), 5), 2),  # pyright: ignore[reportArgumentType]
        r"ChannelFirst\(Perturbed\(VQ|'quantizer'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    make, message = BAD[name]
    # under the jaxtyping hook the annotation refuses the wrapper first
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_single_vector_has_no_images() -> None:
    with pytest.raises(ValueError, match=r"among the images of a batch, got shape \(3,\)"):
        Perturbed(VQ(3, 20), 2)(torch.randn(3))
    with pytest.raises(ValueError, match="VQ expects 3 channels in the last axis"):
        Perturbed(VQ(3, 20), 2)(torch.randn(5, 4))

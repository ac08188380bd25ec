"""What is broken elsewhere is right here: one test for each row of docs/complaints.md.

Each names a defect of vector-quantize-pytorch 1.31 or 1.32, found by running it. Those that need
several processes are in test_on_several_processes.py.
"""

import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from family import EMA, LEAVES, assert_same_state, nest, state, step
from torch import Tensor

from xq.quantizers import (
    FSQ,
    LFQ,
    VQ,
    ChannelFirst,
    DiVeQ,
    EMACodebook,
    GradientCodebook,
    Masked,
    ProductQuantizer,
    Projected,
    ResidualQuantizer,
    SimCodebook,
    beam_encode,
    initialize,
    rotation_trick,
    sign_entropy,
)

MIB = 1 << 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: ResidualQuantizer(VQ(6, 9, codebook=EMA), 3),
        lambda: Projected(ResidualQuantizer(VQ(2, 9, codebook=EMA), 3), 6),
        lambda: ProductQuantizer(ResidualQuantizer(VQ(3, 9, codebook=EMA), 3), P=2),
    ],
    ids=["residual", "fewer channels", "groups"],
)
def test_defect_01_residuals_of_feature_maps(make: Callable[[], Any]) -> None:
    """ResidualVQ(accept_image_fmap=True) raises unless channels, height and width are equal."""
    quantizer = ChannelFirst(make())
    x = torch.randn(2, 6, 3, 5)
    z, indices, _ = quantizer(x)
    assert z.shape == x.shape
    assert indices.shape == (2, 3, 5, *quantizer.code_shape)
    assert torch.equal(quantizer.decode(indices), z)
    # each place by itself, whatever the layout
    assert torch.equal(quantizer.encode(x[:, :, 1:, :2]), quantizer.encode(x)[:, 1:, :2])


def with_heads() -> Any:
    return ProductQuantizer(VQ(2, 9), P=2, shared=True)


@pytest.mark.parametrize(
    ("make", "dim"),
    [
        (lambda: Projected(VQ(3, 9), 7), 7),
        (with_heads, 4),
        (lambda: VQ(4, 9, normalize=True), 4),
        (lambda: VQ(4, 9, metric="cosine"), 4),
        (lambda: Projected(VQ(3, 9, normalize=True), 7), 7),
    ],
    ids=["projected", "heads", "unit", "cosine", "projected unit"],
)
def test_defect_06_masks_with_projections_heads_and_cosine(
    make: Callable[[], Any], dim: int
) -> None:
    """A mask raises with codebook_dim or heads; with cosine codes the commitment is another."""
    plain = make()
    masked, x = Masked(plain), torch.randn(3, 5, dim)
    everything = masked(x, mask=torch.ones(3, 5, dtype=torch.bool))
    for name, value in plain(x).losses._asdict().items():
        torch.testing.assert_close(getattr(everything.losses, name), value)
    assert torch.equal(everything.indices, plain.encode(x))
    mask = torch.rand(3, 5) < 0.6
    some = masked(x, mask=mask)
    torch.testing.assert_close(some.losses, plain(x[mask]).losses)
    assert torch.equal(some.z[mask], plain(x[mask]).z)
    assert (some.indices[~mask] == -1).all()


def test_defect_07_masks_and_searches_in_eval_mode() -> None:
    """In 1.31 a mask with channels first, top k codes and a beam search in eval mode all raise."""
    quantizer = ResidualQuantizer(VQ(4, 9), 3)
    masked = ChannelFirst(Masked(quantizer))
    leaf: Any = quantizer.steps[0]
    x, mask = torch.randn(2, 4, 6), torch.rand(2, 6) < 0.5
    last = x.movedim(1, -1)
    found = []
    for training in (True, False):
        masked.train(training)
        z, indices, _ = masked(x, mask=mask)
        assert torch.equal(z.movedim(1, -1)[mask], quantizer(last[mask]).z)
        assert (indices[~mask] == -1).all()
        near = torch.cdist(last, leaf.codebook.weight).topk(3, largest=False).indices
        assert torch.equal(leaf.candidates(last, 3), near)
        found.append(beam_encode(masked, x, 4, mask=mask))
        assert found[-1].shape == indices.shape
    assert torch.equal(*found)


@pytest.mark.parametrize("name", LEAVES)
def test_defect_08_state_loads_and_eval_leaves_it_alone(name: str) -> None:
    """A checkpoint of affine codes does not load, and eval mode moves their output by 2.9."""
    quantizer, fresh = nest(LEAVES[name]()), nest(LEAVES[name]())
    for _ in range(3):
        step(quantizer, torch.randn(50, 8))
    saved = state(quantizer)
    fresh.load_state_dict(saved, strict=True)
    quantizer.eval()
    fresh.eval()
    x = torch.randn(20, 8)
    first = quantizer(x)
    for _ in range(3):
        quantizer(torch.randn(50, 8))
    assert_same_state(quantizer, saved)
    assert torch.equal(quantizer(x).z, first.z)
    assert torch.equal(fresh(x).z, first.z)
    assert torch.equal(fresh.decode(first.indices), first.z)


@pytest.mark.parametrize("name", ["lfq", "bsq", "fsq", "unit vq"])
def test_defect_09_residuals_of_fixed_codes_decode(name: str) -> None:
    """Residuals of spherical or rotated LFQ and of rotated FSQ decode 1.1 to 3.9 off."""
    residual = ResidualQuantizer(LEAVES[name](), 4)
    x = torch.randn(40, 4)
    z, indices, _ = residual(x)
    assert torch.equal(residual.decode(indices), z)
    u = residual.bound(x)
    errors = [(u - total).square().mean() for total in residual.partials(indices)]
    assert errors[3] < errors[0] / 2


def test_defect_10_learned_values_of_a_channel_are_decoded() -> None:
    """LatentQuantize decodes without its learned values, 1.35 off; an optimizer for them raises."""
    torch.manual_seed(0)
    latent = ProductQuantizer(VQ(1, 5), P=3)
    before = state(latent)
    optimizer = torch.optim.AdamW(latent.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        latent(torch.randn(64, 3)).losses.total().backward()
        optimizer.step()
    for key, codes in latent.state_dict().items():
        assert (codes - before[key]).abs().max() > 0.5
    z, indices, _ = latent(torch.randn(64, 3))
    assert torch.equal(latent.decode(indices), z)


def test_defect_11_diveq_is_silent_in_eval_mode() -> None:
    """ResidualVQ(diveq=True) adds noise of 0.23 in eval mode, so that decode gives another z."""
    residual = ResidualQuantizer(VQ(4, 9, estimator=DiVeQ()), 3)
    x = torch.randn(30, 4)
    noisy = residual(x)
    assert not torch.equal(noisy.z, residual.decode(noisy.indices))
    residual.eval()
    z, indices, _ = residual(x)
    assert torch.equal(z, residual(x).z)
    assert torch.equal(z, residual.decode(indices))
    assert torch.equal(indices, noisy.indices)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7, -1.0, -1.0001], ids=str)
def test_defect_12_the_rotation_trick_where_none_is_defined(scale: float) -> None:
    """At zero the gradient of the rotation trick is 5e6, and its output is off by 2.1."""
    vq = VQ(4, 1, estimator=rotation_trick)
    code = torch.tensor([[1.5, -1.0, 0.5, 1.0]])
    vq.codebook.load_codes(code)
    x = (scale * code).requires_grad_()
    z, indices, _ = vq(x)
    assert torch.equal(z, code)
    assert torch.equal(vq.decode(indices), z)
    (gradient,) = torch.autograd.grad(z.sum(), x)
    assert gradient.isfinite().all()
    # at most as much longer as the code is, and straight through where that has no meaning
    assert gradient.norm() <= 2 * (1 + 1e-4)


@pytest.mark.parametrize(
    "make",
    [lambda: FSQ([16] * 9), lambda: FSQ([2] * 62), lambda: LFQ(62, regularize=False)],
    ids=["16^9", "2^62", "62 signs"],
)
def test_defect_13_indices_beyond_int32_and_no_table(make: Callable[[], Any]) -> None:
    """FSQ([16] * 9) has an int32 that overflows to 0; FSQ and LFQ build all codes at once."""
    # one that kept its constants would find them kept
    make()
    assert peak_bytes(make) < MIB
    quantizer = make()
    assert not quantizer.state_dict()
    x = 2 * torch.randn(300, quantizer.dim)
    z, indices, _ = quantizer(x)
    assert indices.max() > 2**31
    assert indices.min() >= 0
    assert torch.equal(quantizer.decode(indices), z)
    assert len(indices.unique()) == len(z.unique(dim=0))
    last = torch.full((1, quantizer.dim), 9.0)
    assert quantizer.encode(last).item() == quantizer.codebook_size - 1


def test_defect_14_groups_of_levels_and_uneven_parts() -> None:
    """Grouped residual FSQ refuses feature maps; uneven groups have no codebooks; SimVQ no dims."""
    levels = ChannelFirst(ProductQuantizer(ResidualQuantizer(FSQ([5, 4, 3]), 2), P=2))
    x = torch.randn(2, 6, 3, 5)
    z, indices, _ = levels(x)
    assert z.shape == x.shape
    assert indices.shape == (2, 3, 5, 2, 2)
    assert torch.equal(levels.decode(indices), z)
    uneven = ProductQuantizer([ResidualQuantizer(VQ(d, 9), 2) for d in (1, 3, 2)])
    z, indices, _ = uneven(torch.randn(4, 6))
    assert torch.equal(uneven.decode(indices), z)
    codes = [step.codebook.codes() for branch in uneven.branches for step in branch.steps]
    assert [tuple(table.shape) for table in codes] == [(9, 1)] * 2 + [(9, 3)] * 2 + [(9, 2)] * 2
    sim = ResidualQuantizer(VQ(4, 9, codebook=SimCodebook), 2)
    assert (sim.dim, sim.codebook_size, sim.code_shape) == (4, 9, (2,))


@pytest.mark.parametrize("name", LEAVES)
def test_defect_15_every_quantizer_pickles(name: str) -> None:
    """LFQ(spherical=True) holds a lambda: neither torch.save nor a spawned worker takes it."""
    quantizer = ChannelFirst(nest(LEAVES[name]())).eval()
    x = torch.randn(3, 8, 5)
    twin = pickle.loads(pickle.dumps(quantizer))
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    for read in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(read(x).z, quantizer(x).z)


@pytest.mark.parametrize("name", LEAVES)
def test_defect_16_a_batch_of_padding_has_a_finite_loss(name: str) -> None:
    """LFQ gives NaN as the loss of a batch without a valid token."""
    masked = Masked(LEAVES[name]())
    before = state(masked)
    x = torch.randn(2, 3, 4, requires_grad=True)
    z, indices, losses = masked(x, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert all(loss.isfinite() for loss in losses)
    (z.sum() + losses.total()).backward()
    for parameter in (x, *masked.parameters()):
        assert parameter.grad is None or (parameter.grad == 0).all()
    assert (indices == -1).all()
    assert (z == 0).all()
    assert_same_state(masked, before)


@pytest.mark.parametrize("decay", [0.0, 0.8, 0.99])
def test_defect_17_codes_that_were_set_survive_training(decay: float) -> None:
    """`vq.codebook = codes` leaves the averages as they were: the next step throws codes away."""
    vq = VQ(4, 17, codebook=partial(EMACodebook, decay=decay))
    for _ in range(3):
        vq(torch.randn(100, 4))
    codes = 10 * torch.randn(17, 4)
    vq.codebook.load_codes(codes)
    x = codes.repeat(8, 1)
    for _ in range(5):
        assert torch.equal(vq(x).indices, torch.arange(17).repeat(8))
    torch.testing.assert_close(vq.codebook.codes(), codes, rtol=1e-5, atol=1e-5)


def test_defect_18_no_codes_of_zeros_and_none_set_in_eval_mode() -> None:
    """With kmeans_init codes are zeros until the first batch, which sets them in eval mode too."""
    vq = VQ(4, 17, codebook=EMA)
    before = state(vq)
    assert len(vq.codebook.codes().unique(dim=0)) == 17
    assert (vq.codebook.codes() != 0).all()
    vq.eval()
    z, indices, _ = vq(torch.randn(100, 4))
    assert_same_state(vq, before)
    assert (z != 0).all()
    assert torch.equal(vq.decode(indices), z)
    # k-means is a call of its own
    initialize(vq, 5 + torch.randn(100, 4))
    assert (vq.codebook.codes().mean(0) - 5).abs().max() < 1


@pytest.mark.parametrize("name", LEAVES)
def test_defect_19_nothing_is_learned_without_gradients(name: str) -> None:
    """A training-mode forward under no_grad moves the averages, by 0.42."""
    quantizer = nest(LEAVES[name]()).train()
    step(quantizer, torch.randn(50, 8))
    before = state(quantizer)
    with torch.no_grad():
        quantizer(torch.randn(50, 8))
    with torch.inference_mode():
        quantizer(torch.randn(50, 8))
    quantizer.encode(torch.randn(50, 8))
    assert_same_state(quantizer, before)


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_defect_20_decode_gives_what_the_decoder_saw(decay: float) -> None:
    """Codes move within the forward, so that a training z and decode(indices) differ by 0.78."""
    residual = ResidualQuantizer(VQ(4, 9, codebook=partial(EMACodebook, decay=decay)), 2)
    for k in range(5):
        before = state(residual)
        z, indices, _ = residual(3 * torch.randn(50, 4) + k)
        assert torch.equal(residual.decode(indices), z)
        # and it learned: this is no standstill
        assert any(not torch.equal(t, before[key]) for key, t in residual.state_dict().items())


@pytest.mark.parametrize("name", LEAVES)
def test_defect_21_no_state_and_no_eval_loss_has_a_gradient(name: str) -> None:
    """After a step a buffer and eval losses require gradients; in bfloat16 losses are rounded."""
    quantizer = LEAVES[name]()
    for _ in range(2):
        step(quantizer, torch.randn(50, 4, requires_grad=True))
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())
    quantizer.eval().requires_grad_(False)
    assert not any(loss.requires_grad for loss in quantizer(torch.randn(50, 4)).losses)
    quantizer.bfloat16()
    z, _, losses = quantizer(torch.randn(50, 4, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses)


def exact_batch_entropy(logits: Tensor) -> Tensor:
    """Over all sign codes, in double precision."""
    signs = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5]).double()] * logits.shape[1])
    mean = (logits.double() @ signs.t()).softmax(-1).mean(0)
    return torch.special.entr(mean).sum()


def test_defect_22_the_entropy_of_many_bits_has_no_ceiling() -> None:
    """log(max(p, 1e-5)) caps the entropy at 11.5 nats; the gradient is 9.5 % off at 16 bits."""
    for bits in (17, 18, 20):
        batch = sign_entropy(torch.zeros(3, bits)).batch
        assert batch.item() == pytest.approx(bits * math.log(2), rel=1e-6)
    logits = torch.randn(64, 16, requires_grad=True)
    (got,) = torch.autograd.grad(sign_entropy(logits).batch, logits)
    (want,) = torch.autograd.grad(exact_batch_entropy(logits), logits)
    assert (got - want).norm() < 1e-4 * want.norm()


def sum_of_errors_search(tables: list[Tensor], x: Tensor, width: int) -> Tensor:
    """Squared errors of a beam search that adds up the errors of all steps."""
    rest, scores = x[:, None], torch.zeros(len(x), 1)
    for table in tables:
        left = rest[:, :, None] - table
        added = scores[:, :, None] + left.square().sum(-1)
        scores, best = added.flatten(1).topk(width, largest=False)
        rest = left.flatten(1, 2).gather(1, best[..., None].expand(-1, -1, x.shape[1]))
    return rest[:, 0].square().sum(-1)


def test_defect_23_a_beam_search_goes_by_the_final_error() -> None:
    """Scored by the sum of all steps' errors, 8 beams err by 31 % more than they need to."""
    residual = ResidualQuantizer(VQ(8, 32), 8)
    tables = [torch.randn(32, 8) * 0.7**k for k in range(8)]
    for leaf, table in zip(residual.steps, tables, strict=True):
        leaf.codebook.load_codes(table)
    x = torch.randn(200, 8)
    found = residual.decode(beam_encode(residual, x, 8))
    errors = (found - x).square().sum(-1)
    greedy = (residual.decode(residual.encode(x)) - x).square().sum(-1)
    assert (errors <= greedy).all()
    assert errors.mean() < 0.7 * greedy.mean()
    assert errors.mean() < 0.8 * sum_of_errors_search(tables, x, 8).mean()


@pytest.mark.parametrize("codebook", [GradientCodebook, EMA], ids=["gradient", "ema"])
def test_defect_24_a_lookup_is_a_search_and_a_gather(
    codebook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-hot rows of all codes take 386 MiB for 2048 vectors and 8192 codes, in eval mode too."""
    # what torch allocates is what is counted
    monkeypatch.setenv("XQ_LOOKUP", "chunked")
    vq, x = VQ(32, 8192, codebook=codebook), torch.randn(2048, 32, requires_grad=True)
    assert peak_bytes(lambda: step(vq, x)) < 16 * MIB
    vq.eval()
    assert peak_bytes(lambda: vq(x)) < 16 * MIB
    # the counter would notice a matrix of all distances
    assert peak_bytes(lambda: torch.cdist(x, vq.codebook.codes())) > 60 * MIB


@pytest.mark.parametrize(
    "make",
    [
        lambda: ResidualQuantizer(VQ(4, 9, codebook=EMA), 4),
        lambda: ProductQuantizer(ResidualQuantizer(VQ(2, 9), 4), P=2),
        lambda: ResidualQuantizer(FSQ([5, 4, 3, 3]), 4),
    ],
    ids=["residual", "product", "levels"],
)
def test_defect_25_fewer_steps_decode(make: Callable[[], Any]) -> None:
    """get_codes_from_indices refuses fewer steps unless it trained with quantizer dropout."""
    quantizer = make().eval()
    x = torch.randn(30, 4)
    indices = quantizer.encode(x)
    for k, partial_sum in enumerate(quantizer.partials(indices), 1):
        assert torch.equal(quantizer.decode(indices[..., :k]), partial_sum)
        assert torch.equal(quantizer(x, k).z, partial_sum)

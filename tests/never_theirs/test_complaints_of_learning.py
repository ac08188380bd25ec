"""What users of other libraries report about how codebooks learn; see docs/complaints.md."""

import copy
import io
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_bytes
from family import EMA, LEAVES, nest, state, step
from torch import Tensor, nn

from xq.metrics import CodebookUsage
from xq.quantizers import (
    BSQ,
    IBQ,
    LFQ,
    VQ,
    CodeSampling,
    EMACodebook,
    GradientCodebook,
    ProductQuantizer,
    ResidualQuantizer,
    entropy_in_bits,
    initialize,
    orthogonality,
    rotation_trick,
    straight_through,
)

MIB = 1 << 20
REVIVED = partial(GradientCodebook, decay=0.9, revive=0.02)


def far_data(count: int = 1, rows: int = 600, dim: int = 4) -> list[Tensor]:
    """Batches that lie far from where codes start."""
    generator = torch.Generator().manual_seed(0)
    return [5 + torch.randn(rows, dim, generator=generator) for _ in range(count)]


def used_after(vq: Any, steps: int = 12) -> float:
    """The share of codes that a data set uses after some steps of training on it."""
    batches = far_data(steps)
    for x in batches:
        step(vq, x)
    usage = CodebookUsage.of(vq)
    # the codes follow their statistics as the next step starts
    usage.update(vq(torch.cat(batches)).indices)
    return usage.compute().used.mean().item()


@pytest.mark.parametrize("codebook", [EMA, REVIVED], ids=["ema", "gradient"])
def test_complaint_07_codebooks_do_not_collapse(codebook: Any) -> None:
    """Usage falls to a few per cent (lucidrains/vector-quantize-pytorch#170, SEED-Voken#59)."""
    assert used_after(VQ(4, 100, codebook=codebook)) > 0.97
    assert used_after(ResidualQuantizer(VQ(4, 100, codebook=codebook), 2)) > 0.95
    # it is no easy data: without revival most are never used
    assert used_after(VQ(4, 100, codebook=partial(codebook.func, revive=0.0))) < 0.5


def test_complaint_08_rotated_or_drawn_codes_stay_in_use() -> None:
    """With the rotation trick 40 to 90 % of codes die (lucidrains/vector-quantize-pytorch#205)."""
    assert used_after(VQ(4, 100, codebook=EMA, estimator=rotation_trick)) > 0.97
    drawn = VQ(4, 100, codebook=EMA, sampling=CodeSampling(1.0))
    assert used_after(drawn) > 0.97
    # fewer vectors than codes, and none at all: nothing to assert about a total count
    for rows in (3, 1, 0):
        z, indices, _ = drawn(torch.randn(rows, 4))
        assert torch.equal(drawn.decode(indices), z)


@pytest.mark.parametrize("codebook", [EMACodebook, GradientCodebook])
def test_complaint_09_revival_is_relative_to_the_fair_count(codebook: Any) -> None:
    """A threshold of 2 means nothing where a batch has few vectors a code (WavTokenizer#82)."""
    x = torch.cat([torch.zeros(99, 1), torch.ones(1, 1)])
    for repeats in (1, 30):
        for share, stays in ((0.015, True), (0.03, False)):
            vq = VQ(1, 2, codebook=partial(codebook, decay=0.0, revive=share))
            vq.codebook.load_codes(torch.tensor([[0.0], [1.1]]))
            vq(x.repeat(repeats, 1))
            vq.codebook.refresh()
            # one vector in a hundred is a fiftieth of the fair half
            assert (vq.codebook.count[1] == repeats).item() is stays


@pytest.mark.parametrize("codebook", [EMA, REVIVED], ids=["ema", "gradient"])
def test_complaint_10_a_revived_code_stays_where_it_was_put(codebook: Any) -> None:
    """The line after the revival undoes it (encodec#61, audiocraft#374)."""
    vq = VQ(4, 20, codebook=codebook)
    far = torch.full((20, 4), -50.0)
    far[0] = 5.0
    vq.codebook.load_codes(far, F.one_hot(torch.tensor(0), 20).float())
    x = far_data()[0]
    for _ in range(4):
        vq(x)
        codes = vq.codebook.codes()
    assert torch.cdist(codes, x).min(1).values.max() < 1.5
    if codebook is EMA:
        book: Any = vq.codebook
        before = codes.clone()
        # count and total say the same, so that one more derivation changes nothing much
        book.refresh()
        assert (book.weight - before).norm(dim=1).max() < 1.5


@pytest.mark.parametrize("shared", [False, True])
def test_complaint_11_initialized_codes_stay_in_use(shared: bool) -> None:
    """After k-means only few codes are used (lucidrains/vector-quantize-pytorch#66)."""
    residual = ResidualQuantizer(VQ(4, 50, codebook=EMACodebook), 2, shared=shared)
    x = torch.cat(far_data(4))
    initialize(residual, x)

    def found() -> tuple[float, float]:
        z, indices, _ = residual.eval()(x)
        residual.train()
        # of a shared codebook, each step has a part of the codes
        each = [indices] if shared else indices.unbind(-1)
        return min(len(i.unique()) for i in each) / 50, F.mse_loss(z, x).item()

    used, error = found()
    assert used > 0.97
    for part in x.split(600):
        residual(part)
    used_later, error_later = found()
    assert used_later > used - 0.05
    assert error_later < 1.05 * error


def test_complaint_12_a_shared_codebook_evaluates_as_it_trains() -> None:
    """Fine in training, noise in eval mode (lucidrains/vector-quantize-pytorch#162)."""
    kept = partial(EMACodebook, decay=0.8, revive=0.0)
    residual = ResidualQuantizer(VQ(4, 50, codebook=kept), 3, shared=True)
    book: Any = residual.steps[0].codebook
    x = far_data()[0]
    residual(x)
    # one update a forward, of what all three steps saw
    torch.testing.assert_close(book.count.sum(), torch.tensor(0.2 * 3 * len(x)))
    residual(x)
    torch.testing.assert_close(book.count.sum(), torch.tensor(0.36 * 3 * len(x)))
    for _ in range(20):
        trained = F.mse_loss(residual(x).z, x)
    residual.eval()
    assert F.mse_loss(residual(x).z, x) < 1.05 * trained


def test_complaint_13_the_rotation_trick_is_a_choice_with_bounds() -> None:
    """Rotation with drawn codes diverges (lucidrains/vector-quantize-pytorch#223, #167)."""
    assert VQ(4, 9).estimator is straight_through
    with pytest.raises(ValueError, match="diverges; take straight_through, or sampling=None"):
        VQ(4, 9, estimator=rotation_trick, sampling=CodeSampling(1.0))
    u, z = torch.randn(500, 4, requires_grad=True), torch.randn(500, 4)
    upstream = torch.randn(500, 4)
    out = rotation_trick(u, z)
    assert torch.equal(out, z)
    (gradient,) = torch.autograd.grad(out, u, upstream)
    # turned and scaled once: normalizing twice would show here
    ratio = z.norm(dim=1) / u.detach().norm(dim=1)
    torch.testing.assert_close(
        gradient.norm(dim=1), upstream.norm(dim=1) * ratio, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("name", LEAVES)
def test_complaint_14_gradients_are_finite_on_a_code(name: str) -> None:
    """The root of a distance of zero makes NaN (lucidrains/vector-quantize-pytorch#106)."""
    quantizer = LEAVES[name]()
    with torch.no_grad():
        codes = quantizer.decode(torch.arange(quantizer.codebook_size))
    x = torch.cat([codes, torch.zeros(2, 4)]).requires_grad_()
    z, _, losses = quantizer(x)
    (z.square().sum() + losses.total(regularizer=1.0)).backward()
    for tensor in (x, *quantizer.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    zeros = torch.zeros(3, 4, requires_grad=True)
    assert torch.autograd.grad(orthogonality(zeros), zeros)[0].isfinite().all()


@pytest.mark.parametrize("rule", ["gradient", "average", "frozen gradient", "frozen average"])
def test_complaint_15_each_rule_moves_what_it_should(rule: str) -> None:
    """Nobody can tell how the codebook learns (lucidrains/vector-quantize-pytorch#97, #84)."""
    codebook = GradientCodebook if "gradient" in rule else EMA
    encoder, vq = nn.Linear(4, 4), VQ(4, 9, codebook=codebook)
    if "frozen" in rule:
        vq.codebook.freeze()
    optimizer = torch.optim.SGD([*encoder.parameters(), *vq.parameters()], lr=1.0)
    moved = {}
    for term in ("commitment", "codebook"):
        codes, weight = vq.codebook.codes().clone(), encoder.weight.clone()
        optimizer.zero_grad()
        loss = getattr(vq(encoder(torch.randn(50, 4))).losses, term)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            # averages become codes as the next learning forward starts
            vq.codebook.refresh()
        moved[term] = (
            not torch.equal(vq.codebook.codes(), codes),
            not torch.equal(encoder.weight, weight),
        )
    by_average, by_gradient = rule == "average", rule == "gradient"
    assert moved == {
        "commitment": (by_average, True),
        "codebook": (by_average or by_gradient, False),
    }


@pytest.mark.parametrize("codebook", [EMA, REVIVED], ids=["ema", "gradient"])
def test_complaint_16_all_or_single_codes_are_frozen(codebook: Any) -> None:
    """How to freeze a codebook, or some codes (lucidrains/vector-quantize-pytorch#42, #68)."""
    vq = VQ(4, 30, codebook=codebook)
    initialize(vq, far_data()[0])
    optimizer = torch.optim.AdamW([*vq.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)

    def moved() -> Tensor:
        before = vq.codebook.codes().detach().clone()
        for x in far_data(4):
            optimizer.zero_grad()
            step(vq, x + 1)
            optimizer.step()
        return (vq.codebook.codes() != before).any(1)

    assert moved().all()
    vq.codebook.freeze(torch.tensor([3, 7]))
    some = moved()
    assert some.sum() == 28
    assert not some[[3, 7]].any()
    vq.codebook.freeze()
    assert not moved().any()
    vq.codebook.unfreeze()
    assert moved().all()


@pytest.mark.parametrize("depth", [1, 8])
def test_complaint_17_three_scalars_whatever_the_depth(depth: int) -> None:
    """Eight losses: a sum or a mean? (lucidrains/vector-quantize-pytorch#18, #184)."""
    residual = ResidualQuantizer(VQ(4, 9), depth)
    x = torch.randn(40, 4)
    _, indices, losses = residual(x)
    assert losses._fields == ("commitment", "codebook", "regularizer")
    assert all(loss.shape == () for loss in losses)
    want = torch.stack([F.mse_loss(x, total) for total in residual.partials(indices)]).mean()
    torch.testing.assert_close(losses.commitment, want)
    torch.testing.assert_close(losses.codebook, want)
    torch.testing.assert_close(losses.total(commitment=0.25), 1.25 * want)


@pytest.mark.parametrize("leaf", [LFQ, BSQ])
def test_complaint_18_the_entropy_penalty_reads_and_works(leaf: Any) -> None:
    """The loss is negative, utilization falls (lucidrains/vector-quantize-pytorch#92, #199)."""
    quantizer = leaf(4)
    # all in one corner
    x = nn.Parameter(0.3 + 0.05 * torch.randn(64, 4))
    optimizer = torch.optim.Adam([x], lr=0.05)
    assert len(quantizer(x).indices.unique()) == 1
    for _ in range(150):
        loss = quantizer(x).losses.total(commitment=0.0, codebook=0.0, regularizer=1.0)
        assert loss >= 0
        entropy = quantizer.entropy(quantizer.bound(x))
        torch.testing.assert_close(loss, entropy.per_token - entropy.batch + 4 * math.log(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(quantizer(x).indices.unique()) >= 12
    shown = entropy_in_bits(quantizer.entropy(quantizer.bound(x)))
    assert 3.5 < shown["batch_bits"] <= 4
    assert shown["batch_share"] == pytest.approx(shown["batch_bits"] / 4)
    assert 0 <= shown["per_token_share"] <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_complaint_19_entropies_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    """The entropy is NaN in float16 (lucidrains/vector-quantize-pytorch#85)."""
    leaves = [LFQ(4, temperature=0.01), BSQ(4, temperature=0.01), IBQ(4, 9)]
    leaves.append(VQ(4, 9, entropy_temperature=0.01))
    x = torch.randn(60, 4) * torch.logspace(-4, 4, 60)[:, None]
    for quantizer in leaves:
        half = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            losses = quantizer(half).losses
        losses.regularizer.backward()
        exact = quantizer(half.detach().double()).losses.regularizer
        torch.testing.assert_close(
            losses.regularizer.double(), exact.double(), rtol=1e-4, atol=1e-4
        )
        assert half.grad is not None
        assert half.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [lambda: LFQ(16), lambda: VQ(16, 2**13, entropy_temperature=1.0), lambda: IBQ(16, 2**13)],
    ids=["signs", "codes", "index backpropagation"],
)
def test_complaint_20_entropies_take_little_memory(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 GB in one call of a quantizer (meshgpt-pytorch#36): 2048 tokens, 2^13 or 2^16 codes."""
    monkeypatch.setenv("XQ_LOOKUP", "chunked")
    quantizer, x = make(), torch.randn(2048, 16, requires_grad=True)
    # one float32 a token and code would take 64 or 512 MiB
    assert peak_bytes(lambda: step(quantizer, x)) < 24 * MIB
    assert quantizer(x).losses.regularizer > 0


def test_complaint_21_beta_weighs_the_commitment() -> None:
    """Beta stands at the wrong term (taming-transformers#57, SEED-Voken#60)."""
    vq = VQ(4, 1)
    x = torch.randn(6, 4, requires_grad=True)
    vq(x).losses.total(commitment=0.25).backward()
    away = 2 * (x.detach() - vq.codebook.weight.detach()) / x.numel()
    torch.testing.assert_close(x.grad, 0.25 * away)
    torch.testing.assert_close(vq.codebook.weight.grad, -away.sum(0, keepdim=True))


def test_complaint_22_losses_of_what_is_compared() -> None:
    """Losses of vectors that were not normalized, which the paper says (DAC#114): both exist."""
    x, codes = 3 * torch.randn(30, 4), 2 * torch.randn(9, 4)
    unit, angle = VQ(4, 9, normalize=True), VQ(4, 9, metric="cosine")
    for vq in (unit, angle):
        vq.codebook.load_codes(codes)
    nearest = (F.normalize(x, dim=1) @ F.normalize(codes, dim=1).t()).argmax(1)
    for vq in (unit, angle):
        assert torch.equal(vq.encode(x), nearest)
    chosen = codes[nearest]
    want = F.mse_loss(F.normalize(x, dim=1), F.normalize(chosen, dim=1))
    torch.testing.assert_close(unit(x).losses.commitment, want)
    torch.testing.assert_close(angle(x).losses.commitment, F.mse_loss(x, chosen))


def trained(model: Any, optimizer: Any, batches: list[Tensor]) -> None:
    for x in batches:
        z, _, losses = model(x)
        optimizer.zero_grad()
        (F.mse_loss(z, x) + losses.total()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", LEAVES)
def test_complaint_24_training_resumes_bit_for_bit(name: str) -> None:
    """A checkpoint lacks what training needs to go on (LlamaGen#15)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nest(LEAVES[name]()))
    twin = copy.deepcopy(model)
    optimizer, second = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin))
    batches = [torch.randn(50, 8) for _ in range(6)]
    trained(model, optimizer, batches[:3])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], file)
    trained(model, optimizer, batches[3:])
    file.seek(0)
    weights, moments, chance = torch.load(file, weights_only=True)
    twin.load_state_dict(weights)
    second.load_state_dict(moments)
    torch.set_rng_state(chance)
    trained(twin, second, batches[3:])
    for key, tensor in state(model).items():
        assert torch.equal(twin.state_dict()[key], tensor), key


def test_complaint_24_counts_of_usage_are_saved() -> None:
    """A running figure that is a plain number is lost (the LeCAM average of SEED-Voken, XQ-GAN)."""
    usage = CodebookUsage.of(ProductQuantizer(VQ(2, 9), P=2))
    usage.update(torch.randint(9, (40, 2)))
    other = CodebookUsage(9, (2,))
    other.load_state_dict(usage.state_dict())
    for mine, theirs in zip(usage.compute(), other.compute(), strict=True):
        assert torch.equal(mine, theirs)

"""VQ and its codebooks, against the formulas written out."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    GradientCodebook,
    ProductQuantizer,
    Projected,
    Quantizer,
    ResidualQuantizer,
    accumulating,
)

# codes that move to the data have tests of their own
EMA = partial(EMACodebook, decay=0.9, revive=0.0)


def learners() -> dict[str, Quantizer]:
    product = ResidualQuantizer(VQ(2, 8, codebook=EMA), 2)
    return {
        "vq": VQ(4, 8, codebook=EMA),
        "shared residual": ResidualQuantizer(VQ(4, 8, codebook=EMA), 3, shared=True),
        "product of residuals": ProductQuantizer(product, P=2),
        "pyramid": ResidualQuantizer(VQ(4, 8, codebook=EMA), multiscale=(1, 2)),
        "binary pyramids": ProductQuantizer(ResidualQuantizer(BSQ(2), multiscale=(1, 2)), P=2),
        "projected": Projected(VQ(3, 8, codebook=EMA), 4),
    }


def batch_for(quantizer: Quantizer) -> torch.Tensor:
    return torch.randn(5, 2, 2, 4) if quantizer.scales else torch.randn(20, 4)


def naive_vq(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Search, losses and straight-through as in the paper, one line each."""
    indices = torch.cdist(x, codes).argmin(-1)
    code = codes[indices]
    commitment, codebook = F.mse_loss(x, code.detach()), F.mse_loss(code, x.detach())
    return x + (code - x).detach(), indices, commitment, codebook


def test_values_and_gradients_equal_the_formulas() -> None:
    vq = VQ(7, 33)
    torch.nn.init.normal_(vq.codebook.weight)
    x = torch.randn(2, 9, 5, 7, requires_grad=True)
    z, indices, losses = vq(x)
    (z.square().sum() + losses.total(commitment=0.3, codebook=0.7)).backward()

    y = x.detach().clone().requires_grad_()
    codes = vq.codebook.weight.detach().clone().requires_grad_()
    want_z, want_indices, commitment, codebook = naive_vq(y, codes)
    (want_z.square().sum() + 0.3 * commitment + 0.7 * codebook).backward()

    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(z, want_z)
    torch.testing.assert_close(losses.commitment, commitment)
    torch.testing.assert_close(losses.codebook, codebook)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(vq.codebook.weight.grad, codes.grad)


def test_normalized_codes_and_inputs_have_unit_length() -> None:
    vq = VQ(5, 12, normalize=True)
    x = torch.randn(40, 5)
    z, indices, losses = vq(x)
    unit, codes = F.normalize(x, dim=-1), F.normalize(vq.codebook.weight, dim=-1)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(40))
    assert torch.equal(indices, (unit @ codes.T).argmax(-1))
    torch.testing.assert_close(losses.commitment, F.mse_loss(unit, codes[indices]))


def test_cosine_metric_returns_the_code_as_stored() -> None:
    vq = VQ(5, 12, metric="cosine")
    x = torch.randn(40, 5)
    z, indices, _ = vq(x)
    best = F.cosine_similarity(x[:, None], vq.codebook.weight[None], dim=-1).argmax(-1)
    assert torch.equal(indices, best)
    assert torch.equal(z, vq.codebook.weight[indices])


def test_ema_equals_the_formulas_and_serves_the_old_codes_until_the_next_forward() -> None:
    vq = VQ(4, 6, codebook=EMA)
    count, total = torch.zeros(6), torch.zeros(6, 4)
    weight = vq.codebook.weight.clone()
    for _ in range(5):
        x = torch.randn(30, 4)
        weight = torch.where(count[:, None] > 0, total / count.clamp(min=1e-8)[:, None], weight)
        z, indices, _ = vq(x)
        assert torch.equal(indices, torch.cdist(x, weight).argmin(-1))
        torch.testing.assert_close(z, weight[indices])
        hits = F.one_hot(indices, 6).float()
        count = 0.9 * count + 0.1 * hits.sum(0)
        total = 0.9 * total + 0.1 * hits.T @ x
        torch.testing.assert_close(vq.codebook.count, count)
        torch.testing.assert_close(vq.codebook.total, total)
        assert torch.equal(vq.decode(indices), z)


def test_codes_that_nobody_chose_stay() -> None:
    vq = VQ(2, 3, codebook=EMA)
    with torch.no_grad():
        vq.codebook.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0]]))
    for _ in range(3):
        vq(torch.rand(20, 2))
    assert torch.equal(vq.codebook.weight[2], torch.tensor([50.0, 50.0]))


def test_a_rarely_chosen_code_survives_long_decay() -> None:
    vq = VQ(1, 2, codebook=partial(EMACodebook, decay=0.5, revive=0.0))
    with torch.no_grad():
        vq.codebook.weight.copy_(torch.tensor([[0.0], [9.0]]))
    vq(torch.tensor([[9.5]]))
    for _ in range(300):
        vq(torch.zeros(1, 1))
    torch.testing.assert_close(vq.codebook.weight[1], torch.tensor([9.5]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_row_does_not_stay_in_the_averages(value: float) -> None:
    good, bad = (VQ(4, 8, codebook=EMA) for _ in range(2))
    bad.load_state_dict(good.state_dict())
    x = torch.randn(40, 4)
    spoiled = torch.cat([x, torch.full((1, 4), value)])
    for _ in range(2):
        good(x), bad(spoiled)
    assert_same_state(good, bad)


def test_an_empty_batch_forgets_nothing() -> None:
    vq = VQ(4, 8, codebook=EMA)
    vq(torch.randn(40, 4))
    before = {name: tensor.clone() for name, tensor in vq.state_dict().items()}
    before["codebook.weight"] = vq.codebook.total / vq.codebook.count[:, None]
    vq(torch.randn(0, 4))
    for name in ("codebook.count", "codebook.total"):
        assert torch.equal(vq.state_dict()[name], before[name])


@pytest.mark.parametrize("name", learners())
def test_weight_count_and_total_resume_bit_for_bit(name: str) -> None:
    quantizer = learners()[name]
    batches = [batch_for(quantizer) for _ in range(6)]
    for batch in batches[:3]:
        quantizer(batch)
    resumed = copy.deepcopy(quantizer)
    for module in resumed.modules():
        if isinstance(module, EMACodebook):
            module.reset_parameters()
    resumed.load_state_dict(quantizer.state_dict())
    for batch in batches[3:]:
        assert torch.equal(quantizer(batch).z, resumed(batch).z)
    assert_same_state(quantizer, resumed)


@pytest.mark.parametrize("name", learners())
def test_checkpointing_learns_once(name: str) -> None:
    plain = learners()[name]
    recomputed = copy.deepcopy(plain)
    for _ in range(3):
        x = batch_for(plain)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        one, two = plain(a), checkpoint(recomputed, b, use_reentrant=False)
        for q in (one, two):
            (q.z.square().sum() + q.losses.total()).backward()
        assert torch.equal(one.z, two.z)
        assert torch.equal(a.grad, b.grad)
        assert_same_state(plain, recomputed)


def test_checkpointing_keeps_the_gradients_of_codes_and_entropies() -> None:
    plain = ProductQuantizer([VQ(4, 16), LFQ(4)])
    recomputed = copy.deepcopy(plain)
    x = torch.randn(20, 8)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, two = plain(a), checkpoint(recomputed, b, use_reentrant=False)
    for q in (one, two):
        (q.z.square().sum() + q.losses.total()).backward()
    assert torch.equal(a.grad, b.grad)
    for p, r in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(p.grad, r.grad)


def test_a_shared_codebook_is_constant_within_a_forward_and_updated_once() -> None:
    shared = ResidualQuantizer(VQ(4, 8, codebook=EMA), 3, shared=True)
    book = shared.steps[0].codebook
    x = torch.randn(20, 4)
    before = book.weight.clone()
    indices = shared(x).indices
    assert torch.equal(book.weight, before)
    # 60 vectors in all, each weighing 1 - decay, and not three decays of 20
    torch.testing.assert_close(book.count.sum(), torch.tensor(6.0))
    hits = torch.bincount(indices.reshape(-1), minlength=8)
    torch.testing.assert_close(book.count, 0.1 * hits)


def test_accumulating_equals_one_large_batch() -> None:
    whole = VQ(4, 8, codebook=EMA)
    parts = copy.deepcopy(whole)
    for _ in range(2):
        x = torch.randn(30, 4)
        whole(x)
        with accumulating(parts):
            parts(x[:7])
            parts(x[7:19])
            assert not torch.equal(parts.codebook.count, whole.codebook.count)
        parts(x[19:])
        torch.testing.assert_close(parts.codebook.count, whole.codebook.count)
        torch.testing.assert_close(parts.codebook.total, whole.codebook.total)


def test_an_unfinished_forward_is_not_learned_from() -> None:
    good, bad = VQ(4, 8, codebook=EMA), VQ(4, 8)
    bad.dequantize = bad.quantize = None  # type: ignore[assignment]
    product = ProductQuantizer([good, bad])
    with pytest.raises(TypeError):
        product(torch.randn(5, 8))
    twin = copy.deepcopy(good)
    twin.codebook.pending_count.zero_()
    twin.codebook.pending_total.zero_()
    x = torch.randn(5, 4)
    good(x), twin(x)
    assert_same_state(good, twin)


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference", "encode", "frozen"])
def test_nothing_is_learned_outside_training(how: str) -> None:
    vq = VQ(4, 8, codebook=EMA)
    vq(torch.randn(20, 4))
    before = [b.clone() for b in vq.buffers()]
    x = torch.randn(20, 4)
    if how == "eval":
        vq.eval()(x)
    elif how == "no_grad":
        with torch.no_grad():
            vq(x)
    elif how == "inference":
        with torch.inference_mode():
            vq(x)
    elif how == "encode":
        vq.encode(x)
    else:
        vq.codebook.eval()
        vq(x)
    assert all(torch.equal(a, b) for a, b in zip(before, vq.buffers(), strict=True))


def test_codes_and_statistics_stay_float32() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), ChannelFirst(VQ(4, 8, codebook=EMA)))
    model.half()
    assert model[0].weight.dtype == torch.float16
    assert floats(model[1]) == {torch.float32}
    assert floats(model.double()[1]) == {torch.float64}
    assert floats(model.float()[1]) == {torch.float32}


def floats(module: torch.nn.Module) -> set[torch.dtype]:
    return {b.dtype for b in module.buffers() if b.is_floating_point()}


def test_gradcheck_of_the_losses() -> None:
    vq = VQ(3, 5, normalize=True).double()
    torch.nn.init.normal_(vq.codebook.weight)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    # the commitment as a function of the input, the codebook loss as one of the codes
    assert torch.autograd.gradcheck(lambda x: vq(x).losses.commitment, x)

    def of_codes(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(vq, {"codebook.weight": weight}, x).losses.codebook

    assert torch.autograd.gradcheck(of_codes, vq.codebook.weight)


def test_learned_codes_start_small_and_copies_start_apart() -> None:
    book = GradientCodebook(50, 3)
    assert book.weight.abs().max() <= 1 / 50
    one, two = ProductQuantizer(VQ(3, 50), P=2).branches
    assert not torch.equal(one.codebook.weight, two.codebook.weight)


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xq.losses import CodebookLoss, EntropyLoss, code_entropy, codebook_loss, entropy_loss
from xq.quantizers import BSQ, LFQ, VQ, sign_entropy


def test_codebook_loss_is_the_equation():
    u, z = torch.randn(2, 3, 5, 4, requires_grad=True).unbind(0)
    found = CodebookLoss(commitment=0.5, codebook=2.0)(u, z)
    error = F.mse_loss(u, z).item()
    assert found.item() == pytest.approx(2.5 * error)
    to_u, to_z = torch.autograd.grad(found, (u, z))
    slope = 2 * (u - z).detach() / u.numel()
    torch.testing.assert_close(to_u, 0.5 * slope)
    torch.testing.assert_close(to_z, -2.0 * slope)


def test_codebook_loss_is_that_of_a_vq():
    vq, x = VQ(4, 16), torch.randn(2, 5, 4, requires_grad=True)
    losses = vq(x).losses
    codes = F.embedding(vq.encode(x), vq.codebook.weight)
    found = CodebookLoss(0.25)(x, codes)
    torch.testing.assert_close(found, losses.total())
    inputs = (x, vq.codebook.weight)
    want = torch.autograd.grad(losses.total(), inputs)
    for one, other in zip(torch.autograd.grad(found, inputs), want, strict=True):
        torch.testing.assert_close(one, other)


def test_only_samples_that_are_kept_count():
    u, z = torch.randn(2, 3, 5, 4)
    keep = torch.tensor([True, False, True])
    torch.testing.assert_close(codebook_loss(u, z, keep), codebook_loss(u[keep], z[keep]))
    assert CodebookLoss()(u, z, torch.zeros(3)) == 0


def test_codebook_loss_has_gradients():
    u, z = torch.randn(2, 3, 4, dtype=torch.float64)
    # the value is one number, its gradients are those of halves of it
    for loss in (CodebookLoss(1.0, 0.0), CodebookLoss(0.0, 1.0)):
        moved = u if loss.commitment else z
        moved.requires_grad_()
        assert torch.autograd.gradcheck(loss, (u, z))
        moved.requires_grad_(False)


def test_bad_input_of_the_codebook_loss():
    u = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"one shape, got .* \(2, 3, 4\) and .* \(2, 3, 1\)"):
        codebook_loss(u, u[..., :1])
    with pytest.raises(ValueError, match=r"codes as floats .*torch\.int64"):
        codebook_loss(u, u.long())
    with pytest.raises(ValueError, match=r"one value a sample, shape \(2,\), got \(2, 3\)"):
        codebook_loss(u, u, torch.ones(2, 3))


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 17), (1, 2)])
def test_entropy_against_numpy(shape):
    logits = np.random.default_rng(0).normal(size=shape) * 3
    p = softmax(logits).reshape(-1, shape[-1])
    per_token = -(p * np.log(p)).sum(-1).mean()
    mean = p.mean(0)
    batch = -(mean * np.log(mean)).sum()
    found = code_entropy(torch.from_numpy(logits))
    assert found.per_token.item() == pytest.approx(per_token, rel=1e-12)
    assert found.batch.item() == pytest.approx(batch, rel=1e-12)
    assert found.maximum == pytest.approx(np.log(shape[-1]))
    loss = EntropyLoss(per_token=0.5, batch=2.0)(torch.from_numpy(logits))
    assert loss.item() == pytest.approx(0.5 * per_token + 2.0 * (np.log(shape[-1]) - batch))


def test_it_is_the_regularizer_of_a_vq():
    vq = VQ(4, 16, entropy_temperature=0.5)
    torch.nn.init.normal_(vq.codebook.weight)
    x = torch.randn(6, 5, 4, requires_grad=True)
    logits = -torch.cdist(x, vq.codebook.weight).square() / 0.5
    found, want = EntropyLoss()(logits), vq(x).losses.regularizer
    torch.testing.assert_close(found, want)
    ours, theirs = (torch.autograd.grad(loss, x)[0] for loss in (found, want))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_it_takes_the_entropy_of_bits_or_of_a_quantizer():
    lfq, x = LFQ(6, group_size=3, temperature=0.7), torch.randn(4, 5, 6, requires_grad=True)
    want = lfq(x).losses.regularizer
    torch.testing.assert_close(EntropyLoss(lfq.entropy)(lfq.bound(x)), want)
    bits = EntropyLoss(partial(sign_entropy, group_size=3))
    torch.testing.assert_close(bits(4 * lfq.scale * lfq.bound(x) / 0.7), want)
    bsq = BSQ(6)
    entropy = bsq.entropy(bsq.bound(x))
    found = EntropyLoss(bsq.entropy, per_token=0.0, batch=3.0)(bsq.bound(x))
    torch.testing.assert_close(found, 3 * (entropy.maximum - entropy.batch))


def test_best_and_worst():
    certain = 200 * torch.eye(8)
    assert entropy_loss(certain).item() == pytest.approx(0, abs=1e-6)
    # certain of the same code
    assert entropy_loss(certain[:1].expand(8, 8)).item() == pytest.approx(np.log(8))
    assert entropy_loss(torch.zeros(8, 8)).item() == pytest.approx(np.log(8))


def test_entropy_has_gradients():
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(EntropyLoss(per_token=0.7, batch=1.3), (logits,))


@pytest.mark.parametrize("extreme", [1e30, 3e38, -1e30])
def test_extreme_logits(extreme):
    logits = torch.randn(6, 5)
    logits[:, 1] = extreme
    logits[3] = extreme * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    logits.requires_grad_()
    found = EntropyLoss()(logits)
    found.backward()
    assert found.isfinite()
    assert logits.grad.isfinite().all()


def test_a_code_that_is_left_out():
    logits = torch.randn(6, 5, requires_grad=True)
    mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0])
    found, few = code_entropy(logits + mask), code_entropy(logits[:, [0, 1, 3, 4]])
    torch.testing.assert_close(found.per_token, few.per_token)
    torch.testing.assert_close(found.batch, few.batch)
    (found.per_token - found.batch).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, 2].any()
    assert logits.grad[:, 0].any()


def test_an_empty_batch():
    logits = torch.zeros(0, 5, requires_grad=True)
    found = EntropyLoss()(logits)
    found.backward()
    assert found == 0
    assert logits.grad.shape == (0, 5)
    assert codebook_loss(logits, logits) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    logits = torch.randn(40, 16).to(dtype)
    z = torch.randn(40, 16).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        entropy, bits = EntropyLoss()(logits), EntropyLoss(sign_entropy)(logits[:, :8])
        fit = CodebookLoss()(logits, z)
    assert entropy.dtype == bits.dtype == fit.dtype == torch.float32
    assert torch.equal(entropy, EntropyLoss()(logits.float()))
    assert torch.equal(bits, EntropyLoss(sign_entropy)(logits[:, :8].float()))
    assert torch.equal(fit, CodebookLoss()(logits.float(), z.float()))


def test_bad_input_of_the_entropy():
    with pytest.raises(ValueError, match=r"floats \(\.\.\., codes\), got torch\.int64"):
        EntropyLoss()(torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"of shape \(\)"):
        EntropyLoss()(torch.tensor(1.0))
    with pytest.raises(ValueError, match="group_size=3 must divide dim=4"):
        EntropyLoss(partial(sign_entropy, group_size=3))(torch.zeros(2, 4))


def test_they_have_no_state():
    loss = torch.nn.ModuleList([CodebookLoss(0.5, 0.0), EntropyLoss(batch=2.0)])
    assert not loss.state_dict()
    assert "commitment=0.5, codebook=0.0" in repr(loss)
    assert "per_token=1.0, batch=2.0" in repr(loss)


@pytest.mark.compile
def test_one_graph():
    losses = [CodebookLoss(), EntropyLoss(), EntropyLoss(sign_entropy)]
    for loss in losses:
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        x = [torch.randn(6, 8, requires_grad=True) for _ in range(1 + (loss is losses[0]))]
        want, found = loss(*x), compiled(*x)
        torch.testing.assert_close(found, want)
        ours, theirs = (torch.autograd.grad(value, x[0])[0] for value in (found, want))
        torch.testing.assert_close(ours, theirs)

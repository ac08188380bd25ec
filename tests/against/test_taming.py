"""GumbelVQ against taming-transformers' GumbelQuantize.

Deliberate differences:
- It draws noise in eval mode too, where ours is deterministic: what it gave there is what ours
  gives in training with `hard=True`.
- Its codes may have fewer channels than its input: here the others are zero.
- It adds 1e-10 within the logarithm of the divergence; ours is exact.
"""

import torch
from golden import assert_values, load

from xq.quantizers import GumbelVQ, gumbel

KL_WEIGHT = 5e-4


def test_drawn_codes(monkeypatch):
    numbers, quantizer = load("taming_gumbel"), GumbelVQ(8, 16, hard=True)
    with torch.no_grad():
        quantizer.scores.weight.copy_(numbers["scores.weight"])
        quantizer.scores.bias.copy_(numbers["scores.bias"])
        quantizer.codebook.weight.zero_()
        quantizer.codebook.weight[:, :4] = numbers["codes"]
    noise = numbers["noise"].movedim(1, -1)
    monkeypatch.setattr(gumbel, "_gumbel", lambda scores, generator: noise)

    x = numbers["input"].movedim(1, -1)
    z, indices, losses = quantizer(x)
    assert torch.equal(indices, numbers["indices"])
    assert_values(z[..., :4].movedim(-1, 1), numbers["z"])
    assert not z[..., 4:].any()
    assert_values(KL_WEIGHT * losses.regularizer, numbers["kl"], atol=1e-7)
    scores = numbers["logits"].movedim(1, -1)
    assert torch.equal(quantizer.eval()(x).indices, scores.argmax(-1))

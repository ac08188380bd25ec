"""`EntropyLoss` against XQ-GAN's entropy of a softmax, which adds 1e-5 within the logarithm."""

import pytest
from golden import EPS, load

from xq.losses import EntropyLoss, code_entropy

CODES = 16


@pytest.mark.parametrize(("name", "temperature"), [("cold", 0.01), ("warm", 1.0)])
def test_entropies(name, temperature):
    numbers = load("xqgan_entropy")
    per_token, batch, difference = numbers[name].tolist()
    logits = numbers["logits"] / temperature
    found = code_entropy(logits)
    assert found.per_token.item() == pytest.approx(per_token, abs=2 * CODES * EPS)
    assert found.batch.item() == pytest.approx(batch, abs=2 * CODES * EPS)
    loss = EntropyLoss()(logits) - found.maximum
    assert loss.item() == pytest.approx(difference, abs=3 * CODES * EPS)

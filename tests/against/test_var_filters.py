"""top-k and top-p against VAR's filter."""

import torch
from golden import below, load

from xq.models.sampling import filtered


def test_probabilities_after_the_filters():
    numbers = load("var_filters")
    cases = below(numbers, "probabilities")
    assert len(cases) == 5
    for name, expected in cases.items():
        top_k, top_p = name.removeprefix("k").split("_p")
        got = filtered(numbers["logits"], top_k=int(top_k) or None, top_p=float(top_p) or None)
        assert torch.equal(got.softmax(-1), expected)

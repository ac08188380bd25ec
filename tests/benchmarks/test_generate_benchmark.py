"""The benchmark of sampling compares generators of one size, and tells images per second."""

import pytest
import torch

pytest.importorskip("matplotlib", reason="the pictures of the bench extra")

from benchmarks import generate
from benchmarks.cases import XQ
from xq.models import AR, VAR


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_have_about_as_many_parameters(device):
    sizes = [
        dict(zip(("depth", "width", "heads"), generate.SIZES[device][kind], strict=True))
        for kind in ("ar", "var")
    ]
    with torch.device("meta"):
        ar = AR(generate.CODES, 16, classes=generate.CLASSES, **sizes[0])
        var = VAR(generate.CHANNELS, generate.CODES, generate.SCALES, **sizes[1])
    assert (ar.num_tokens, var.num_tokens) == (256, 680)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ar, var)]
    assert counts[0] == pytest.approx(counts[1], rel=0.02)


@pytest.mark.parametrize("make", ["ar_case", "var_case"])
def test_all_tokens_matter(make):
    """Else keys and values that are wrong would go unseen."""
    case = getattr(generate, make)((2, 32, 2), 2, "cpu", *([3] if make == "ar_case" else [(1, 2)]))
    tokens = case.contender(XQ).run()
    other = case.contender(generate.RECOMPUTED).run()
    assert torch.equal(tokens, other)
    positions = 45 if make == "ar_case" else 6
    said = case.check({XQ: tokens, generate.RECOMPUTED: other})
    assert tokens[0].numel() == (9 if make == "ar_case" else 5)
    assert said[XQ].endswith(" M weights")
    assert said[generate.RECOMPUTED] == f"{positions} positions"
    with pytest.raises(generate.Red, match="of the tokens differ from those of recomputation"):
        case.check({XQ: tokens, generate.RECOMPUTED: (other + 1) % generate.CODES})
    with pytest.raises(generate.Red, match="tokens that are none, or all alike"):
        case.check({XQ: torch.zeros_like(tokens)})


def test_the_table():
    mine, other = "15.9 M weights", "32896 positions"
    contenders = [
        {"name": XQ, "median": 0.5, "checked": mine, "peak_bytes": 1 << 21},
        {"name": generate.RECOMPUTED, "median": 4.0, "checked": other, "peak_bytes": None},
    ]
    case = {"name": "AR, 256 tokens", "sizes": {"batch": 2}, "contenders": contenders}
    head, rows = generate.table({"cases": [case]})
    assert rows == [["AR", "15.9 M", "256", "2", "4", "0.5", "8.00x", "128x", "2.00 MiB"]]
    assert len(head) == len(rows[0])

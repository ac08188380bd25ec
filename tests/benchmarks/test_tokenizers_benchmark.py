"""The benchmark of presets names presets that exist, and looks at what they give."""

import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="the pictures of the bench extra")

from benchmarks import harness, tokenizers
from benchmarks.cases import XQ, Red
from xq.models import CNNDecoder, CNNEncoder, Tokenizer
from xq.models.presets.__main__ import rows
from xq.models.presets.row import Row
from xq.quantizers import LFQ


def small() -> Tokenizer:
    sizes = {"channels": 8, "multipliers": (1, 2), "z_channels": 8, "patch": 4}
    return Tokenizer(CNNEncoder(6, **sizes), LFQ(6), CNNDecoder(6, **sizes))


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(tokenizers, "rows", lambda: [Row("small", small, 32, None, "")])
    return tokenizers.preset_case("small", 2, "cpu")


def test_all_presets_are_known():
    names = {row.name for row in rows()}
    for quick in (False, True):
        assert {spec.sizes["preset"] for spec in tokenizers.specs("cpu", quick)} <= names


def test_a_round_trip(case):
    found = case.contender(XQ).run()
    assert found.image.shape == (2, 3, 32, 32)
    assert case.check({XQ: found}) == {XQ: "16 tokens"}


def test_the_gate(case):
    found = case.contender(XQ).run()
    for wrong, message in (
        (found._replace(image=found.image[:, :, :16]), "images"),
        (found._replace(indices=found.indices + 64), "outside the codebook"),
        (found._replace(image=found.image * torch.nan), "image is not finite"),
    ):
        with pytest.raises(Red, match=message):
            case.check({XQ: wrong})


def test_the_picture_has_one_scale_for_all():
    measured = [("small", 1.0, 5 << 20), ("large", 4.0, 9 << 20)]
    cases = [
        {"name": name, "contenders": [{"median": seconds, "peak_bytes": size}]}
        for name, seconds, size in measured
    ]
    document = json.loads((harness.RESULTS / "tokenizers.json").read_text()) | {"cases": cases}
    left, right = tokenizers.draw(document).axes
    assert [bar.get_width() for bar in left.patches] == [1.0, 4.0]
    assert [bar.get_width() for bar in right.patches] == [5, 9]

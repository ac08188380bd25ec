import copy

import pytest
import torch

from xq.losses import Composite, composite
from xq.losses.ramp import ramp


def terms() -> dict[str, torch.Tensor]:
    return {
        "reconstruction": torch.tensor(0.5, requires_grad=True),
        "perceptual": torch.tensor(0.25, requires_grad=True),
        "codebook": torch.tensor(2.0, requires_grad=True),
    }


WEIGHTS = {"reconstruction": 1.0, "perceptual": 2, "codebook": 0.1}


def test_the_sum_and_its_terms():
    made = terms()
    total, logged = Composite(**WEIGHTS)(**made)
    assert total.item() == pytest.approx(0.5 + 0.5 + 0.2)
    assert {name: term.item() for name, term in logged.items()} == {
        "reconstruction": 0.5,
        "perceptual": 0.25,
        "codebook": 2.0,
    }
    assert not any(term.requires_grad for term in logged.values())
    total.backward()
    for name, term in made.items():
        assert term.grad.item() == pytest.approx(WEIGHTS[name])


def test_the_function_of_the_same_name():
    a, b = composite(terms(), WEIGHTS), Composite(**WEIGHTS)(**terms())
    assert a.total == b.total
    assert a.terms == b.terms


def test_logs_are_in_the_order_of_the_weights():
    made = dict(reversed(terms().items()))
    assert list(Composite(**WEIGHTS)(**made).terms) == list(WEIGHTS)


def test_gradients():
    loss = Composite(a=0.5, b=-2.0)
    inputs = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: loss(a=x.square().mean(), b=x.sin().sum()).total, (inputs,)
    )


def test_a_weight_of_zero_is_for_the_logs():
    made = terms()
    made["alignment"] = torch.tensor(float("nan"), requires_grad=True)
    total, logged = Composite(**WEIGHTS, alignment=0.0)(**made)
    assert total.item() == pytest.approx(1.2)
    assert logged["alignment"].isnan()
    total.backward()
    assert made["alignment"].grad is None


def test_a_number_stands_for_a_term_that_is_not_computed():
    loss = Composite(reconstruction=1.0, adversarial=0.5)
    for step in range(3):
        share = ramp(step, start=2)
        adversarial = share * torch.tensor(3.0) if share else 0.0
        total, logged = loss(reconstruction=torch.tensor(1.0), adversarial=adversarial)
        assert total.item() == (2.5 if step == 2 else 1.0)
        assert torch.is_tensor(logged["adversarial"])


def test_weights_may_be_set_anew():
    loss = Composite(**WEIGHTS)
    twin = copy.deepcopy(loss)
    loss.weights["codebook"] = 0.0
    assert loss(**terms()).total.item() == pytest.approx(1.0)
    assert twin(**terms()).total.item() == pytest.approx(1.2)
    assert not loss.state_dict()
    assert "perceptual=2" in repr(loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    big, small = torch.tensor(1024.0, dtype=dtype), torch.tensor(2.0**-7, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        total = Composite(big=100.0, small=1.0)(big=big, small=small).total
    assert total.dtype == torch.float32
    assert total.item() == 102400 + 2.0**-7


def test_terms_of_several_precisions():
    mixed = {"a": torch.tensor(1.0, dtype=torch.float64), "b": torch.tensor(2.0)}
    assert Composite(a=1.0, b=1.0)(**mixed).total.dtype == torch.float64


def test_bad_input():
    loss = Composite(**WEIGHTS)
    made = terms()
    del made["perceptual"]
    with pytest.raises(ValueError, match=r"no term for perceptual; pass 0\.0"):
        loss(**made)
    with pytest.raises(ValueError, match=r"no weight for percptual; .*reconstruction, perceptual"):
        loss(**terms(), percptual=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"scalars, got codebook of shape \(2,\); take its mean"):
        loss(**terms() | {"codebook": torch.ones(2)})
    with pytest.raises(ValueError, match="a term that is a tensor, got"):
        loss(reconstruction=0.0, perceptual=0.0, codebook=0.0)


def test_bad_weights():
    with pytest.raises(ValueError, match="needs a weight for each term"):
        Composite()
    with pytest.raises(ValueError, match="finite numbers as weights, got perceptual=nan"):
        Composite(perceptual=float("nan"))
    with pytest.raises(ValueError, match="multiplied into the term"):
        Composite(perceptual=torch.tensor(1.0))


@pytest.mark.compile
def test_one_graph():
    loss = Composite(**WEIGHTS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**terms()).total, loss(**terms()).total)

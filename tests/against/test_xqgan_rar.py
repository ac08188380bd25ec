"""RAR against the original's outputs, with weights from a hash of their names."""

import pytest
import torch
from golden import assert_values, load
from hashed import hashed_parameter

from xq.models import RAR, growing_guidance
from xq.models.checkpoints.rar import FORMAT

SIZES = {"classes": 10, "width": 32, "depth": 2, "heads": 2, "hidden": 64}


@pytest.fixture
def numbers():
    return load("xqgan_rar")


@pytest.fixture
def model():
    theirs = FORMAT.table({}).revert(RAR(64, 4, **SIZES).state_dict())
    state = {key: hashed_parameter(f"rar.{key}", tuple(t.shape)) for key, t in theirs.items()}
    read = FORMAT.read(state)
    assert read.config() == RAR(64, 4, **SIZES).config()
    return read


@torch.no_grad()
def test_logits_and_loss_in_any_order(model, numbers):
    ids, order = numbers["ids"], numbers["orders"]
    logits = model(ids, numbers["classes"], order)
    # theirs has one more, after the last token
    assert_values(logits, numbers["logits"][:, :-1], atol=1e-5)
    assert torch.equal(ids.take_along_dim(order, 1), numbers["labels"])
    assert_values(model.loss(logits, ids, order), numbers["loss"], atol=1e-5)
    assert logits.std() > 0.5
    # orders of a batch are its own
    alone = model(ids[1:2], numbers["classes"][1:2], order[1:2])
    assert_values(alone, logits[1:2], atol=1e-5)


@torch.no_grad()
def test_logits_of_leading_tokens(model, numbers):
    # the sixth token is read by nothing
    logits = model(numbers["ids"][:, :6], numbers["classes"])
    assert_values(logits, numbers["prefix_logits"], atol=1e-5)


def test_greedy_sampling(model, numbers):
    made = model.generate(numbers["classes"], guidance=4.0, power=2.75, top_k=1)
    assert torch.equal(made.flatten(1), numbers["greedy"])
    cold = model.generate(numbers["classes"], guidance=4.0, power=2.75, temperature=1e-4)
    assert torch.equal(cold, made)
    # so that guidance is a part of what is compared
    assert not torch.equal(model.generate(numbers["classes"], top_k=1), made)


def test_growing_guidance(numbers):
    weights = torch.tensor(growing_guidance(6.0, 1.15, 256))
    assert_values(weights, numbers["guidance"], atol=1e-5)
    assert weights[0] == 1
    assert weights.max() > 5.99

"""VAR on two branches against the generator of XQ-GAN: logits, loss and what it generates."""

import pytest
import torch
from golden import Numbers, assert_values, below, load, load_state
from hashed import hashed_parameter
from key_lists import shapes

from xq.models import VAR, teacher_forcing
from xq.models.checkpoints.var_generator import FORMAT
from xq.quantizers import VQ, ProductQuantizer, Pyramid, Refine, ResidualQuantizer

NUMBERS = load("xqgan_var_generator")


@pytest.fixture(scope="module")
def tokens() -> Numbers:
    return load("xqgan_var_product")


@pytest.fixture(scope="module")
def quantizer(tokens: Numbers) -> ProductQuantizer:
    grid = Pyramid((1, 2, 3, 4), [Refine(8) for _ in range(4)])
    pyramid = ResidualQuantizer(VQ(8, 64, metric="cosine"), multiscale=grid, shared=True)
    quantizer = ProductQuantizer(pyramid, P=2)
    load_state(quantizer, tokens)
    return quantizer


@pytest.fixture(scope="module")
def model(quantizer: ProductQuantizer) -> VAR:
    model = VAR.of(quantizer, classes=10, depth=2, width=32, heads=2)
    theirs = shapes(FORMAT.table({}).revert(model.state_dict()))
    state = {name: hashed_parameter(f"var.{name}", shape) for name, shape in theirs.items()}
    return FORMAT.read(state, into=model)


def test_logits_and_loss(quantizer, model, tokens):
    # the last image is of no class, which there is one more id
    labels = NUMBERS["labels"].masked_fill(NUMBERS["labels"] == 10, -1)
    assert (labels == -1).any()
    inputs = teacher_forcing(quantizer, tokens["indices"])
    logits = model(inputs, labels)
    assert_values(logits, NUMBERS["logits"])
    assert_values(model.loss(logits, tokens["indices"]), NUMBERS["loss"], atol=1e-6)


@pytest.mark.parametrize(("cfg", "name"), [(0.0, "greedy"), (1.5, "greedy_guided")])
def test_greedy_tokens(quantizer, model, cfg, name):
    labels = NUMBERS["generated_labels"]
    tokens = model.generate(quantizer, labels, guidance=1 + cfg, top_k=1)
    assert torch.equal(tokens, NUMBERS[name])


def test_guidance_changes_what_is_generated():
    assert not torch.equal(NUMBERS["greedy"], NUMBERS["greedy_guided"])


def test_weights_at_the_start(quantizer):
    spreads = below(load("xqgan_var_start"), "spread")
    # several, so that their spread is known well
    sizes = {"classes": 10, "depth": 2, "width": 32, "heads": 2}
    models = [VAR.of(quantizer, **sizes) for _ in range(8)]
    theirs = [FORMAT.table({}).revert(model.state_dict()) for model in models]
    assert spreads.keys() == theirs[0].keys()
    for name, spread in spreads.items():
        ours = torch.stack([state[name] for state in theirs])
        # four standard errors of what they measured on one model
        error = 4 / (2 * theirs[0][name].numel()) ** 0.5
        assert abs(ours.std() - spread) <= error * spread, name

"""LlamaGen's generators: the names of its code at full size, and what a small one computes.

No released file was at hand; names and shapes are those that its `autoregressive/models/gpt.py`
makes.
"""

import itertools

import pytest
import torch
from key_lists import shapes
from naive_llama import logits as naive_logits

from xq.models import AR, ar_b, ar_l, ar_xl, ar_xxl
from xq.models.checkpoints import inspect_checkpoint, load_checkpoint
from xq.models.checkpoints.llamagen_generator import FORMAT

WIDTH, HEADS, HIDDEN, CODES, CLASSES = 16, 2, 256, 10, 4
TEXT = (120, 2048)


def their_shapes(width, depth, hidden, *, codes=16384, classes=1000, text=None):
    """By the constructor of LlamaGen's transformer."""
    found = {
        "tok_embeddings.weight": [codes, width],
        "norm.weight": [width],
        "output.weight": [codes, width],
    }
    if text is None:
        found["cls_embedding.embedding_table.weight"] = [classes + 1, width]
    else:
        found["cls_embedding.uncond_embedding"] = list(text)
        found["cls_embedding.cap_proj.fc1.weight"] = [width, text[1]]
        found["cls_embedding.cap_proj.fc2.weight"] = [width, width]
    for i in range(depth):
        found |= {
            f"layers.{i}.attention.wqkv.weight": [3 * width, width],
            f"layers.{i}.attention.wo.weight": [width, width],
            f"layers.{i}.feed_forward.w1.weight": [hidden, width],
            f"layers.{i}.feed_forward.w3.weight": [hidden, width],
            f"layers.{i}.feed_forward.w2.weight": [width, hidden],
            f"layers.{i}.attention_norm.weight": [width],
            f"layers.{i}.ffn_norm.weight": [width],
        }
    return found


def small(**options):
    named = their_shapes(WIDTH, 2, HIDDEN, codes=CODES, classes=CLASSES, **options)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in named.items()}


def into(**options):
    condition = options or {"classes": CLASSES}
    return AR(CODES, (2, 3), width=WIDTH, depth=2, heads=HEADS, **condition)


@pytest.mark.parametrize(
    ("make", "sizes", "text"),
    [
        (ar_b, (768, 12, 2048), None),
        (ar_l, (1024, 24, 2816), None),
        (ar_xl, (1280, 36, 3584), None),
        (ar_xxl, (1536, 48, 4096), None),
        (ar_xl, (1280, 36, 3584), TEXT),
    ],
    ids=["B", "L", "XL", "XXL", "XL-text"],
)
def test_published_size_there_and_back(make, sizes, text):
    state = {
        key: torch.empty(shape, device="meta")
        for key, shape in their_shapes(*sizes, text=text).items()
    }
    assert FORMAT.recognise(state)
    model = FORMAT.read(state)
    with torch.device("meta"):
        assert model.config() == make(text=text).config()
    assert shapes(FORMAT.table(state).revert(model.state_dict())) == shapes(state)


def test_the_head_count_of_a_width():
    """3B has 32 heads of 100 channels."""
    named = their_shapes(3200, 1, 8704)
    model = FORMAT.read({k: torch.empty(shape, device="meta") for k, shape in named.items()})
    assert (model.heads, model.width, model.token_shape) == (32, 3200, (16, 16))


@torch.no_grad()
def test_logits_are_theirs():
    state = small()
    model = FORMAT.read(state, into()).double()
    exact = {key: tensor.double() for key, tensor in state.items()}
    tokens, labels = torch.randint(CODES, (3, 6)), torch.tensor([0, 3, -1])
    # "none" is the class after the last one
    prefix = exact["cls_embedding.embedding_table.weight"][labels % (CLASSES + 1)][:, None]
    x = torch.cat([prefix, exact["tok_embeddings.weight"][tokens[:, :-1]]], dim=1)
    places = [None, *itertools.product(range(2), range(3))][:-1]
    theirs = naive_logits(x, exact, 2, HEADS, places)
    torch.testing.assert_close(model(tokens, labels), theirs, atol=1e-10, rtol=1e-10)
    assert theirs.std() > 0.1


@pytest.mark.parametrize("text", [None, (5, 6)])
def test_there_and_back(text):
    state = small(text=text)
    model = FORMAT.read(state, into(**{"text": text} if text else {}))
    back = FORMAT.table(state).revert(model.state_dict())
    assert back.keys() == state.keys()
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key]), key


def test_from_a_file(tmp_path):
    state = small()
    torch.save({"model": state, "steps": 3}, tmp_path / "c2i_B_256.pt")
    assert inspect_checkpoint(tmp_path / "c2i_B_256.pt").format == "llamagen_generator"
    model = load_checkpoint(tmp_path / "c2i_B_256.pt", into=into())
    labels = torch.tensor([1, 2])
    assert torch.equal(
        model.generate(labels, top_k=1), FORMAT.read(state, into()).generate(labels, top_k=1)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tok_embeddings.weight": [10, 24]},
            r"widths 768, 1024, .* 4096, got 24, .*pass it as in",
        ),
        ({"tok_embeddings.weight": None}, r"there is no tensor 'tok_embeddings.weight'"),
    ],
    ids=["width", "missing"],
)
def test_other_files_are_refused(change, message):
    state = small()
    for key, shape in change.items():
        state.pop(key)
        if shape is not None:
            state[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        FORMAT.read(state)


def test_other_names_are_refused():
    state = small() | {"layers.0.attention.wk.weight": torch.zeros(16, 16)}
    state.pop("norm.weight")
    with pytest.raises(ValueError, match=r"no place for 1 .*wk.weight.* lacks 1 \(norm.weight"):
        FORMAT.read(state, into())


def test_recognises_its_own():
    state = small()
    for key in ("tok_embeddings.weight", "output.weight", "layers.0.attention.wqkv.weight"):
        assert not FORMAT.recognise({k: t for k, t in state.items() if k != key})

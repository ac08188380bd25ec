"""RAR's released files: their names at full size. Their numbers are in tests/against."""

import pytest
import torch
from key_lists import listed, shapes

from xq.models import RAR, rar_b, rar_l
from xq.models.checkpoints import load_checkpoint
from xq.models.checkpoints.rar import FORMAT


@pytest.fixture
def state():
    model = RAR(9, 3, classes=4, width=16, depth=2, heads=4, hidden=24)
    state = FORMAT.table({}).revert(model.state_dict())
    return {key: torch.randn(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "make", "count"), [("RAR-B", rar_b, 265_645_312), ("RAR-L", rar_l, 467_962_880)]
)
def test_released_file_there_and_back(name, make, count):
    state = listed("rar")[name]
    assert FORMAT.recognise(state)
    model = FORMAT.read(state)
    with torch.device("meta"):
        assert model.config() == make(4096).config()
    assert sum(tensor.numel() for tensor in state.values()) == count
    assert sum(p.numel() for p in model.parameters()) == count
    assert shapes(FORMAT.table(state).revert(model.state_dict())) == shapes(state)


def test_there_and_back(state):
    model = FORMAT.read(state)
    assert not model.training
    assert (model.codebook_size, model.token_shape, model.classes) == (9, (3, 3), 4)
    assert (model.width, model.depth, model.heads, model.hidden) == (16, 2, 4, 24)
    back = FORMAT.table(state).revert(model.state_dict())
    assert back.keys() == state.keys()
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key]), key


def test_from_a_file(state, tmp_path):
    torch.save(state, tmp_path / "rar-b.bin")
    model = load_checkpoint(tmp_path / "rar-b.bin")
    labels = torch.tensor([3, 0])
    made = model.generate(labels, guidance=3.0, top_k=1)
    assert made.shape == (2, 3, 3)
    assert torch.equal(FORMAT.read(state).generate(labels, guidance=3.0, top_k=1), made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": [1, 1024 + 8, 16]}, r"RAR generator has 8 tokens, which are no square"),
        ({"blocks.0.attn.qkv.bias": None}, r"lacks 1 \(blocks.0.qkv.bias"),
        ({"embeddings.weight": None}, r"there is no tensor 'embeddings.weight'"),
        ({"blocks.1.attn.gate": [16]}, r"no place for 1 tensors \(blocks.1.attn.gate\)"),
        ({"lm_head.bias": [8]}, r"head.bias of shape \(8,\), the module asks for \(9,\)"),
    ],
    ids=["oblong", "missing", "size-missing", "unknown", "shape"],
)
def test_other_files_are_refused(state, change, message):
    for key, shape in change.items():
        state.pop(key, None)
        if shape is not None:
            state[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        FORMAT.read(state)


def test_recognises_its_own(state):
    for key in ("target_aware_pos_embed", "timesteps_embeddings", "lm_head.weight"):
        assert not FORMAT.recognise({k: t for k, t in state.items() if k != key})

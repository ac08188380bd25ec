"""State dicts of vector-quantize-pytorch against the library itself, where it is installed."""

import pytest
import torch
from torch import nn

from xq.models.checkpoints import formats, load_checkpoint
from xq.models.checkpoints.load import _recognised
from xq.quantizers import (
    FSQ,
    LFQ,
    VQ,
    EMACodebook,
    GradientCodebook,
    ProductQuantizer,
    Projected,
    ResidualQuantizer,
    SimCodebook,
)

vqp = pytest.importorskip("vector_quantize_pytorch")


def read(module: nn.Module, into: nn.Module | None = None) -> nn.Module:
    state = module.state_dict()
    return (formats()["vector_quantize_pytorch_fsq"] if into else _recognised(state)).read(
        state, into
    )


def trained(module: nn.Module, dim: int, steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    module.train()
    for _ in range(steps):
        module(torch.randn(2, 60, dim))
    return module.eval()


@torch.no_grad()
def compare(theirs: nn.Module, ours: nn.Module, dim: int, flip: int = 0) -> None:
    x = torch.randn(2, 33, dim)
    z, indices = theirs(x)[:2]
    found = ours.encode(x)
    if flip:
        bits = [(found >> k & 1) << flip - 1 - k for k in range(flip)]
        found = torch.stack(bits).sum(0)
    assert torch.equal(found, indices.long())
    torch.testing.assert_close(ours(x).z, z, atol=1e-6, rtol=1e-5)


def table_of(module: nn.Module):
    state = module.state_dict()
    return _recognised(state).table(state)


def assert_way_back(theirs: nn.Module, ours: nn.Module, dropped: set[str]) -> None:
    state, back = theirs.state_dict(), table_of(theirs).revert(ours.state_dict())
    assert back.keys() == state.keys() - dropped
    for key, tensor in back.items():
        assert tensor.dtype == state[key].dtype
        assert torch.equal(tensor, state[key])


VQS = {
    "plain": (lambda: vqp.VectorQuantize(8, 16), VQ),
    "cosine": (lambda: vqp.VectorQuantize(8, 16, use_cosine_sim=True), VQ),
    "projected": (lambda: vqp.VectorQuantize(8, 16, codebook_dim=4), Projected),
    "cosine, projected": (
        lambda: vqp.VectorQuantize(8, 16, codebook_dim=4, use_cosine_sim=True),
        Projected,
    ),
    "heads apart": (
        lambda: vqp.VectorQuantize(8, 16, heads=2, separate_codebook_per_head=True),
        Projected,
    ),
    "heads apart, unprojected": (
        lambda: vqp.VectorQuantize(8, 16, codebook_dim=4, heads=2, separate_codebook_per_head=True),
        ProductQuantizer,
    ),
    "heads that share": (lambda: vqp.VectorQuantize(8, 16, codebook_dim=3, heads=2), Projected),
    "k-means": (lambda: vqp.VectorQuantize(8, 16, kmeans_init=True), VQ),
}


@pytest.mark.parametrize("name", VQS)
def test_vq(name):
    make, kind = VQS[name]
    theirs = trained(make(), 8)
    ours = read(theirs)
    assert type(ours) is kind
    (book,) = {type(m) for m in ours.modules() if "Codebook" in type(m).__name__}
    assert book is EMACodebook
    compare(theirs, ours, 8)
    assert_way_back(theirs, ours, set())


@pytest.mark.parametrize("name", ["plain", "projected", "heads apart", "heads that share"])
def test_averages_go_on_as_theirs_do(name):
    theirs = trained(VQS[name][0](), 8)
    ours = read(theirs)
    state = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    for _ in range(3):
        x = torch.randn(4, 60, 8)
        theirs.train()(x)
        ours.train()(x)
    expected = table_of(theirs).convert(theirs.state_dict())
    for path, book in ours.named_modules():
        if isinstance(book, EMACodebook):
            book.refresh()
            path = f"{path}." if path else ""
            for part in ("weight", "count", "total"):
                now = expected[f"{path}{part}"]
                assert not torch.equal(now, state[f"{path}{part}"])
                torch.testing.assert_close(getattr(book, part), now, atol=1e-5, rtol=1e-5)


def test_learned_codes_are_told_from_averages():
    options = {"learnable_codebook": True, "ema_update": False}
    theirs = vqp.VectorQuantize(8, 16, **options)
    optimizer = torch.optim.SGD(theirs.parameters(), 1.0)
    theirs.train()(torch.randn(2, 60, 8))[2].sum().backward()
    optimizer.step()
    theirs.eval()
    ours = read(theirs)
    assert isinstance(ours.codebook, GradientCodebook)
    compare(theirs, ours, 8)
    statistics = {"initted", "cluster_size", "embed_avg"}
    assert_way_back(theirs, ours, {f"_codebook.{name}" for name in statistics})


def test_codes_that_were_never_placed():
    with pytest.raises(ValueError, match="had not yet placed the codes by k-means"):
        read(vqp.VectorQuantize(8, 16, kmeans_init=True))


def test_older_form_of_the_flag():
    theirs = trained(vqp.VectorQuantize(8, 16), 8)
    state = theirs.state_dict() | {"_codebook.initted": torch.ones(1)}
    assert _recognised(state).read(state).codebook.step == 1


RESIDUALS = {
    "apart": lambda: vqp.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3),
    "projected": lambda: vqp.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, codebook_dim=4),
    "shared": lambda: vqp.ResidualVQ(
        dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True
    ),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_vq(name):
    theirs = trained(RESIDUALS[name](), 8)
    ours = read(theirs)
    residual = ours.quantizer if isinstance(ours, Projected) else ours
    assert isinstance(residual, ResidualQuantizer)
    assert residual.shared == (name == "shared")
    compare(theirs, ours, 8)
    copies = theirs.state_dict().keys() if name == "shared" else ()
    assert_way_back(theirs, ours, {key for key in copies if not key.startswith("layers.0.")})


def test_residual_on_the_sphere_is_refused():
    theirs = vqp.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, use_cosine_sim=True)
    with pytest.raises(ValueError, match="normalizes what is left after each step"):
        read(trained(theirs, 8))


def test_parts_without_a_place_are_refused():
    theirs = vqp.VectorQuantize(8, 16, codebook_dim=4, layernorm_after_project_in=True)
    with pytest.raises(ValueError, match="no place for 4 tensors"):
        read(theirs)


LFQS = {
    "plain": (lambda: vqp.LFQ(dim=6), 6, LFQ),
    "projected": (lambda: vqp.LFQ(dim=16, codebook_size=256), 0, Projected),
    "two codebooks": (
        lambda: vqp.LFQ(dim=16, codebook_size=16, num_codebooks=2),
        0,
        Projected,
    ),
}


@pytest.mark.parametrize("name", LFQS)
def test_lfq(name):
    make, flip, kind = LFQS[name]
    theirs = make().eval()
    ours = read(theirs)
    assert type(ours) is kind
    compare(theirs, ours, 6 if flip else 16, flip)
    if kind is Projected:
        assert_way_back(theirs, ours, {"mask"})


def test_rotated_lfq_is_refused():
    state = {"mask": torch.arange(8), "orthogonal_rot": torch.eye(8)}
    with pytest.raises(ValueError, match=r"nearest is .*unknown to it are 1 \(orthogonal_rot\)"):
        _recognised(state)


@pytest.mark.parametrize("steps", [1, 3])
def test_simvq(steps):
    torch.manual_seed(0)
    options = {"dim": 8, "codebook_size": 16}
    theirs = (
        vqp.SimVQ(**options) if steps == 1 else vqp.ResidualSimVQ(**options, num_quantizers=steps)
    ).eval()
    ours = read(theirs)
    assert sum(isinstance(m, SimCodebook) for m in ours.modules()) == steps
    compare(theirs, ours, 8)
    assert_way_back(theirs, ours, set())


def test_fsq_needs_its_levels():
    theirs = vqp.FSQ([8, 5, 5, 5], dim=16).eval()
    with pytest.raises(ValueError, match=r"does not save its levels; .* 16\), which are 4 here"):
        read(theirs)
    ours = read(theirs, Projected(FSQ([8, 5, 5, 5], bound="vqp"), 16))
    compare(theirs, ours, 16)
    assert_way_back(theirs, ours, set())


def test_within_a_model_of_ones_own(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.vq = nn.Linear(4, 8), trained(vqp.VectorQuantize(8, 16), 8)

    model = Model()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "own.ckpt")
    ours = load_checkpoint(tmp_path / "own.ckpt", prefix="vq.")
    compare(model.vq, ours, 8)
    with pytest.raises(ValueError, match=r"has nothing below 'qv.', its parts are encoder., vq."):
        load_checkpoint(tmp_path / "own.ckpt", prefix="qv.")

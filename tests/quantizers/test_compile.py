"""Whole graphs: torch.compile(fullgraph=True) in train and eval, torch.export."""

import copy
import io
from functools import partial

import pytest
import torch
from strategies import inputs_for

from xq.models import next_scale_input, teacher_forcing
from xq.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    ChannelFirst,
    CodeSampling,
    DepthDropout,
    EMACodebook,
    GradientCodebook,
    GumbelVQ,
    Perturbed,
    ProductQuantizer,
    Projected,
    ResidualQuantizer,
    SimCodebook,
    beam_encode,
    rotation_trick,
)

EMA = partial(EMACodebook, decay=0.9)
TREES = {
    "vq": VQ(4, 16),
    "unit vq": VQ(4, 16, normalize=True, estimator=rotation_trick),
    "ema": VQ(4, 16, codebook=EMA),
    "revived": VQ(4, 70, codebook=partial(GradientCodebook, revive=0.1)),
    "lfq": LFQ(4, bound="tanh"),
    "bsq groups": BSQ(4, group_size=2),
    "fsq": FSQ([4, 5, 3]),
    "residual of fsq": ResidualQuantizer(FSQ([4, 5, 3], bound="paper"), 3),
    "sim": VQ(4, 16, codebook=SimCodebook),
    "regularized": VQ(4, 16, entropy_temperature=0.1),
    "drawn": VQ(4, 16, sampling=CodeSampling(1.0)),
    "ibq": IBQ(4, 16),
    "gumbel": GumbelVQ(4, 16),
    "residual": ResidualQuantizer(VQ(4, 16, codebook=EMA), 3, shared=True),
    "pyramid": ResidualQuantizer(VQ(4, 16, metric="cosine"), multiscale=(1, 2, 3)),
    "product": ProductQuantizer(ResidualQuantizer(BSQ(4), multiscale=(1, 2, 3)), P=2),
}


@pytest.mark.compile
@pytest.mark.parametrize("name", TREES)
def test_trains_and_evaluates_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    plain = copy.deepcopy(TREES[name])
    graph = copy.deepcopy(plain)
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = inputs_for(plain, seed=step)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.manual_seed(step)
        one = plain(a)
        torch.manual_seed(step)
        two = compiled(b)
        assert torch.equal(one.indices, two.indices)
        torch.testing.assert_close(one.z, two.z)
        torch.testing.assert_close(one.losses, two.losses)
        for q in (one, two):
            (q.z.square().sum() + q.losses.total()).backward()
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(dict(plain.state_dict()), dict(graph.state_dict()))
    plain.eval()
    graph.eval()
    x = inputs_for(plain, seed=9)
    assert torch.equal(plain(x).indices, compiled(x).indices)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["gumbel", "drawn"])
def test_a_schedule_of_temperatures_is_not_compiled_anew_each_step(name: str) -> None:
    torch._dynamo.reset()
    compiled_graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled_graphs.append(graph)
        return graph

    quantizer = copy.deepcopy(TREES[name])
    part = quantizer if name == "gumbel" else quantizer.sampling
    compiled = torch.compile(quantizer, fullgraph=True, backend=count)
    for step in range(12):
        part.temperature = 1 - step / 20
        compiled(inputs_for(quantizer))
    assert len(compiled_graphs) == 2


@pytest.mark.compile
def test_depths_wrappers_and_coding_compile() -> None:
    torch._dynamo.reset()
    quantizer = ChannelFirst(Projected(ResidualQuantizer(VQ(4, 16), 3), 6))
    drop = DepthDropout(3, p=0.5, minimum=1)

    def step(x: torch.Tensor) -> torch.Tensor:
        indices = quantizer.encode(x)
        return quantizer(x, drop(len(x), x.device)).z + quantizer.decode(indices)

    x = torch.randn(4, 6, 3, 3)
    assert torch.compile(step, fullgraph=True, backend="aot_eager")(x).shape == x.shape


@pytest.mark.compile
def test_inductor_generates_equal_code() -> None:
    torch._dynamo.reset()
    quantizer = ProductQuantizer(ResidualQuantizer(VQ(4, 16, codebook=EMA), 2), P=2)
    twin = copy.deepcopy(quantizer)
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(5, 8)
    for _ in range(2):
        one, two = quantizer(x), compiled(x)
        assert torch.equal(one.indices, two.indices)
        torch.testing.assert_close(one.z, two.z)


@pytest.mark.compile
@pytest.mark.parametrize("name", TREES)
def test_exports_with_a_dynamic_batch(name: str) -> None:
    quantizer = copy.deepcopy(TREES[name]).eval()
    x = inputs_for(quantizer, batch=3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(quantizer, (x,), dynamic_shapes=({0: batch},))
    more = inputs_for(quantizer, batch=5, seed=1)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    got, want = torch.export.load(buffer).module()(more), quantizer(more)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.z, want.z)


@pytest.mark.compile
def test_a_graph_leaves_autocast() -> None:
    torch._dynamo.reset()
    quantizer = ProductQuantizer(ResidualQuantizer(VQ(4, 64), 2), P=2)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    x = torch.randn(200, 8)
    want = quantizer(x).indices
    for enabled in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(compiled(x).indices, want)


class Decoder(torch.nn.Module):
    """What an export of `decode` looks like."""

    def __init__(self, quantizer: torch.nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.quantizer.decode(indices)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["vq", "residual", "product"])
def test_decode_exports(name: str) -> None:
    quantizer = copy.deepcopy(TREES[name]).eval()
    indices = quantizer.encode(inputs_for(quantizer))
    program = torch.export.export(Decoder(quantizer), (indices,))
    assert torch.equal(program.module()(indices), quantizer.decode(indices))


@pytest.mark.compile
def test_a_perturbed_quantizer_compiles_whatever_the_progress() -> None:
    torch._dynamo.reset()
    perturbed = Perturbed(VQ(4, 16), 8, beta=0.5)
    compiled = torch.compile(perturbed, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 5, 4, requires_grad=True)
    # more values than a graph is made anew for
    for epoch in range(12):
        perturbed.progress = epoch / 11
        z, indices, losses = compiled(x)
        assert torch.equal(perturbed.decode(indices), z)
        (z.sum() + losses.total()).backward()
    assert x.grad is not None
    assert (indices != perturbed.encode(x)).any()
    assert torch.equal(compiled.eval()(x).indices, perturbed.encode(x))


LEAVES = [VQ(4, 16), VQ(4, 16, metric="cosine"), LFQ(4)]


@pytest.mark.compile
@pytest.mark.parametrize("leaf", LEAVES, ids=["vq", "cosine", "lfq"])
def test_a_beam_search_compiles(leaf: torch.nn.Module) -> None:
    torch._dynamo.reset()
    quantizer = ProductQuantizer(ResidualQuantizer(leaf, 3, shrink=0.7), P=2)
    x = torch.randn(10, 8)
    compiled = torch.compile(beam_encode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(quantizer, x, 4), beam_encode(quantizer, x, 4))


@pytest.mark.compile
def test_inputs_of_generators_compile() -> None:
    torch._dynamo.reset()
    quantizer = copy.deepcopy(TREES["product"]).eval()
    indices = quantizer.encode(inputs_for(quantizer))

    def both(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = next_scale_input(quantizer, indices[:, :1])
        second = next_scale_input(quantizer, indices[:, :5], first.z)
        return teacher_forcing(quantizer, indices), first.input, second.input

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(indices)
    torch.testing.assert_close(got, both(indices))

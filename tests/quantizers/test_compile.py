"""Whole graphs: torch.compile(fullgraph=True) in train and eval, torch.export."""

import copy
import io
from functools import partial

import pytest
import torch
from strategies import inputs_for

from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ChannelFirst,
    DepthDropout,
    EMACodebook,
    ProductQuantizer,
    Projected,
    ResidualQuantizer,
    rotation_trick,
)

EMA = partial(EMACodebook, decay=0.9)
TREES = {
    "vq": VQ(4, 16),
    "unit vq": VQ(4, 16, normalize=True, estimator=rotation_trick),
    "ema": VQ(4, 16, codebook=EMA),
    "lfq": LFQ(4, bound="tanh"),
    "bsq groups": BSQ(4, group_size=2),
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
        one, two = plain(a), compiled(b)
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

"""What users of other libraries report of precision, shapes and parts; see docs/complaints.md."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family import EMA, LEAVES, assert_same_state, nest, state, step
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xq.metrics import CodebookUsage
from xq.models import LinearDecoder, LinearEncoder, Tokenizer, teacher_forcing
from xq.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    ChannelFirst,
    Losses,
    Masked,
    ProductQuantizer,
    Projected,
    Pyramid,
    Quantized,
    Quantizer,
    ResidualQuantizer,
    fit,
)
from xq.testing import check_quantizer

SCALES = (1, 2, 3)
PLAIN = [name for name in LEAVES if name not in ("ibq", "gumbel")]


@pytest.mark.compile
@pytest.mark.parametrize("name", ["ema", "revived", "bsq", "fsq"])
def test_complaint_26_one_graph_in_training_and_eval(name: str) -> None:
    """torch.compile breaks graphs at updates and masks (lucidrains/vector-quantize-pytorch#41)."""
    torch._dynamo.reset()
    plain = nest(LEAVES[name]())
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    x = torch.randn(60, 8)
    for training in (True, True, False):
        found = []
        for quantizer in (plain, compiled):
            torch.manual_seed(7)
            found.append(quantizer.train(training)(x))
        assert torch.equal(found[0].indices, found[1].indices)
        torch.testing.assert_close(found[0].z, found[1].z)


@pytest.mark.parametrize("name", LEAVES)
def test_complaint_27_half_precision_changes_no_index(name: str) -> None:
    """Half precision crashes or overflows (lucidrains/vector-quantize-pytorch#100, #144)."""
    quantizer = nest(LEAVES[name]()).eval()
    x = torch.randn(60, 8).bfloat16()
    want = quantizer(x.float())
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            z, indices, losses = quantizer(x)
        assert torch.equal(indices, want.indices)
        assert torch.equal(z, want.z.bfloat16())
        assert all(loss.dtype == torch.float32 for loss in losses)
    before = state(quantizer)
    quantizer.half()
    assert_same_state(quantizer, before)
    assert torch.equal(quantizer(x).indices, want.indices)
    # products of halves would be infinite
    step(quantizer.train(), (300 * torch.randn(60, 8)).half())
    assert all(tensor.isfinite().all() for tensor in quantizer.state_dict().values())


@pytest.mark.parametrize("name", LEAVES)
def test_complaint_28_no_state_holds_a_graph(name: str) -> None:
    """Memory grows step by step: buffers with a history (lucidrains/vector-quantize-pytorch#56)."""
    for quantizer in (LEAVES[name](), nest(LEAVES[name]())):
        usage, encoder, sizes = CodebookUsage.of(quantizer), nn.Linear(8, quantizer.dim), []
        for _ in range(3):
            usage.update(step(quantizer, encoder(torch.randn(50, 8))).indices)
            parts = [*quantizer.modules(), usage]
            tensors = [*quantizer.buffers(), *usage.buffers()]
            tensors += [t for m in parts for t in vars(m).values() if isinstance(t, Tensor)]
            assert not any(t.requires_grad or t.grad_fn is not None for t in tensors)
            sizes.append(sum(t.numel() for t in tensors))
        assert sizes[1] == sizes[2]


class NoDoubles(TorchDispatchMode):
    """Refuses operations with results in double precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            assert not isinstance(tensor, Tensor) or tensor.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("name", [n for n in LEAVES if n != "drawn"])
def test_complaint_29_no_doubles_where_a_device_has_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It crashes on MPS, which has no double precision (lucidrains/vector-quantize-pytorch#55)."""
    # what runs on any device
    monkeypatch.setenv("XQ_LOOKUP", "chunked")
    quantizer = nest(LEAVES[name]())
    pyramid = ResidualQuantizer(LEAVES[name](), multiscale=SCALES) if name in PLAIN else None
    x = torch.randn(30, 8)
    step(quantizer, x)
    with NoDoubles():
        step(quantizer, x)
        quantizer.decode(quantizer.encode(x))
        if pyramid is not None:
            step(pyramid, torch.randn(2, 3, 3, 4))
    with pytest.raises(AssertionError), NoDoubles():
        x.double()


@pytest.mark.parametrize("name", LEAVES)
def test_complaint_30_a_mask_is_as_if_the_rest_were_not_there(name: str) -> None:
    """Padding counts in losses and averages (lucidrains/vector-quantize-pytorch#149, #188)."""
    plain = nest(LEAVES[name]())
    masked = Masked(copy.deepcopy(plain))
    x, mask = torch.randn(4, 6, 8), torch.rand(4, 6) < 0.6
    # what stands in the padding must not matter
    x[~mask] = 1e4
    one, two = x.clone().requires_grad_(), x[mask].clone().requires_grad_()
    torch.manual_seed(3)
    got = masked(one, mask=mask)
    torch.manual_seed(3)
    want = plain(two)
    assert torch.equal(got.indices[mask], want.indices)
    torch.testing.assert_close(got.z[mask], want.z)
    torch.testing.assert_close(got.losses, want.losses)
    for out in (got, want):
        (out.z.square().sum() + out.losses.total()).backward()
    torch.testing.assert_close(one.grad[mask], two.grad)
    assert (one.grad[~mask] == 0).all()
    assert_same_state(masked.quantizer, state(plain))


@pytest.mark.parametrize("name", ["vq", "ema", "lfq", "fsq"])
def test_complaint_31_any_number_of_axes(name: str) -> None:
    """Shapes that one class takes another refuses (lucidrains/vector-quantize-pytorch#39, #233)."""
    for quantizer in (nest(LEAVES[name]()), ProductQuantizer(LEAVES[name](), P=2)):
        quantizer.eval()
        flat = torch.randn(60, 8)
        want = quantizer(flat)
        for shape in ((60,), (4, 15), (3, 4, 5), (2, 2, 3, 5)):
            x = flat.view(*shape, 8)
            z, indices, _ = quantizer(x)
            assert torch.equal(z.view(60, 8), want.z)
            assert indices.shape == (*shape, *quantizer.code_shape)
            first = ChannelFirst(quantizer)(x.movedim(-1, 1) if len(shape) > 1 else x)
            assert torch.equal(first.indices, indices)
        assert torch.equal(quantizer(flat[0]).indices, want.indices[0])
        with pytest.raises(ValueError, match=r"wrap it in ChannelFirst\("):
            quantizer(torch.randn(2, 8, 3, 5))


def test_complaint_32_usage_and_perplexity_of_every_codebook() -> None:
    """No usage, no perplexity (lucidrains/vector-quantize-pytorch#24, #63, #109)."""
    usage = CodebookUsage.of(ProductQuantizer(VQ(2, 4), P=2))
    # the first branch uses two codes alike, the second all four; told in two batches
    indices = torch.tensor([[0, 0], [0, 1], [3, 2], [3, 3]])
    usage.update(indices[:1])
    usage.update(indices[1:])
    used, perplexity, entropy = usage.compute()
    assert used.tolist() == [0.5, 1.0]
    assert perplexity.tolist() == pytest.approx([2.0, 4.0])
    assert entropy.tolist() == pytest.approx([1.0, 2.0])
    pyramid = ResidualQuantizer(VQ(2, 4), multiscale=SCALES)
    assert CodebookUsage.of(pyramid).compute().used.shape == (3,)
    assert CodebookUsage.of(ProductQuantizer(pyramid, P=2)).compute().used.shape == (3, 2)


# with 8 and with 5 levels: the bounded value of 0.3 and of -2, and the last code
FROZEN = {
    "even": ((0.29329, -1.07586, 1.0), (0.29437, -1.15209, 1.0)),
    "symmetric": ((0.29131, -0.96403, 1.0), (0.29131, -0.96403, 1.0)),
    "ifsq": ((0.2355, -0.92167, 1.0), (0.2355, -0.92167, 1.0)),
    "clamp": ((0.3, -1.0, 1.0), (0.3, -1.0, 1.0)),
    "paper": ((0.23946, -0.95744, 0.75), (0.29102, -0.96306, 1.0)),
    "vqp": ((0.23998, -0.95913, 0.75), (0.2916, -0.96499, 1.0)),
}


@pytest.mark.parametrize("bound", FROZEN)
def test_complaint_33_a_name_of_fsq_keeps_its_numbers(bound: str) -> None:
    """Old checkpoints decode differently (lucidrains/vector-quantize-pytorch#96, #166, #230)."""
    for levels, (small, large, last) in zip((8, 5), FROZEN[bound], strict=True):
        fsq = FSQ([levels], bound=bound)
        got = fsq.bound(torch.tensor([[0.3], [-2.0]]))
        assert got[:, 0].tolist() == pytest.approx([small, large], abs=1e-5)
        ends = fsq.decode(torch.tensor([0, levels - 1]))
        assert ends.flatten().tolist() == [-1.0, last]


@pytest.mark.parametrize(
    "leaf",
    [
        lambda: VQ(4, 16, codebook=EMA),
        lambda: VQ(4, 16),
        lambda: LFQ(4, bound="tanh"),
        lambda: BSQ(4),
    ],
    ids=["ema", "gradient", "lfq", "bsq"],
)
def test_complaint_34_multiscale_quantizers_train(leaf: Callable[[], Any]) -> None:
    """Training of multi-scale quantizers is asked for and not to be had (VAR#22, Infinity#80)."""
    torch.manual_seed(1)
    pyramid = ResidualQuantizer(leaf(), multiscale=(1, 2, 4))
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 6)
    optimizer = torch.optim.AdamW(
        [p for m in (encoder, decoder, pyramid) for p in m.parameters()], lr=1e-2
    )
    x = torch.randn(32, 1, 1, 6) + 0.3 * torch.randn(32, 4, 4, 6)
    errors = []
    for _ in range(60):
        z, indices, losses = pyramid(encoder(x))
        error = F.mse_loss(decoder(z), x)
        optimizer.zero_grad()
        (error + losses.total(regularizer=0.02)).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]
    usage = CodebookUsage.of(pyramid)
    usage.update(indices)
    # for each scale
    assert (usage.compute().used > 0.1).all()


def test_complaint_35_other_resolutions_with_the_same_weights() -> None:
    """Other schedules and sizes need other code (VAR#54, STAR#2)."""
    pyramid = ResidualQuantizer(VQ(4, 16), multiscale=(1, 2, 4)).eval()
    wide = pyramid.with_scales((1, (2, 3), (3, 5), (4, 7)))
    assert all(a is b for a, b in zip(wide.parameters(), pyramid.parameters(), strict=True))
    x = torch.randn(2, 4, 7, 4)
    z, indices, _ = wide(x)
    assert indices.shape == (2, 1 + 6 + 15 + 28)
    assert torch.equal(wide.decode(indices), z)
    assert teacher_forcing(wide, indices).shape == (2, 6 + 15 + 28, 4)
    assert [tuple(part.shape) for part in wide.partials(indices)] == [tuple(x.shape)] * 4


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("P", [1, 2])
def test_complaint_36_every_leaf_in_every_nest(name: str, P: int) -> None:
    """One or two branches crash with some quantizers (ImageFolder#11, #24)."""
    leaf = LEAVES[name]
    trees: list[Any] = [
        ProductQuantizer(ResidualQuantizer(leaf(), multiscale=SCALES), P=P),
        ProductQuantizer(ResidualQuantizer(leaf(), 2), P=P),
        ResidualQuantizer(ProductQuantizer(leaf(), P=P), multiscale=Pyramid(SCALES)),
    ]
    for tree in trees:
        tokenizer = Tokenizer(
            LinearEncoder(tree.dim, patch=2), tree, LinearDecoder(tree.dim, patch=2)
        )
        image = torch.randn(2, 3, 6, 6)
        made, (_, indices, losses) = tokenizer(image)
        (F.mse_loss(made, image) + losses.total()).backward()
        assert all(p.grad is not None for p in tokenizer.encoder.parameters())
        tokenizer.eval()
        made = tokenizer(image).image
        indices = tokenizer.encode(image)
        torch.testing.assert_close(tokenizer.decode(indices), made)


class Rounded(Quantizer):
    """A leaf of one's own: integers from 0 to 7 on the one channel."""

    dim, codebook_size = 1, 8

    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Any = None) -> Quantized:
        indices = u.detach()[..., 0].round().clamp(0, 7).long()
        z = self.dequantize(indices)
        return Quantized(z, indices, Losses(*fit(u, z, learned=False)))

    def dequantize(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return indices[..., None].float()

    def config(self) -> dict[str, Any]:
        return {}


def test_complaint_38_a_leaf_of_ones_own_composes() -> None:
    """New quantizers are asked for, and need a residual and a grouped class each (#143, #239)."""
    trees: list[Quantizer] = [
        Rounded(),
        ResidualQuantizer(Rounded(), 2, shrink=0.5),
        ProductQuantizer(Rounded(), P=3),
        ProductQuantizer(ResidualQuantizer(Rounded(), multiscale=SCALES), P=2),
    ]
    for tree in trees:
        shape = (2, 3, 3, tree.dim)
        check_quantizer(tree, 4 + 2 * torch.randn(shape), classes=[Rounded])


def test_complaint_40_saved_and_read_back_without_pickle(tmp_path: Path) -> None:
    """People want to plug a tokenizer in, and cannot (DALLE-pytorch#75, #192)."""
    quantizer = Projected(nest(VQ(4, 17, codebook=EMA)), 5)
    tokenizer = Tokenizer(LinearEncoder(5, patch=2), quantizer, LinearDecoder(5, patch=2)).eval()
    image = torch.randn(2, 3, 6, 8)
    indices = tokenizer.encode(image)
    for module, folder in ((tokenizer, tmp_path / "whole"), (quantizer, tmp_path / "quantizer")):
        module.save_pretrained(folder)
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "model.safetensors",
        ]
        assert json.loads((folder / "config.json").read_text())["class"] == type(module).__name__
    read = Tokenizer.from_pretrained(tmp_path / "whole")
    assert torch.equal(read.encode(image), indices)
    assert torch.equal(read.decode(indices), tokenizer.decode(indices))
    alone = Projected.from_pretrained(tmp_path / "quantizer")
    assert torch.equal(alone.decode(indices), quantizer.decode(indices))
    Rounded().save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"pass your own class with classes=\[...\]"):
        Quantizer.from_pretrained(tmp_path / "own")
    assert isinstance(Quantizer.from_pretrained(tmp_path / "own", classes=[Rounded]), Rounded)

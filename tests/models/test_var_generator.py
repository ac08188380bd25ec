"""VAR: a naive transformer beside it, recomputation beside the cache, learning, bad input."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xq.config import build, describe
from xq.models import VAR, next_scale_input, teacher_forcing
from xq.models.sampling import draw, guided
from xq.models.var_blocks import BlockCache
from xq.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    ChannelFirst,
    ProductQuantizer,
    Pyramid,
    ResidualQuantizer,
    indices_to_signs,
    signs_to_indices,
)
from xq.quantizers.grids import published_scales

SCALES = (1, (2, 1), (2, 3), 4)
FIRST_OF_TWO = ((2, 1), (3, 2))
SMALL = {"classes": 5, "depth": 2, "width": 12, "heads": 3}
TREES: dict[str, Callable[[], Any]] = {
    "pyramid": lambda: ResidualQuantizer(VQ(4, 11), multiscale=SCALES),
    "product": lambda: ProductQuantizer(ResidualQuantizer(VQ(2, 11), multiscale=SCALES), P=3),
    "signs": lambda: ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=SCALES), P=2),
    "lfq": lambda: ResidualQuantizer(LFQ(4), multiscale=Pyramid(FIRST_OF_TWO)),
    "fsq": lambda: ResidualQuantizer(FSQ([5, 3]), multiscale=SCALES),
    "of residuals": lambda: ResidualQuantizer(ResidualQuantizer(VQ(4, 8), 2), multiscale=SCALES),
    "nested": lambda: ProductQuantizer(
        ResidualQuantizer(ProductQuantizer(VQ(2, 8), P=2), multiscale=FIRST_OF_TWO), P=3
    ),
    "wrapped": lambda: ChannelFirst(ResidualQuantizer(VQ(4, 11), multiscale=SCALES)),
}
CASES = [(name, "codes") for name in TREES] + [("signs", "bits"), ("lfq", "bits")]
BOTH_HEADS = pytest.mark.parametrize("head", ["codes", "bits"])
ALL = pytest.mark.parametrize(("tree", "head"), CASES)


@torch.no_grad()
def lively(model: VAR) -> VAR:
    """With weights of which everything depends on everything, unlike at the start."""
    for parameter in model.parameters():
        parameter.normal_(std=0.5 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
    model.predict.weight.mul_(4)
    return model


def made(tree: str, head: str = "codes", **options) -> tuple[Any, VAR]:
    quantizer = TREES[tree]()
    return quantizer, lively(VAR.of(quantizer, head=head, **SMALL | options)).eval()


def random_tokens(quantizer: Any, batch: int = 3) -> Tensor:
    shape = (batch, quantizer.num_tokens, *quantizer.code_shape)
    return torch.randint(quantizer.codebook_size, shape)


def signs() -> Any:
    return TREES["signs"]()


def naive(model: VAR, inputs: Tensor, labels: Tensor) -> Tensor:
    """The logits by explicit softmaxes, a head and a branch at a time."""
    w = dict(model.named_parameters())
    c = w["class_embed.weight"][labels % (model.classes + 1)][:, None]
    condition = c * torch.sigmoid(c)
    levels = torch.cat([torch.full((h * v,), k) for k, (h, v) in enumerate(model.grids)])
    start = c.expand(-1, model.ends[0], -1) + w["start"]
    x = torch.cat([start, inputs @ w["embed.weight"].T + w["embed.bias"]], dim=1)
    x = x + w["positions"][:, : x.shape[1]] + w["level_embed.weight"][levels[: x.shape[1]]]
    hidden = levels[None, : x.shape[1]] > levels[: x.shape[1], None]
    for i in range(model.depth):
        x = naive_block(model, i, x, condition, hidden)
    made = condition @ w["modulation.weight"].T + w["modulation.bias"]
    x = normed(x) * (1 + made[..., : model.width]) + made[..., model.width :]
    return (x @ w["predict.weight"].T + w["predict.bias"]).view(*x.shape[:2], *model.outcomes)


def naive_block(model: VAR, i: int, x: Tensor, condition: Tensor, hidden: Tensor) -> Tensor:
    w = dict(model.blocks[i].named_parameters())
    made = condition @ w["modulation.weight"].T + w["modulation.bias"]
    gate1, gate2, scale1, scale2, shift1, shift2 = made.split(model.width, dim=-1)
    y = normed(x) * (1 + scale1) + shift1
    q, k, v = (y @ w["attention.qkv.weight"].T).split(model.width, dim=-1)
    q, v = q + w["attention.q_bias"], v + w["attention.v_bias"]
    size, seen = model.width // model.heads, []
    for head in range(model.heads):
        part = slice(head * size, (head + 1) * size)
        angles = unit(q[..., part]) @ unit(k[..., part]).mT
        scores = angles * w["attention.log_scale"][head].clamp(max=math.log(100)).exp()
        seen.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[..., part])
    y = torch.cat(seen, dim=-1) @ w["attention.projection.weight"].T
    x = x + gate1 * (y + w["attention.projection.bias"])
    y = normed(x) * (1 + scale2) + shift2
    y = y @ w["expand.weight"].T + w["expand.bias"]
    y = 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))
    return x + gate2 * (y @ w["contract.weight"].T + w["contract.bias"])


def normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


@ALL
def test_values_and_gradients(tree, head):
    quantizer, model = made(tree, head)
    with torch.no_grad():
        # above the bound, where it has no gradient
        model.blocks[0].attention.log_scale[0] = 5.0
    model.double()
    tokens, labels = random_tokens(quantizer), torch.tensor([4, 0, -1])
    inputs = teacher_forcing(quantizer, tokens).double()
    results = []
    for forward in (model, lambda *args: naive(model, *args)):
        logits = forward(inputs, labels)
        loss = model.loss(logits, tokens)
        results.append((logits, *torch.autograd.grad(loss, list(model.parameters()))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)
        assert want.any()


@ALL
def test_shapes(tree, head):
    quantizer, model = made(tree, head)
    tokens, labels = random_tokens(quantizer), torch.tensor([0, 4, 2])
    logits = model(teacher_forcing(quantizer, tokens), labels)
    size = quantizer.codebook_size
    outcomes = (size,) if head == "codes" else (size.bit_length() - 1, 2)
    assert logits.shape == (*tokens.shape, *outcomes)
    drawn = model.generate(quantizer, labels)
    assert drawn.shape == tokens.shape
    assert drawn.dtype == torch.int64
    # checks the range
    quantizer.decode(drawn)


@BOTH_HEADS
def test_loss(head):
    quantizer, model = made("signs", head)
    tokens = random_tokens(quantizer)
    logits = torch.randn(*tokens.shape, *model.outcomes[1:])
    shares, total, count = logits.softmax(-1), 0.0, 0
    for place in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
        share, token = shares[tuple(place)], int(tokens[tuple(place)])
        bits = [share[i, token >> i & 1] for i in range(3)] if head == "bits" else [share[token]]
        total -= sum(math.log(p) for p in bits)
        count += len(bits)
    torch.testing.assert_close(model.loss(logits, tokens).item(), total / count)


def test_leading_scales_alone():
    quantizer, model = made("product")
    tokens, labels = random_tokens(quantizer), torch.tensor([0, 4, 2])
    want = model(teacher_forcing(quantizer, tokens), labels)
    for count in (1, 3, 9):
        got = model(teacher_forcing(quantizer, tokens[:, :count]), labels)
        torch.testing.assert_close(got, want[:, :count])
        torch.testing.assert_close(
            model.loss(got, tokens[:, :count]), model.loss(want[:, :count], tokens[:, :count])
        )


def test_a_place_is_seen_by_its_own_scale_and_finer_ones():
    _, model = made("product")
    inputs = torch.randn(1, model.num_tokens - 1, model.dim)
    labels, ends = torch.tensor([1]), (0, *model.ends)
    before = model(inputs, labels)
    for k in range(1, 4):
        changed = inputs.clone()
        # the last place of scale k, which has no input for the first place of all
        changed[:, ends[k + 1] - 2] += 1
        moved = (model(changed, labels) - before).abs().amin(dim=(0, 2, 3))
        assert not (model(changed, labels) - before)[:, : ends[k]].any()
        assert (moved[ends[k] :] > 0).all()


@pytest.mark.parametrize("tree", ["product", "nested"])
def test_tokens_of_a_scale_move_finer_ones_alone(tree):
    quantizer, model = made(tree)
    tokens, labels = random_tokens(quantizer, 2), torch.tensor([1, -1])
    before = model(teacher_forcing(quantizer, tokens), labels)
    for start, end in zip((0, *model.ends), model.ends, strict=False):
        changed = tokens.clone()
        changed[:, start:end] = (tokens[:, start:end] + 1) % quantizer.codebook_size
        after = model(teacher_forcing(quantizer, changed), labels)
        assert torch.equal(before[:, :end], after[:, :end])
        assert (before != after)[:, end:].flatten(2).any(2).all()


def recomputed(quantizer, model, labels, guidance, **options):
    """What `generate` is to draw: each scale from a forward pass over all before."""
    tree = quantizer.quantizer if isinstance(quantizer, ChannelFirst) else quantizer
    tokens, ends = torch.empty(len(labels), 0, *tree.code_shape, dtype=torch.int64), model.ends
    inputs = torch.empty(len(labels), 0, tree.dim)
    for k, end in enumerate(ends):
        parts = [model(inputs, each) for each in (labels, torch.full_like(labels, -1))]
        newest = [part[:, tokens.shape[1] :] for part in parts]
        logits = guided(*newest, 1 + (guidance - 1) * k / (len(ends) - 1))
        drawn = draw(logits, **options)
        drawn = signs_to_indices(drawn.bool()) if model.head == "bits" else drawn
        tokens = torch.cat([tokens, drawn], dim=1)
        assert tokens.shape[1] == end
        inputs = teacher_forcing(quantizer, tokens)
        inputs = torch.cat([inputs, next_scale_input(quantizer, tokens).input], dim=1)
    return tokens


@ALL
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@torch.no_grad()
def test_generation_equals_recomputation(tree, head, guidance):
    quantizer, model = made(tree, head)
    labels = torch.tensor([3, 0, 3])
    for options in ({"top_k": 1}, {"top_k": 5, "top_p": 0.9, "temperature": 1.4}):
        seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
        got = model.generate(quantizer, labels, guidance=guidance, generator=seeds[0], **options)
        want = recomputed(quantizer, model, labels, guidance, generator=seeds[1], **options)
        assert torch.equal(got, want)
        assert torch.equal(seeds[0].get_state(), seeds[1].get_state())


@torch.no_grad()
def test_generation_equals_recomputation_at_680_tokens():
    quantizer = ResidualQuantizer(VQ(4, 32), multiscale=published_scales(10))
    model = lively(VAR.of(quantizer, **SMALL)).eval()
    labels, options = torch.tensor([3, 0]), {"top_k": 20, "top_p": 0.96}
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    got = model.generate(quantizer, labels, guidance=2.0, generator=seeds[0], **options)
    assert got.shape == (2, 680)
    assert torch.equal(
        got, recomputed(quantizer, model, labels, 2.0, generator=seeds[1], **options)
    )


def test_sampling_keeps_one_room_and_one_modulation(monkeypatch):
    quantizer, model = made("pyramid")
    rooms, lengths, extend = set(), [], BlockCache.extend
    modulated = []

    def watched(cache, k, v):
        found = extend(cache, k, v)
        rooms.add(cache._room.data_ptr())
        lengths.append(found[0].shape[2])
        assert cache.length == model.num_tokens
        return found

    monkeypatch.setattr(BlockCache, "extend", watched)
    for block in model.blocks:
        block.modulation.register_forward_hook(lambda *_: modulated.append(1))
    model.generate(quantizer, torch.tensor([1, 2]), guidance=2.0)
    assert len(rooms) == len(modulated) == model.depth
    assert lengths == [end for end in model.ends for _ in model.blocks]


def test_seeds_and_the_mode():
    quantizer, model = made("product", class_drop=0.5, drop_path=0.9)
    model.train()
    model.blocks[1].eval()
    labels, before = torch.tensor([3, 0]), torch.get_rng_state()

    def generate(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(quantizer, labels, generator=generator)

    assert torch.equal(generate(1), generate(1))
    assert not torch.equal(generate(1), generate(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.blocks[1].training
    assert not generate(1).requires_grad


def test_guidance_leans_towards_the_class():
    quantizer, model = made("pyramid")
    labels = torch.full((300,), 2)
    tokens = model.generate(quantizer, labels[:1], top_k=1)

    def advantage(guidance):
        """How much likelier the class is than none, on the mean of what is drawn."""
        drawn = model.generate(quantizer, labels, guidance=guidance)
        inputs = teacher_forcing(quantizer, drawn)
        with torch.no_grad():
            c, u = (model(inputs, each) for each in (labels, torch.full_like(labels, -1)))
        gap = (c.log_softmax(-1) - u.log_softmax(-1)).gather(-1, drawn[..., None])[..., 0]
        return gap.mean(0)

    without, with_guidance = advantage(1.0), advantage(4.0)
    assert (with_guidance > without)[3:].float().mean() > 0.8
    assert tokens.shape == (1, quantizer.num_tokens)


def test_the_class_is_left_out_in_training_alone():
    quantizer, model = made("pyramid", class_drop=0.4, drop_path=0.0)
    labels = torch.arange(5).repeat(40)
    inputs = teacher_forcing(quantizer, random_tokens(quantizer, 200))
    with torch.no_grad():
        named, nameless = model(inputs, labels), model(inputs, torch.full_like(labels, -1))
        model.train()
        drawn = model(inputs, labels, generator=torch.Generator().manual_seed(3))
        again = model(inputs, labels, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, again)
    is_named = torch.isclose(drawn, named, atol=1e-4).flatten(1).all(1)
    is_nameless = torch.isclose(drawn, nameless, atol=1e-4).flatten(1).all(1)
    assert (is_named ^ is_nameless).all()
    assert 0.28 < is_nameless.float().mean() < 0.52


def test_stochastic_depth():
    model = VAR(4, 7, SCALES, **SMALL | {"depth": 3}, drop_path=0.6).train()
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.3, 0.6])
    x = torch.randn(4000, 2, 3)
    for block in model.blocks:
        dropped = block._dropped(x)
        kept = dropped.flatten(1).any(1)
        torch.testing.assert_close(dropped[kept], x[kept] / (1 - block.drop_path))
        assert abs(1 - kept.float().mean() - block.drop_path) < 0.05
        assert block.eval()._dropped(x) is x
    assert VAR(4, 7, SCALES, classes=5, depth=12, width=12).drop_path == pytest.approx(0.05)


def test_the_start():
    depth, width = 3, 192
    model = VAR(8, 50, (1, 4), code_shape=(2,), classes=200, depth=depth)
    std = (3 * width) ** -0.5
    within = std / (2 * depth) ** 0.5
    block = model.blocks[1]
    gates, others = block.modulation.weight.split([2 * width, 4 * width])
    weights = [
        (model.class_embed.weight, std),
        (model.positions, std),
        (model.embed.weight, std),
        (block.attention.qkv.weight, std),
        (block.attention.projection.weight, within),
        (block.expand.weight, std),
        (block.contract.weight, within),
        (gates, 1e-5 * std),
        (others, 0.5 * std),
        (model.modulation.weight, 0.5 * std),
        (model.predict.weight, 0.02 * std),
    ]
    for weight, want in weights:
        assert weight.std().item() == pytest.approx(want, rel=0.05)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert not torch.cat(biases).any()
    assert torch.equal(block.attention.log_scale, torch.full((3,), math.log(4)))


def test_sizes_of_the_papers():
    with torch.device("meta"):
        d16 = VAR(32, 4096, published_scales(10), depth=16)
        d17 = VAR(64, 4096, (1, 1, 2, 3, 3, 4, 5, 6, 8, 11), code_shape=(2,), depth=17)

    def millions(module):
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)

    assert (d16.width, d16.heads, d16.num_tokens) == (1024, 16, 680)
    assert millions(d16) == 310.3
    assert (millions(d17), millions(d17.blocks)) == (375.3, 362.5)


def test_bits_need_few_weights():
    with torch.device("meta"):
        model = VAR(32, 2**32, SCALES, head="bits", **SMALL)
    assert model.predict.weight.shape == (64, 12)


@BOTH_HEADS
def test_learns_tokens_by_heart(head):
    """Two pictures of each class, whose first tokens differ in one bit and all else by chance."""
    quantizer = ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, 3)), P=2)
    tokens, labels = random_tokens(quantizer, 4), torch.tensor([0, 0, 1, 1])
    tokens[1::2, 0] = tokens[::2, 0] ^ torch.tensor([1, 0])
    options = SMALL | {"width": 24, "class_drop": 0.0, "drop_path": 0.0}
    model = VAR.of(quantizer, head=head, **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    inputs = teacher_forcing(quantizer, tokens)
    for _ in range(60):
        loss = model.loss(model(inputs, labels), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # one bit is left to chance, of ten places in two branches
    chances = 20 if head == "codes" else 20 * 3
    assert loss.item() == pytest.approx(math.log(2) / chances, abs=2e-3)
    drawn = model.generate(quantizer, labels.repeat(8), top_p=0.9)
    pictures = tokens.flatten(1).tolist()
    drawn_by_class = drawn.flatten(1).unflatten(0, (8, 2, 2)).transpose(0, 1).flatten(1, 2)
    for name, rows in enumerate(drawn_by_class.tolist()):
        assert all(row in pictures[2 * name : 2 * name + 2] for row in rows)
        assert all(picture in rows for picture in pictures[2 * name : 2 * name + 2])


def test_bits_are_those_of_the_quantizer():
    quantizer, model = made("signs", "bits")
    with torch.no_grad():
        model.predict.weight.zero_()
        model.predict.bias.zero_()
        # of branch 1, bit 2 is set and the others are not
        bias = model.predict.bias.view(2, 3, 2)
        bias[1, :, 0], bias[1, 2, 1] = 50, 100
    drawn = model.generate(quantizer, torch.zeros(20, dtype=torch.long))
    assert (drawn[..., 1] == 4).all()
    assert indices_to_signs(drawn[..., 1], 3)[..., 2].all()
    assert len(drawn[..., 0].unique()) == 8


def test_checkpointing_changes_no_gradient():
    quantizer, plain = made("product")
    model = copy.deepcopy(plain)
    model.checkpointing = True
    plain.drop_path = model.drop_path = 0.3
    tokens, labels = random_tokens(quantizer), torch.tensor([1, 2, 3])
    inputs, results = teacher_forcing(quantizer, tokens), []
    for each in (plain, model):
        torch.manual_seed(3)
        loss = each.train().loss(each(inputs, labels), tokens)
        results.append(torch.autograd.grad(loss, list(each.parameters())))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@BOTH_HEADS
def test_there_and_back_through_a_folder(tmp_path, head):
    quantizer, model = made("signs", head, drop_path=0.25)
    again = build(json.loads(json.dumps(describe(model))))
    assert again.config() == model.config()
    model.save_pretrained(tmp_path)
    loaded = VAR.from_pretrained(tmp_path)
    labels = torch.tensor([1, 2])
    assert not loaded.training
    assert loaded.config() == model.config()
    want = model.generate(quantizer, labels, top_k=1)
    assert torch.equal(loaded.generate(quantizer, labels, top_k=1), want)


def test_half_precision():
    quantizer, model = made("product")
    tokens, labels = random_tokens(quantizer), torch.tensor([1, 2, 3])
    inputs = teacher_forcing(quantizer, tokens)
    want = model(inputs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(inputs, labels)
        model.loss(mixed, tokens).backward()
        model.generate(quantizer, labels, guidance=2.0)
    half = copy.deepcopy(model).bfloat16()
    rounded = half(inputs, labels)
    assert rounded.dtype == torch.bfloat16
    assert half.loss(rounded, tokens).dtype == torch.float32
    for got in (mixed, rounded):
        assert F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.99
    quantizer.decode(half.generate(quantizer, labels, guidance=2.0))


@BOTH_HEADS
def test_nothing_waits_for_a_device(head):
    """Tensors without data refuse whatever asks for their values."""
    with torch.device("meta"):
        quantizer = signs()
        model = VAR.of(quantizer, head=head, **SMALL, drop_path=0.2)
        tokens, labels = random_tokens(quantizer), torch.zeros(3, dtype=torch.long)
        logits = model(teacher_forcing(quantizer, tokens), labels)
        model.loss(logits, tokens).backward()
        options = {"top_k": 4, "top_p": 0.9, "guidance": 2.0}
        assert model.generate(quantizer, labels, **options).shape == tokens.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grids": (4,)}, r"VAR needs two scales or more, got \(\(4, 4\),\); AR generates"),
        ({"grids": ()}, r"VAR needs two scales or more, got \(\)"),
        ({"grids": (1, 0)}, "`grids` to be a positive integer or two of them"),
        ({"dim": 0}, "`dim` to be a positive integer, got 0"),
        ({"classes": 0}, "`classes` to be a positive integer, got 0"),
        ({"heads": 5}, "`heads` to divide the width 12, got 5"),
        ({"code_shape": (2, 0)}, r"code_shape of positive integers, got \(2, 0\)"),
        ({"class_drop": 1.0}, "needs 0 <= class_drop < 1, got 1.0"),
        ({"drop_path": -0.1}, "needs 0 <= drop_path < 1, got -0.1"),
        ({"head": "signs"}, "VAR has the heads codes, bits, got 'signs'"),
        ({"head": "bits", "codebook_size": 12}, "a power of 2, got 12; head='codes' takes any"),
        ({"head": "bits", "codebook_size": 1}, "a power of 2, got 1"),
        ({"codebook_size": 2**24}, "a softmax over 16777216 codes; head='bits' predicts"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    arguments = {"dim": 4, "codebook_size": 8, "grids": SCALES} | SMALL | options
    with pytest.raises(ValueError, match=message):
        VAR(**arguments)


@pytest.mark.parametrize(
    ("quantizer", "head", "message"),
    [
        (VQ(4, 8), "codes", "VAR needs a quantizer whose steps are scales.* got VQ .*; an AR tak"),
        (ResidualQuantizer(VQ(4, 8), 3), "codes", "steps are scales.*; an AR takes the tokens"),
        (ResidualQuantizer(VQ(4, 8), multiscale=(4,)), "codes", "two scales or more.*AR generates"),
        (torch.nn.Linear(2, 2), "codes", "got Linear; of a tokenizer, pass its .quantizer"),
        (ResidualQuantizer(VQ(4, 8), multiscale=(1, 2)), "bits", "the bits of a VQ index mean not"),
        (ResidualQuantizer(FSQ([4, 2]), multiscale=(1, 2)), "bits", "the bits of a FSQ index"),
    ],
)
def test_quantizers_without_scales_or_signs(quantizer, head, message):
    with pytest.raises(ValueError, match=message):
        VAR.of(quantizer, head=head, **SMALL)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: TREES["signs"](), r"with dim=4, this one has 6; give the quantizer that made"),
        (
            lambda: ResidualQuantizer(VQ(4, 9), multiscale=SCALES),
            "codebook_size=11, this one has 9",
        ),
        (lambda: TREES["of residuals"](), "codebook_size=11, this one has 8"),
        (
            lambda: ResidualQuantizer(ResidualQuantizer(VQ(4, 11), 2), multiscale=SCALES),
            r"code_shape=\(\), this one has \(2,\)",
        ),
        (
            lambda: ResidualQuantizer(VQ(4, 11), multiscale=(1, 2)),
            r"grids=.*, this one has \(\(1, 1\), \(2, 2\)\)",
        ),
        (lambda: VQ(4, 11), "steps are scales"),
    ],
)
def test_another_quantizer_at_generation(other, message):
    _, model = made("pyramid")
    with pytest.raises(ValueError, match=message):
        model.generate(other(), torch.tensor([1]))


LABELS = [
    (torch.tensor([5]), r"the classes 0..4, and -1 for none, got labels 5..5; build it with"),
    (torch.tensor([-2]), r"got labels -2..-2"),
    (torch.tensor([1.0]), r"one class id an image, integers of shape \(b,\), got torch.float32"),
    (torch.tensor([True]), r"got torch.bool of shape \(1,\)"),
    (torch.tensor(1), r"got torch.int64 of shape \(\)"),
    (torch.tensor([[1]]), r"got torch.int64 of shape \(1, 1\)"),
]


@pytest.mark.parametrize(("labels", "message"), LABELS, ids=[m for _, m in LABELS])
def test_bad_labels(labels, message):
    quantizer, model = made("pyramid")
    inputs = torch.zeros(labels.shape[0] if labels.ndim else 1, model.num_tokens - 1, model.dim)
    with pytest.raises(ValueError, match=message):
        model(inputs, labels)
    with pytest.raises(ValueError, match=message):
        model.generate(quantizer, labels)


def test_an_empty_batch():
    quantizer, model = made("product")
    none = torch.empty(0, dtype=torch.long)
    for guidance in (1.0, 2.0):
        drawn = model.generate(quantizer, none, guidance=guidance, top_p=0.5)
        assert drawn.shape == (0, 25, 3)
    assert model(teacher_forcing(quantizer, drawn), none).shape == (0, 25, 3, 11)


def test_labels_of_any_width():
    quantizer, model = made("pyramid")
    for dtype in (torch.uint8, torch.int8, torch.int32):
        labels = torch.tensor([4, 0])
        want = model.generate(quantizer, labels, top_k=1)
        assert torch.equal(model.generate(quantizer, labels.to(dtype), top_k=1), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 0.0}, "VAR needs a guidance above 0, got 0.0"),
        ({"top_k": 0}, "VAR needs top_k to be a positive integer, got 0"),
        ({"top_p": 1.5}, "VAR needs top_p above 0 and up to 1, got 1.5"),
        ({"temperature": -1.0}, "VAR needs a temperature above 0, got -1.0"),
    ],
    ids=str,
)
def test_bad_sampling(options, message):
    quantizer, model = made("pyramid")
    with pytest.raises(ValueError, match=message):
        model.generate(quantizer, torch.tensor([1]), **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 25, 4), r"inputs of shape \(b, 24, 4\), or those of some leading scales"),
        (torch.zeros(2, 4, 4), r"got \(2, 4, 4\); teacher_forcing with the quantizer of this"),
        (torch.zeros(2, 24, 3), r"got \(2, 24, 3\)"),
        (torch.zeros(24, 4), r"got \(24, 4\)"),
        (torch.zeros(3, 24, 4), "inputs of 3 images and 2 labels"),
        (torch.zeros(2, 25).long(), r"pass teacher_forcing\(quantizer, tokens\) instead of tokens"),
    ],
)
def test_bad_inputs(inputs, message):
    _, model = made("pyramid")
    assert model.num_tokens == 25
    with pytest.raises(ValueError, match=message):
        model(inputs, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 25, 3).long(), r"tokens of shape \(2, 25\) for these logits, got \(2, 25"),
        (torch.zeros(2, 9).long(), "were they made by another tokenizer"),
        (torch.zeros(2, 25), "integer tokens, got torch.float32"),
        (torch.full((2, 25), 11), "tokens in 0..10, got 11..11; were they made by another"),
        (torch.full((2, 25), -1), "tokens in 0..10, got -1..-1"),
    ],
)
def test_bad_tokens(tokens, message):
    _, model = made("pyramid")
    with pytest.raises(ValueError, match=message):
        model.loss(torch.zeros(2, 25, 11), tokens)


def test_bad_logits():
    _, model = made("pyramid")
    with pytest.raises(ValueError, match=r"expects logits \(b, t, 11\) of forward, got \(2, 25, 1"):
        model.loss(torch.zeros(2, 25, 12), torch.zeros(2, 25).long())


@pytest.mark.compile
@pytest.mark.parametrize(("head", "training"), [("codes", False), ("bits", True)])
def test_one_graph(head, training):
    torch._dynamo.reset()
    quantizer = signs()
    model = lively(VAR.of(quantizer, head=head, **SMALL, class_drop=0.0, drop_path=0.0))
    model.train(training)
    tokens, labels = random_tokens(quantizer), torch.tensor([1, 2, -1])
    inputs = teacher_forcing(quantizer, tokens)

    def loss(inputs, labels):
        return model.loss(model(inputs, labels), tokens)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [f(inputs, labels) for f in (loss, compiled)]
    torch.testing.assert_close(*results)
    grads = [torch.autograd.grad(result, list(model.parameters())) for result in results]
    torch.testing.assert_close(*grads)


@pytest.mark.compile
def test_one_graph_with_dropped_classes_and_blocks():
    torch._dynamo.reset()
    quantizer = signs()
    model = VAR.of(quantizer, **SMALL, drop_path=0.5, checkpointing=True).train()
    inputs = teacher_forcing(quantizer, random_tokens(quantizer))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(inputs, torch.tensor([1, 2, -1])).isfinite().all()

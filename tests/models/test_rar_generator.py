import json
import math

import pytest
import torch

from xq.models import RAR, growing_guidance, random_share, rar_b, rar_l
from xq.quantizers import VQ, ProductQuantizer, Pyramid, ResidualQuantizer

CODES, CLASSES = 11, 5
SMALL = {"classes": CLASSES, "width": 16, "depth": 2, "heads": 2, "hidden": 24}
KINDS = {
    "grid": {"tokens": (3, 4)},
    "row": {"tokens": (7,), "code_shape": (2,)},
    "pyramid": {"tokens": ((1, 1), (1, 2), (2, 2)), "code_shape": (2,)},
}
ALL = pytest.mark.parametrize("kind", KINDS)


def small(kind="grid", **options):
    """A model whose weights are not those of the start, at which blocks do nothing."""
    model = RAR(CODES, **SMALL | KINDS[kind] | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 2 else 1)
    return model.eval()


def tokens_of(model, batch=3):
    return torch.randint(model.codebook_size, (batch, *model.token_shape, *model.code_shape))


def in_a_row(model, tokens):
    return tokens.reshape(len(tokens), model.num_tokens, *model.code_shape)


LABELS = torch.tensor([0, 4, 2])


@torch.no_grad()
def recomputed(model, labels, weights):
    """Greedy sampling without a cache: all that is there goes through the model for each token."""
    tokens = torch.zeros(len(labels), 0, *model.code_shape, dtype=torch.long)
    for weight in weights:
        # the last one is read by nothing
        longer = torch.cat([tokens, tokens.new_zeros(len(labels), 1, *model.code_shape)], dim=1)
        given = model(longer, labels)[:, -1]
        without = model(longer, torch.full_like(labels, -1))[:, -1]
        best = (without + weight * (given - without)).argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
    return tokens


@pytest.mark.parametrize(("make", "count"), [(rar_b, 260_923_648), (rar_l, 461_668_352)])
def test_published_sizes(make, count):
    """RAR counts 261 M and 461 M."""
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == count


@ALL
def test_shapes(kind):
    model = small(kind)
    tokens = tokens_of(model)
    order = model.orders(3, 1.0)
    logits = model(tokens, LABELS, order)
    assert logits.shape == (3, model.num_tokens, *model.code_shape, CODES)
    assert model.loss(logits, tokens, order).shape == ()
    assert model.generate(LABELS).shape == tokens.shape


@ALL
def test_raster_is_the_order_by_default(kind):
    model = small(kind)
    tokens, raster = tokens_of(model), model.orders(3, 0.0)
    assert torch.equal(raster, torch.arange(model.num_tokens).expand(3, -1))
    logits = model(tokens, LABELS)
    torch.testing.assert_close(model(tokens, LABELS, raster), logits)
    torch.testing.assert_close(model.loss(logits, tokens, raster), model.loss(logits, tokens))


@ALL
def test_a_token_sees_those_before_it_in_its_order(kind):
    model = small(kind)
    tokens, order = in_a_row(model, tokens_of(model, 1)), model.orders(1, 1.0)
    before = model(tokens, LABELS[:1], order)
    changed = tokens.clone()
    place = order[0, 2]
    changed[:, place] = (tokens[:, place] + 1) % CODES
    after = model(changed, LABELS[:1], order)
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before - after).abs().flatten(2).amax(2) > 1e-4)[:, 3:].all()


def test_a_token_knows_which_one_to_predict():
    model, tokens = small(), tokens_of(small(), 1)
    order = model.orders(1, 1.0)
    other = order.clone()
    # the same first four tokens, another fifth
    other[0, [4, 5]] = order[0, [5, 4]]
    one, two = (model(tokens, LABELS[:1], o) for o in (order, other))
    assert torch.equal(one[:, :4], two[:, :4])
    assert (one[:, 4] - two[:, 4]).abs().max() > 1e-3


def test_the_loss_is_that_of_the_ordered_tokens():
    model = small("row").double()
    tokens, order = tokens_of(model), model.orders(3, 1.0)
    logits = model(tokens, LABELS, order)
    total = 0.0
    for b in range(3):
        for i, place in enumerate(order[b]):
            for p in range(2):
                total -= logits[b, i, p].log_softmax(-1)[tokens[b, place, p]] / (3 * 7 * 2)
    torch.testing.assert_close(model.loss(logits, tokens, order), total)


@ALL
def test_sampling_with_a_cache_equals_recomputation(kind):
    model = small(kind)
    best = model.generate(LABELS, guidance=3.0, power=1.5, top_k=1)
    expected = recomputed(model, LABELS, growing_guidance(3.0, 1.5, model.num_tokens))
    assert len(expected.unique()) > 3
    assert torch.equal(in_a_row(model, best), expected)
    plain = recomputed(model, LABELS, [1.0] * model.num_tokens)
    assert torch.equal(in_a_row(model, model.generate(LABELS, top_k=1)), plain)


def test_orders():
    model = small()
    orders = model.orders(2000, 0.25, generator=torch.Generator().manual_seed(0))
    raster = torch.arange(12)
    assert torch.equal(orders.sort(dim=1).values, raster.expand(2000, -1))
    random = orders[(orders != raster).any(dim=1)]
    assert abs(len(random) / 2000 - 0.25) < 0.04
    # each token is as likely to be the first
    first = torch.bincount(model.orders(6000, 1.0)[:, 0], minlength=12) / 6000
    assert (first - 1 / 12).abs().max() < 0.02
    again = model.orders(2000, 0.25, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, orders)


def test_the_random_share_anneals():
    shares = [
        random_share(step, 125_000, 187_500) for step in (0, 125_000, 156_250, 187_500, 10**6)
    ]
    assert shares == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert [random_share(step, 3, 3) for step in (2, 3)] == [1.0, 0.0]


def test_the_class_is_left_out_at_times():
    model, tokens = small(dropout=0.0, class_drop=0.5), tokens_of(small(), 64)
    labels = torch.arange(64) % CLASSES
    with torch.no_grad():
        given, none = model(tokens, labels), model(tokens, torch.full_like(labels, -1))
        model.train()
        mixed = model(tokens, labels, generator=torch.Generator().manual_seed(1))
    is_given, is_none = ((mixed - x).abs().flatten(1).amax(1) < 1e-5 for x in (given, none))
    assert (is_given ^ is_none).all()
    assert 16 < int(is_none.sum()) < 48


def test_dropout_in_training_alone():
    model = small(dropout=0.5, class_drop=0.0)
    tokens = tokens_of(model)
    assert torch.equal(model(tokens, LABELS), model(tokens, LABELS))
    model.train()
    assert not torch.allclose(model(tokens, LABELS), model(tokens, LABELS))
    expected = model.eval().generate(LABELS, top_k=1)
    assert torch.equal(model.train().generate(LABELS, top_k=1), expected)
    assert model.training


def test_checkpointing_changes_nothing():
    model = small(dropout=0.3).train()
    tokens, order = tokens_of(model), model.orders(3, 1.0)
    found = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(0)
        model.loss(model(tokens, LABELS, order), tokens, order).backward()
        found.append([p.grad for p in model.parameters()])
    for plain, anew in zip(*found, strict=True):
        torch.testing.assert_close(plain, anew)


@ALL
def test_to_a_folder_and_back(kind, tmp_path):
    model = small(kind, dropout=0.2, class_drop=0.3)
    model.save_pretrained(tmp_path)
    again = RAR.from_pretrained(tmp_path)
    assert json.loads(json.dumps(again.config())) == json.loads(json.dumps(model.config()))
    tokens = tokens_of(model)
    assert torch.equal(again(tokens, LABELS), model(tokens, LABELS))


def test_at_the_start_blocks_do_nothing():
    model = RAR(CODES, 3, **SMALL).eval()
    x = torch.randn(2, 4, 16)
    assert torch.equal(model.blocks[0](x, torch.randn(2, 4, 16)), x)
    assert RAR(CODES, 3, **SMALL).hidden == 24
    assert RAR(CODES, 3, width=16, depth=1, heads=2).hidden == 64


def test_it_learns_in_any_order():
    torch.manual_seed(0)
    model = RAR(6, 3, classes=2, width=32, depth=2, heads=2, dropout=0.0)
    pictures, labels = torch.randint(6, (2, 3, 3)), torch.arange(2).repeat(8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        order = model.orders(16, 0.7)
        logits = model(pictures[labels], labels, order)
        loss = model.loss(logits, pictures[labels], order)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.generate(torch.tensor([0, 1]), top_k=1, guidance=2.0), pictures)
    order = model.eval().orders(2, 1.0)
    logits = model(pictures, torch.tensor([0, 1]), order)
    assert torch.equal(logits.argmax(-1), pictures.flatten(1).take_along_dim(order, 1))


def test_tokens_of_a_pyramid():
    inner = ResidualQuantizer(VQ(3, 8), multiscale=Pyramid((1, 2)), shared=True)
    quantizer = ProductQuantizer(inner, 2).eval()
    tokens = quantizer.encode(torch.randn(2, 2, 2, 6))
    model = RAR.of(quantizer, classes=2, width=8, depth=1, heads=2)
    labels = torch.tensor([0, 1])
    loss = model.loss(model(tokens, labels), tokens)
    torch.testing.assert_close(loss, torch.tensor(math.log(8)), atol=0.1, rtol=0)
    assert quantizer.decode(model.generate(labels)).shape == (2, 2, 2, 6)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(3, 11).long(), r"RAR needs an order as \(3, 12\) int64 numbers and all 12 t"),
        (torch.zeros(3, 12), r"got torch.float32 of shape \(3, 12\) and 12 tokens; RAR.orders"),
        (torch.zeros(12).long(), r"got torch.int64 of shape \(12,\)"),
        (torch.zeros(3, 12).bool(), r"got torch.bool of shape \(3, 12\)"),
        (torch.zeros(3, 12).long(), r"RAR needs an order with each of 0..11 once"),
        (torch.arange(1, 13).expand(3, -1), r"each of 0..11 once; RAR.orders makes them"),
    ],
    ids=["short", "float", "flat", "bool", "repeated", "out of range"],
)
def test_other_orders_are_refused(order, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        model(tokens_of(model), LABELS, order)


def test_an_order_needs_all_tokens():
    model = small()
    with pytest.raises(ValueError, match=r"all 12 tokens, got .* and 5 tokens"):
        model(in_a_row(model, tokens_of(model))[:, :5], LABELS, model.orders(3, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(3, 13).long(), LABELS), r"RAR expects tokens \(b, 3, 4\), or \(b"),
        (lambda m: m(torch.full((3, 12), 11), LABELS), r"RAR expects tokens in 0..10, got 11..11"),
        (lambda m: m(tokens_of(m), LABELS + 1), r"RAR has the classes 0..4, .* got labels 1..5"),
        (lambda m: m(tokens_of(m, 2), LABELS), r"RAR got tokens of 2 images and 3 labels"),
        (lambda m: m.generate(LABELS - 2), r"RAR has the classes 0..4, .* got labels -2..2"),
        (lambda m: m.generate(LABELS[0]), r"RAR expects labels as one class id an image"),
        (lambda m: m.generate(LABELS, guidance=-1.0), r"RAR needs a guidance above 0, got -1.0"),
        (lambda m: m.generate(LABELS, guidance=0.0), r"RAR needs a guidance above 0, got 0.0"),
        (lambda m: m.generate(LABELS, top_k=0), r"RAR needs top_k to be a positive integer, got 0"),
        (lambda m: m.generate(LABELS, power=0.0), r"growing_guidance needs a power above 0, got 0"),
        (lambda m: m.orders(2, 1.5), r"RAR.orders needs a share in 0..1, got 1.5"),
        (lambda _: random_share(0, 5, 4), r"random_share needs start <= end, got 5 and 4"),
        (lambda _: RAR(8, 2, **SMALL | {"heads": 3}), r"RAR needs `heads` to divide the width 16"),
        (lambda _: RAR(8, 2, **SMALL | {"hidden": 0}), r"RAR needs `hidden` to be a positive int"),
        (lambda _: RAR(8, 2, **SMALL, dropout=1.0), r"RAR needs 0 <= dropout < 1, got 1.0"),
        (lambda _: RAR(8, -2, **SMALL), r"RAR needs `tokens` as a side, a shape .*got -2"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


@pytest.mark.compile
def test_rar_compiles_whole():
    model = small(depth=1, dropout=0.0, class_drop=0.0)
    tokens, order = tokens_of(model), model.orders(3, 1.0)
    for training in (False, True):
        torch._dynamo.reset()
        model.train(training)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = model(tokens, LABELS, order)
        torch.testing.assert_close(compiled(tokens, LABELS, order), expected)
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        model.loss(run(tokens, LABELS, order), tokens, order).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)

import itertools
import json
import math

import pytest
import torch
from naive_llama import logits as naive_logits
from torch.utils.flop_counter import FlopCounterMode

from xq.models import AR, LinearDecoder, LinearEncoder, Tokenizer, ar_b, ar_l, ar_xl, ar_xxl
from xq.models.ar_blocks import ARBlock
from xq.models.cache import Cache
from xq.models.checkpoints.llamagen_generator import FORMAT
from xq.models.sampling import draw
from xq.quantizers import BSQ, FSQ, VQ, ProductQuantizer, Projected, Pyramid, ResidualQuantizer

CODES, CLASSES = 11, 5
SMALL = {"classes": CLASSES, "width": 16, "depth": 2, "heads": 2}
GRIDS = ((1, 1), (1, 2), (3, 4))
TEXT = {"text": (3, 6)}
KINDS = {
    "grid": {"tokens": (3, 4)},
    "row": {"tokens": (7,), "code_shape": (2,)},
    "pyramid": {"tokens": GRIDS, "code_shape": (3,)},
    "nest": {"tokens": (2, 2), "code_shape": (2, 3)},
    "text": {"tokens": (3, 2), **TEXT},
}
ALL = pytest.mark.parametrize("kind", KINDS)


def small(kind="grid", **options):
    """A model whose weights are not those of the start, at which all codes are alike."""
    model = AR(CODES, **SMALL | KINDS[kind] | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 2 else 1)
    return model.eval()


def labels_of(model, batch=3):
    if model.config()["text"]:
        return torch.randn(batch, *model.config()["text"])
    return torch.arange(batch) % CLASSES


def tokens_of(model, batch=3):
    return torch.randint(model.codebook_size, (batch, *model.token_shape, *model.code_shape))


def in_a_row(model, tokens):
    return tokens.reshape(len(tokens), model.num_tokens, *model.code_shape)


def unconditional(model, tokens, labels):
    """Logits without a condition; a text's is a parameter of its own."""
    if labels.is_floating_point():
        return model(tokens, model.condition.null.expand(len(labels), -1, -1))
    return model(tokens, torch.full_like(labels, -1))


@torch.no_grad()
def recomputed(model, labels, guidance, pick):
    """Sampling without a cache: all that is there goes through the model for each token."""
    tokens = torch.zeros(len(labels), 0, *model.code_shape, dtype=torch.long)
    for _ in range(model.num_tokens):
        # the last one is read by nothing
        longer = torch.cat([tokens, tokens.new_zeros(len(labels), 1, *model.code_shape)], dim=1)
        logits = model(longer, labels)[:, -1]
        if guidance != 1:
            without = unconditional(model, longer, labels)[:, -1]
            logits = without + guidance * (logits - without)
        tokens = torch.cat([tokens, pick(logits)[:, None]], dim=1)
    return tokens


@pytest.mark.parametrize(
    ("make", "count"),
    [(ar_b, 110_888_448), (ar_l, 342_910_976), (ar_xl, 774_699_520), (ar_xxl, 1_410_972_672)],
)
def test_published_sizes(make, count):
    """LlamaGen counts 111 M, 343 M, 775 M, 1.4 B."""
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == count
        assert make(8, (4, 2), code_shape=(2,)).token_shape == (4, 2)


@ALL
@pytest.mark.parametrize("batch", [0, 3])
def test_shapes(kind, batch):
    model = small(kind)
    tokens, labels = tokens_of(model, batch), labels_of(model, batch)
    logits = model(tokens, labels)
    assert logits.shape == (batch, model.num_tokens, *model.code_shape, CODES)
    assert model.loss(logits, tokens).shape == ()
    made = model.generate(labels)
    assert made.shape == tokens.shape
    assert made.dtype == torch.int64


def places_of(model):
    """By the definition: row and column on the finest grid, of a scale's cell its centre."""
    if model.grids:
        (height, width), found = model.grids[-1], []
        for h, w in model.grids:
            for i, j in itertools.product(range(h), range(w)):
                found.append(((i + 0.5) * height / h - 0.5, (j + 0.5) * width / w - 0.5))
        return found
    return list(itertools.product(*(range(n) for n in model.token_shape)))


@ALL
def test_logits_and_gradients_are_those_of_a_plain_llama(kind):
    model = small(kind).double()
    tokens, labels = tokens_of(model), labels_of(model)
    if labels.is_floating_point():
        labels = labels.double()
    own = {key: t for key, t in model.state_dict(keep_vars=True).items() if key != "scale.weight"}
    state = {
        key: tensor.detach().clone().requires_grad_()
        for key, tensor in FORMAT.table({}).revert(own).items()
    }
    if "text" in KINDS[kind]:
        names = (f"cls_embedding.cap_proj.fc{i}.weight" for i in (1, 2))
        first, second = (state[name] for name in names)
        prefix = torch.nn.functional.gelu(labels @ first.T, approximate="tanh") @ second.T
    else:
        prefix = state["cls_embedding.embedding_table.weight"][labels][:, None]
    flat = in_a_row(model, tokens).flatten(2) if model.code_shape else tokens.flatten(1)[..., None]
    x = sum(
        state["tok_embeddings.weight"][p * CODES + flat[:, :-1, p]] for p in range(flat.shape[2])
    )
    if model.grids:
        scales = [k for k, (h, w) in enumerate(model.grids) for _ in range(h * w)]
        x = x + model.scale.weight.detach()[torch.tensor(scales)][:-1]
    places = [None] * prefix.shape[1] + places_of(model)[:-1]
    theirs = naive_logits(torch.cat([prefix, x], dim=1), state, 2, 2, places)
    theirs = theirs[:, prefix.shape[1] - 1 :].unflatten(-1, (*model.code_shape, CODES))
    ours = model(tokens, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert theirs.std() > 0.1

    model.loss(ours, tokens).backward()
    (-theirs.log_softmax(-1).flatten(0, -2)[range(flat.numel()), flat.flatten()].mean()).backward()
    for key, tensor in FORMAT.table({}).convert(state).items():
        if key != "condition.null":
            gradient = model.get_parameter(key).grad
            torch.testing.assert_close(gradient, _grad_of(state, key), atol=1e-10, rtol=1e-8)
            assert gradient.abs().max() > 1e-6, tensor.shape


def _grad_of(state, key):
    return FORMAT.table({}).convert({k: t.grad for k, t in state.items() if t.grad is not None})[
        key
    ]


@ALL
def test_a_token_sees_those_before_it(kind):
    model = small(kind)
    labels = labels_of(model, 1)
    tokens = in_a_row(model, tokens_of(model, 1))
    before = model(tokens, labels)
    changed = tokens.clone()
    changed[:, 2] = (tokens[:, 2] + 1) % CODES
    after = model(changed, labels)
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before - after).abs().flatten(2).amax(2) > 1e-4)[:, 3:].all()
    # leading tokens alone give their part
    torch.testing.assert_close(model(tokens[:, :4], labels), before[:, :4])


@ALL
@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.5])
def test_sampling_with_a_cache_equals_recomputation(kind, guidance):
    model = small(kind)
    labels = labels_of(model)
    best = model.generate(labels, guidance=guidance, top_k=1)
    expected = recomputed(model, labels, guidance, lambda logits: logits.argmax(-1))
    assert len(expected.unique()) > 3
    assert torch.equal(in_a_row(model, best), expected)


@torch.no_grad()
def test_sampling_with_a_cache_equals_recomputation_at_256_tokens():
    model, labels = small(tokens=16, depth=1), torch.tensor([2, 0])
    one, two = (torch.Generator().manual_seed(7) for _ in range(2))
    options = {"top_k": 8, "top_p": 0.96}
    made = model.generate(labels, guidance=2.0, generator=one, **options)
    expected = recomputed(model, labels, 2.0, lambda x: draw(x, generator=two, **options))
    assert made.shape == (2, 16, 16)
    assert torch.equal(made.flatten(1), expected)


def test_guidance_changes_what_is_made():
    model, labels = small(), torch.arange(CLASSES)
    plain = model.generate(labels, top_k=1)
    assert not torch.equal(plain, model.generate(labels, guidance=4.0, top_k=1))
    assert torch.equal(plain, model.generate(labels, guidance=1.0, top_k=1))
    none = torch.full_like(labels, -1)
    assert len(model.generate(none, top_k=1).unique(dim=0)) == 1
    assert torch.equal(model.generate(none, top_k=1, guidance=3.0), model.generate(none, top_k=1))


@torch.no_grad()
def test_draws_have_the_model_s_probabilities():
    model, labels = small("row", tokens=(2,)), torch.zeros(15_000, dtype=torch.long)
    made = model.generate(labels, generator=torch.Generator().manual_seed(0))
    pairs = made[..., 0] * CODES + made[..., 1]
    frequent = torch.bincount(pairs[:, 0]).argmax()
    after = made[pairs[:, 0] == frequent]
    assert len(after) > 500
    for position, rows in enumerate((made, after)):
        first, second = model(rows[:1], labels[:1])[0, position].softmax(-1)
        # branches are drawn independently of each other
        expected = (first[:, None] * second).flatten()
        both = rows[:, position, 0] * CODES + rows[:, position, 1]
        share = torch.bincount(both, minlength=CODES**2) / len(rows)
        assert (share - expected).abs().max() < 3 * (expected.max() / len(rows)) ** 0.5 + 1e-3


def test_a_generator_decides_alone():
    model, labels = small("pyramid"), labels_of(small("pyramid"))
    state = torch.random.get_rng_state()
    one, two, other = (
        model.generate(labels, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_filters_reach_the_draws():
    model, labels = small(), torch.zeros(500, dtype=torch.long)
    seen = {
        name: model.generate(labels, **options)[:, 0, 0].unique().numel()
        for name, options in {
            "all": {"temperature": 3.0},
            "top_k": {"top_k": 2, "temperature": 3.0},
            "top_p": {"top_p": 1e-6},
            "cold": {"temperature": 1e-4},
        }.items()
    }
    assert seen["all"] > 5
    assert seen["top_k"] == 2
    assert seen["top_p"] == seen["cold"] == 1


def test_sampling_ignores_the_mode_and_leaves_it():
    model = small(dropout=0.5, class_drop=0.9, drop_path=0.5)
    expected = model.generate(torch.arange(3), top_k=1)
    model.train()
    model.norm.eval()
    assert torch.equal(model.generate(torch.arange(3), top_k=1), expected)
    assert model.training
    assert not model.norm.training
    assert all(block.training for block in model.blocks)


def test_sampling_keeps_one_room_for_all_keys(monkeypatch):
    rooms, lengths, extend = set(), [], Cache.extend

    def watched(cache, k, v):
        found = extend(cache, k, v)
        rooms.add(cache._room.data_ptr())
        lengths.append(k.shape[2])
        assert cache._room.shape[3] == cache.length == 12
        assert all(part.untyped_storage().data_ptr() == cache._room.data_ptr() for part in found)
        return found

    monkeypatch.setattr(Cache, "extend", watched)
    model = small()
    model.generate(torch.arange(3))
    assert len(rooms) == model.depth
    assert lengths == [1] * 12 * model.depth


def test_a_cache_saves_nearly_all_work():
    model = AR(CODES, 7, classes=CLASSES, width=16, depth=1, heads=2).eval()
    labels = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as cached:
        model.generate(labels)
    with FlopCounterMode(display=False) as anew:
        recomputed(model, labels, 1.0, lambda logits: logits.argmax(-1))
    assert anew.get_total_flops() > 20 * cached.get_total_flops()


def test_the_condition_is_left_out_at_times():
    model, tokens = small(dropout=0.0, class_drop=0.5), tokens_of(small(), 64)
    labels = torch.arange(64) % CLASSES
    with torch.no_grad():
        given, none = model(tokens, labels), unconditional(model, tokens, labels)
        model.train()
        mixed = model(tokens, labels, generator=torch.Generator().manual_seed(1))
        again = model(tokens, labels, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mixed, again)
    is_given, is_none = ((mixed - x).abs().flatten(1).amax(1) < 1e-5 for x in (given, none))
    assert (is_given ^ is_none).all()
    assert 16 < int(is_none.sum()) < 48


def test_texts_are_left_out_at_times():
    model = small("text", dropout=0.0, class_drop=1 - 1e-9).train()
    tokens, text = tokens_of(model), labels_of(model)
    torch.testing.assert_close(model(tokens, text), unconditional(model.eval(), tokens, text))
    (model.train()(tokens, text).sum()).backward()
    assert model.condition.null.grad.abs().max() > 0


def test_dropout_in_training_alone():
    model = small(dropout=0.5, class_drop=0.0)
    tokens, labels = tokens_of(model), labels_of(model)
    assert torch.equal(model(tokens, labels), model(tokens, labels))
    model.train()
    assert not torch.allclose(model(tokens, labels), model(tokens, labels))


@torch.no_grad()
def test_drop_path_skips_samples():
    block = ARBlock(16, 2, 0.0, 0.75)
    x = torch.ones(4000, 1, 16)
    kept = block._skipping(x)[:, 0]
    assert (kept == kept[:, :1]).all()
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert abs(kept.mean() - 1) < 0.15
    assert torch.equal(block.eval()._skipping(x), x)


def test_drop_path_grows_with_depth():
    model = AR(CODES, 2, **SMALL | {"depth": 3}, drop_path=0.2)
    assert [round(block.drop_path, 6) for block in model.blocks] == [0.0, 0.1, 0.2]


@pytest.mark.parametrize("kind", ["grid", "pyramid"])
def test_checkpointing_changes_nothing(kind):
    model = small(kind, dropout=0.3, drop_path=0.4).train()
    tokens, labels = tokens_of(model), labels_of(model)
    found = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(0)
        model.loss(model(tokens, labels), tokens).backward()
        found.append([p.grad for p in model.parameters()])
    for plain, anew in zip(*found, strict=True):
        torch.testing.assert_close(plain, anew)


@ALL
def test_to_a_folder_and_back(kind, tmp_path):
    model = small(kind, dropout=0.2, drop_path=0.1, class_drop=0.3)
    model.save_pretrained(tmp_path)
    again = AR.from_pretrained(tmp_path)
    assert json.loads(json.dumps(again.config())) == json.loads(json.dumps(model.config()))
    tokens, labels = tokens_of(model), labels_of(model)
    assert torch.equal(again(tokens, labels), model(tokens, labels))


def test_at_the_start_all_codes_are_alike():
    model = AR(CODES, 3, **SMALL)
    loss = model.loss(model(tokens_of(model), labels_of(model)), tokens_of(model))
    torch.testing.assert_close(loss, torch.tensor(math.log(CODES)))
    # normal, of 0.02
    assert 0.018 < AR(400, 3, **SMALL).embedding.weight.std() < 0.022


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = small("text").to(dtype)
    logits = model(tokens_of(model), labels_of(model))
    assert logits.dtype == dtype
    assert model.loss(logits, tokens_of(model)).dtype == max(
        dtype, torch.float32, key=lambda d: d.itemsize
    )
    assert model.generate(labels_of(model), guidance=2.0).shape == (3, 3, 2)


def test_autocast():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        made = model.generate(torch.arange(3), guidance=2.0, top_k=1)
        logits = model(made, torch.arange(3))
    assert made.shape == (3, 3, 4)
    torch.testing.assert_close(logits.float(), model(made, torch.arange(3)), atol=0.5, rtol=0.1)


def test_it_learns_what_it_is_shown():
    """Two classes of one picture each; branches must not be mixed up."""
    torch.manual_seed(0)
    model = AR(6, (2, 3), code_shape=(2,), classes=2, width=16, depth=2, heads=2)
    pictures = torch.randint(6, (2, 2, 3, 2))
    optimizer, labels = torch.optim.AdamW(model.parameters(), 1e-2), torch.arange(2).repeat(8)
    for _ in range(60):
        loss = model.loss(model(pictures[labels], labels), pictures[labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.generate(torch.tensor([0, 1]), top_k=1, guidance=2.0), pictures)
    assert loss < 0.5


def pyramid():
    return ResidualQuantizer(VQ(3, 8), multiscale=Pyramid((1, 2, 3)), shared=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VQ(6, 8),
        lambda: FSQ((4, 2)),
        lambda: BSQ(6),
        lambda: ResidualQuantizer(VQ(6, 8), 3),
        lambda: ProductQuantizer(VQ(3, 8), 2),
        lambda: ProductQuantizer(ResidualQuantizer(VQ(3, 8), 2), 2),
        pyramid,
        lambda: ProductQuantizer(pyramid(), 2),
        lambda: Projected(ProductQuantizer(pyramid(), 2), 5),
    ],
    ids=["vq", "fsq", "bsq", "rvq", "pq", "nest", "pyramid", "pyramids", "wrapped"],
)
def test_tokens_of_any_tokenizer(make):
    quantizer = make()
    encoder, decoder = LinearEncoder(quantizer.dim, 2), LinearDecoder(quantizer.dim, 2)
    tokenizer = Tokenizer(encoder, quantizer, decoder).eval()
    images, labels = torch.rand(2, 3, 6, 6) * 2 - 1, torch.tensor([1, 0])
    tokens = tokenizer.encode(images)
    model = AR.of(quantizer, 3, classes=2, width=8, depth=1, heads=2)
    loss = model.loss(model(tokens, labels), tokens)
    torch.testing.assert_close(loss, torch.tensor(math.log(quantizer.codebook_size)))
    made = model.generate(labels)
    assert made.shape == tokens.shape
    assert tokenizer.decode(made).shape == images.shape


def test_of_takes_quantizers_alone():
    with pytest.raises(ValueError, match=r"AR.of needs a quantizer, got Linear; of a tokenizer"):
        AR.of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 3, 5).long(), r"AR expects tokens \(b, 3, 4\), or \(b, t\) .* 12, got .*5"),
        (torch.zeros(2, 13).long(), r"the first t of 12, got shape \(2, 13\); build it with"),
        (torch.zeros(2, 0).long(), r"got shape \(2, 0\)"),
        (torch.zeros(12).long(), r"got shape \(12,\)"),
        (
            torch.zeros(2, 3, 4, 2).long(),
            r"got shape \(2, 3, 4, 2\); .* the quantizer's code_shape",
        ),
        (torch.full((2, 3, 4), CODES), r"tokens in 0..10, got 11..11; .* of another size"),
        (torch.full((2, 3, 4), -1), r"tokens in 0..10, got -1..-1"),
        (torch.zeros(2, 3, 4), r"integer tokens, got torch.float32"),
        (torch.zeros(2, 3, 4).bool(), r"integer tokens, got torch.bool"),
        (torch.zeros(3, 3, 4).long(), r"AR got tokens of 3 images and 2 labels"),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) if torch.is_tensor(value) else "",
)
def test_other_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        small()(tokens, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, CLASSES]), r"AR has the classes 0..4, and -1 for none, got labels 0..5"),
        (torch.tensor([0, -2]), r"got labels -2..0; build it with as many `classes`"),
        (torch.zeros(2), r"one class id an image, integers of shape \(b,\), got torch.float32"),
        (torch.zeros(2, 1).long(), r"got torch.int64 of shape \(2, 1\)"),
    ],
    ids=["large", "small", "float", "axis"],
)
def test_other_labels_are_refused(labels, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        model(tokens_of(model, 2), labels)
    with pytest.raises(ValueError, match=message):
        model.generate(labels)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 6), (2, 6)])
def test_other_texts_are_refused(shape):
    with pytest.raises(ValueError, match=r"texts as \(b, 3, 6\) floating.*pad or cut"):
        small("text").generate(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 0.0}, r"AR needs a guidance above 0, got 0"),
        ({"temperature": 0.0}, r"AR needs a temperature above 0"),
        ({"top_k": 0}, r"AR needs top_k to be a positive integer"),
        ({"top_p": 1.5}, r"AR needs top_p above 0 and up to 1"),
    ],
)
def test_sampling_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        small().generate(torch.zeros(1, dtype=torch.long), **options)


def test_logits_of_other_tokens_are_refused():
    model = small()
    with pytest.raises(ValueError, match=r"AR.loss expects .* \(3, 12, 11\), got \(3, 2, 11\)"):
        model.loss(torch.zeros(3, 2, CODES), tokens_of(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, r"AR needs `codebook_size` to be a positive integer, got 0"),
        ({"codebook_size": 2**36}, r"AR would need a softmax over 68719476736 codes; .*Product"),
        ({"tokens": (1, 2, 3)}, r"AR needs `tokens` as a side, a shape .*got \(1, 2, 3\)"),
        ({"tokens": ((1, 2), (0, 3))}, r"AR needs `tokens` as .*grids; got \(\(1, 2\), \(0, 3\)\)"),
        ({"tokens": 0}, r"AR needs `tokens` as a side"),
        ({"tokens": ()}, r"AR needs `tokens` as a side"),
        ({"code_shape": (0,)}, r"AR needs `code_shape` to be a positive integer, got 0"),
        ({"classes": 0}, r"AR needs `classes` to be a positive integer"),
        ({"text": (3,)}, r"AR needs `text` as \(length, channels\) .*got \(3,\)"),
        ({"heads": 3}, r"AR needs `heads` to divide the width 16, got 3"),
        ({"heads": 8}, r"AR needs heads of a multiple of 4 channels, .*8 heads of 2"),
        ({"depth": 0}, r"AR needs `depth` to be a positive integer"),
        ({"dropout": 1.0}, r"AR needs 0 <= dropout < 1, got 1.0"),
        ({"drop_path": -0.1}, r"AR needs 0 <= drop_path < 1, got -0.1"),
        ({"class_drop": 1.5}, r"AR needs 0 <= class_drop < 1, got 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AR(**{"codebook_size": CODES} | SMALL | options)


def test_nothing_is_looked_at_without_data():
    with torch.device("meta"):
        model = AR(CODES, 3, **SMALL)
        logits = model(torch.zeros(2, 3, 3).long(), torch.zeros(2).long())
    assert logits.shape == (2, 9, CODES)


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["row", "pyramid"])
def test_ar_compiles_whole(kind):
    model = small(kind, depth=1, dropout=0.0, class_drop=0.0)
    tokens, labels = tokens_of(model), labels_of(model)
    for training in (False, True):
        torch._dynamo.reset()
        model.train(training)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens, labels), model(tokens, labels))
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        model.loss(run(tokens, labels), tokens).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.compile
def test_compiles_with_all_that_is_dropped():
    torch._dynamo.reset()
    model = small(dropout=0.2, class_drop=0.5, drop_path=0.2, checkpointing=True, depth=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = tokens_of(model)
    model.loss(compiled(tokens, labels_of(model)), tokens).backward()
    assert model.embedding.weight.grad.abs().max() > 0

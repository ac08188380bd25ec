"""Guidance, filters and draws against plain loops and against frequencies."""

import pytest
import torch

from xq.models.sampling import check_sampling, draw, filtered, guided

FILTERS = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_k": 7, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.999},
    {"top_p": 1e-9},
    {"top_k": 40, "top_p": 1.0},
    {},
]


def naive(row, top_k=None, top_p=None):
    """The codes that stay, by a loop over the sorted probabilities."""
    order = sorted(range(len(row)), key=lambda code: -row[code])[:top_k]
    weights = torch.tensor([row[code] for code in order], dtype=torch.float64).softmax(0).tolist()
    kept, total = set(), 0.0
    for code, weight in zip(order, weights, strict=True):
        if kept and total >= (2 if top_p is None or top_p == 1 else top_p):
            break
        kept.add(code)
        total += weight
    return kept


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters(options):
    logits = 3 * torch.randn(5, 4, 17)
    got = filtered(logits, **options)
    for row, kept in zip(logits.flatten(0, 1).tolist(), got.flatten(0, 1), strict=True):
        stay = naive(row, **options)
        assert set(kept.isfinite().nonzero()[:, 0].tolist()) == stay
        assert all(kept[code] == row[code] for code in stay)


def test_filters_leave_their_input_alone():
    logits = torch.randn(3, 9)
    before = logits.clone()
    filtered(logits, top_k=2, top_p=0.5)
    draw(logits, top_k=2, top_p=0.5, temperature=0.7)
    assert torch.equal(logits, before)


def test_ties_stay_together():
    logits = torch.tensor([1.0, 3.0, 1.0, 0.0])
    assert filtered(logits, top_k=2).isfinite().tolist() == [True, True, True, False]


def test_codes_ruled_out_before_stay_out():
    logits = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf])
    for options in FILTERS:
        assert not filtered(logits, **options)[[1, 3]].isfinite().any()
        assert draw(logits.expand(200, 4), **options).unique().tolist() in ([0, 2], [2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_at_least_float32(dtype):
    logits = torch.randn(4, 300).to(dtype)
    wide = logits if dtype == torch.float64 else logits.float()
    assert torch.equal(filtered(logits, top_p=0.9), filtered(wide, top_p=0.9))
    assert guided(logits, logits, 2.0).dtype == wide.dtype


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_frequencies(temperature):
    logits = torch.tensor([0.0, 1.0, -1.5, 2.0, -9.0])
    count = 200_000
    drawn = draw(logits.expand(count, 5), temperature=temperature, top_k=4)
    want = filtered(logits / temperature, top_k=4).softmax(0)
    got = drawn.bincount(minlength=5) / count
    assert not got[4]
    # five standard deviations
    assert ((got - want).abs() <= 5 * (want * (1 - want) / count).sqrt()).all()


def test_rows_are_drawn_by_themselves():
    drawn = draw(torch.zeros(2, 20_000, 2)).float()
    assert torch.corrcoef(drawn)[0, 1].abs() < 0.05
    assert drawn[:, 1:].mul(drawn[:, :-1]).mean().sub(0.25).abs() < 0.02


def test_no_hopeless_code_wins():
    # noise of exactly zero, which torch may draw, would let any code win
    logits = torch.full((2000, 4096), -60.0)
    logits[:, 7] = 0
    assert (draw(logits) == 7).all()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_noise_is_bounded(monkeypatch, noise):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator=None: self.fill_(noise))
    assert draw(torch.tensor([-torch.inf, 0.0])) == 1
    assert draw(torch.tensor([-60.0, 0.0])) == 1


def test_greedy_draws_nothing():
    logits = torch.randn(6, 11)
    before = torch.get_rng_state()
    assert torch.equal(draw(logits, top_k=1, top_p=0.3, temperature=9.0), logits.argmax(-1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_decides_alone():
    logits, before = torch.randn(50, 30), torch.get_rng_state()
    first, again, other = (
        draw(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_guidance():
    c, u = torch.randn(2, 3, 7)
    assert torch.equal(guided(c, u, 1.0), c)
    torch.testing.assert_close(guided(c, u, 2.5), u + 2.5 * (c - u))
    torch.testing.assert_close(guided(c, u, 0.5), (c + u) / 2)
    # VAR writes it with what exceeds 1
    torch.testing.assert_close(guided(c, u, 1 + 1.5), (1 + 1.5) * c - 1.5 * u)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 0.0}, "list needs a guidance above 0, got 0.0; 1 is none"),
        ({"guidance": -1.5}, "got -1.5; 1 is none, and what VAR calls cfg is guidance - 1"),
        ({"guidance": float("nan")}, "guidance above 0, got nan"),
        ({"guidance": float("inf")}, "guidance above 0, got inf"),
        ({"temperature": 0.0}, "temperature above 0, got 0.0; top_k=1 takes the most probable"),
        ({"top_k": 0}, "top_k to be a positive integer, got 0; None keeps all codes"),
        ({"top_k": -3}, "got -3"),
        ({"top_k": True}, "got True"),
        ({"top_p": 0.0}, "top_p above 0 and up to 1, got 0.0; None keeps all"),
        ({"top_p": 1.1}, "got 1.1"),
        ({"top_p": -0.5}, "got -0.5"),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_sampling([], **options)


def test_accepted():
    check_sampling([], guidance=0.5, temperature=1.3, top_k=1, top_p=1.0)
    check_sampling([])


@pytest.mark.compile
def test_one_graph():
    torch._dynamo.reset()

    def step(c, u):
        return draw(guided(c, u, 2.0), top_k=5, top_p=0.9, temperature=0.8)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    c, u = torch.randn(2, 4, 9)
    got = compiled(c, u)
    assert (
        filtered(guided(c, u, 2.0) / 0.8, top_k=5, top_p=0.9).gather(1, got[:, None]) > -9e9
    ).all()

"""Every benchmark runs, writes what it promises, and gives no number for a broken kernel."""

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="the pictures of the bench extra")

from benchmarks import entropy, generate, harness, imports, lookup, losses, report, step, trees
from benchmarks.asked import BEST_PEER, Faster, OfLimit, Smaller, Within, judged
from benchmarks.cases import XQ, Case, Contender, Red, Spec
from benchmarks.gates import Nearest, check_close, check_finite, gradient
from benchmarks.limits import Limits, Yardsticks
from benchmarks.memory import FreshProcesses
from benchmarks.timing import Times, interleaved, rounds_each, schedule
from benchmarks.words import memory, ratio, share, time

MODULES = {m.BENCHMARK.name: m for m in (lookup, entropy, step, trees, losses, generate, imports)}
FIELDS = {"benchmark", "title", "device", "quick", "machine", "versions", "commit", "dirty"}
FIELDS |= {"date", "lookup_override", "cases", "asked"}
CASE = {"name", "sizes", "sweeps", "limit", "best_peer", "ahead_of_best_peer", "skipped"}
CASE |= {"contenders"}
CONTENDER = {"name", "ours", "median", "spread", "times_xq", "of_limit", "peak_bytes", "checked"}
CONTENDER |= {"seconds", "calls"}
MIB = 1 << 20


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """`--threads` is for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fresh() -> Iterator[FreshProcesses]:
    """One process to fork from, since it takes seconds to start."""
    shared = FreshProcesses()
    yield shared
    shared.close()


@pytest.fixture
def quick(fresh, tmp_path, monkeypatch):
    """`quick(name)` runs a benchmark's command in `tmp_path` and returns its exit code."""
    monkeypatch.setattr(harness, "FreshProcesses", lambda: fresh)
    monkeypatch.setattr(fresh, "close", lambda: None)
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    return lambda name: MODULES[name].main(options)


@pytest.mark.parametrize("name", MODULES)
def test_runs_and_writes(quick, tmp_path, capsys, name):
    assert quick(name) == 0

    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.png"}
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document.keys() >= FIELDS
    assert document["benchmark"] == name
    assert document["machine"]["threads"] == 1
    assert document["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert document["cases"]
    for case in document["cases"]:
        assert case.keys() == CASE
        first, *others = case["contenders"]
        assert (first["name"], first["ours"], first["times_xq"]) == (XQ, True, 1.0)
        for c in (first, *others):
            assert c.keys() == CONTENDER
            assert c["median"] > 0
            assert len(c["seconds"]) == 1
            # the smallest ViT of a discriminator has 22 M parameters
            if name != "imports":
                assert 0 <= c["peak_bytes"] < (256 if name == "losses" else 64) * MIB
    with Image.open(tmp_path / f"{name}.png") as picture:
        picture.load()
        assert picture.width > 1000

    said = capsys.readouterr().out
    assert max(map(len, said.replace(str(tmp_path), "").splitlines())) <= 100
    for line in document["asked"]:
        assert line["work"] in said


@pytest.mark.filterwarnings("ignore:'benchmarks.step' found in sys.modules:RuntimeWarning")
def test_starts_from_the_command_line(quick, tmp_path, monkeypatch):
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step.py", *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("benchmarks.step", run_name="__main__")
    assert end.value.code == 0
    case = json.loads((tmp_path / "step.json").read_text())["cases"][0]
    if sys.platform == "linux":
        assert all(c["peak_bytes"] is not None for c in case["contenders"])


def wrong_indices(x, codes, *args, **kwargs):
    """As if a kernel had forgotten one code."""
    from xq.quantizers.lookup import nearest

    found = nearest(x, codes, *args, **kwargs)
    other = (found + 1) % (int(found.max()) + 1)
    return torch.where(found == found.flatten()[0], other, found)


def wrong_entropy(logits, group_size=None, **options):
    """As if one bit counted twice."""
    from xq.quantizers.entropy import sign_entropy

    exact = sign_entropy(logits, group_size, **options)
    return exact._replace(per_token=exact.per_token * 1.001)


def wrong_modules():
    """As if the core needed an extra."""
    return [("xq.metrics", 0.001), ("faiss.loader", 0.2), ("xq", 0.001)]


def wrong_draws(logits, **options):
    """As if recomputation drew from other logits than those that were kept."""
    from xq.models.sampling import draw

    return (draw(logits, **options) + 1) % logits.shape[-1]


def wrong_distances(image, target, trunk, heads):
    return (image - target).square().mean((1, 2, 3))


BROKEN = {
    "lookup": ("benchmarks.lookup.nearest", wrong_indices, "misses the nearest code in"),
    "step": ("xq.quantizers.vq.nearest", wrong_indices, "misses the nearest code in"),
    "trees": ("xq.quantizers.vq.nearest", wrong_indices, "other indices than the loop"),
    "entropy": ("xq.quantizers.binary.sign_entropy", wrong_entropy, "per_token is off by 0.001"),
    "losses": ("xq.losses.perceptual.lpips", wrong_distances, "the distance is off by"),
    "generate": ("benchmarks.generate.draw", wrong_draws, "of the tokens differ from those of"),
    "imports": ("benchmarks.imports.own_modules", wrong_modules, "import xq imports faiss, which"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_broken_kernel_gives_no_number(quick, tmp_path, capsys, monkeypatch, name):
    target, broken, message = BROKEN[name]
    monkeypatch.setattr(target, broken)
    assert quick(name) == 1
    said = capsys.readouterr()
    assert "RED, no numbers: " in said.err
    assert message in said.err
    assert "median" not in said.out
    assert "Asked" not in said.out
    assert not list(tmp_path.iterdir())


def test_a_contender_that_cannot_take_part_is_named(monkeypatch):
    monkeypatch.setattr("benchmarks.peers.find_spec", lambda module: None)
    monkeypatch.setattr("benchmarks.peers.room", lambda device: 0)
    case = lookup.lookup_case(32, 16, 4, device="cpu")
    assert case.skipped[lookup.KNN] == "not installed (pip install faiss-cpu)"
    assert case.skipped["vqp"] == "not installed (pip install vector-quantize-pytorch)"
    assert XQ in {c.name for c in case.contenders}
    case = entropy.entropy_case(32, 4, device="cpu")
    assert case.skipped[entropy.SOFTMAX] == "it would take about < 1 MiB"


def test_rounds_are_fair_and_not_too_few():
    assert rounds_each([0.02, 0.1, 0.4, 4.0], budget=8) == [25, 20, 5, 3]
    assert rounds_each([], budget=8) == []


def test_nobody_always_follows_the_same():
    turns = list(schedule([20, 20, 20]))
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    followed = {pair for turn in turns for pair in pairwise(turn)}
    assert len(followed) == 6
    assert {turn[0] for turn in turns} == {0, 1, 2}
    assert turns == list(schedule([20, 20, 20]))


def test_slow_contenders_stay_interleaved():
    rounds = [25, 5, 3]
    turns = list(schedule(rounds))
    assert len(turns) == 25
    for i, count in enumerate(rounds):
        present = [r for r, turn in enumerate(turns) if i in turn]
        assert len(present) == count
        gaps = {b - a for a, b in pairwise(present)}
        assert max(gaps) - min(gaps) <= 1
    assert list(schedule([])) == []


def test_interleaved_takes_samples_in_turn():
    taken = []

    def sampler(name):
        def sample():
            taken.append(name)
            return float(len(taken))

        return sample

    samples = interleaved({"a": sampler("a"), "b": sampler("b")}, [2, 2])
    assert sorted(taken[:2]) == sorted(taken[2:]) == ["a", "b"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}
    assert [taken[int(value) - 1] for value in samples["a"]] == ["a", "a"]


def test_median_and_spread():
    times = Times([5.0, 1.0, 4.0, 2.0, 3.0])
    assert times.median == 3.0
    assert times.spread == pytest.approx((4 - 2) / 2 / 3)
    assert Times([2.0]).spread is None


def summary(**medians):
    """A case of `xq` and peers with these medians, in seconds, whose limit is half a second."""
    case = Case(lambda results: {})
    names = {XQ: medians.pop("xq"), **medians}
    case.contenders = [Contender(name, lambda: None, name == XQ) for name in names]
    times = {name: Times([seconds]) for name, seconds in names.items()}
    peaks = dict.fromkeys(names, 3 * MIB)
    spec = Spec("work", lambda: case, {}, {})
    case.flops = 50.0
    return harness.summary(spec, case, {}, times, peaks, Limits(flops=100.0, bandwidth=10.0))


def test_ratios():
    case = summary(xq=2.0, fast=3.0, slow=8.0)
    assert case["best_peer"] == "fast"
    assert case["ahead_of_best_peer"] == 1.5
    assert [c["times_xq"] for c in case["contenders"]] == [1.0, 1.5, 4.0]
    assert [c["of_limit"] for c in case["contenders"]] == [0.25, 0.5 / 3, 0.0625]
    assert summary(xq=1.0)["best_peer"] is None


@pytest.mark.parametrize(
    ("asked", "measured", "met"),
    [
        (Faster("work", 4, "slow"), "4.00x", True),
        (Faster("work", 4.1, "slow"), "4.00x", False),
        (Faster("work", 1.5, BEST_PEER), "1.50x", True),
        (Faster(None, 1.2, "fast"), "1.50x (work)", True),
        (Faster("work", 1.2, "absent"), None, None),
        (Faster("other work", 1.2, "fast"), None, None),
        (Faster("work", 1, "slow", ours="fast"), "2.67x", True),
        (OfLimit("work", 0.6), "25 %", False),
        (Smaller("work", 3 * MIB), "3.00 MiB", True),
        (Smaller("work", 2 * MIB), "3.00 MiB", False),
        (Within("work", 2.0), "2.00 s", True),
        (Within("work", 0.1), "2.00 s", False),
    ],
)
def test_asked_beside_measured(asked, measured, met):
    line = judged(asked, [summary(xq=2.0, fast=3.0, slow=8.0)])
    assert (line["measured"], line["met"]) == (measured, met)


def test_of_all_cases_the_worst_counts():
    cases = [summary(xq=1.0, peer=3.0), summary(xq=1.0, peer=2.0) | {"name": "the hard one"}]
    assert judged(Faster(None, 1, "peer"), cases)["measured"] == "2.00x (the hard one)"


def test_the_limit_is_the_larger_of_two():
    rates = Limits(flops=100.0, bandwidth=10.0)
    assert rates.seconds(200.0, 10.0) == (2.0, "product")
    assert rates.seconds(200.0, 50.0) == (5.0, "memory")


def test_the_nearest_are_told_from_others():
    torch.manual_seed(0)
    x, codes = torch.randn(300, 4), torch.randn(20, 4)
    order = torch.cdist(x.double(), codes.double()).argsort(1)
    truth = Nearest(x, codes)
    assert truth.hits(order[:, 0])[0].all()
    assert not truth.hits(order[:, 1])[0].any()
    assert not truth.hits(torch.full((300,), 20))[0].any()
    with pytest.raises(Red, match=r"kernel misses the nearest code in 1 of 300 rows; row 7 names"):
        truth.check("kernel", torch.where(torch.arange(300) == 7, order[:, 1], order[:, 0]))


def test_several_nearest_in_any_order_but_each_once():
    torch.manual_seed(0)
    x, codes = torch.randn(30, 4), torch.randn(20, 4)
    order = torch.cdist(x.double(), codes.double()).argsort(1)
    truth = Nearest(x, codes, count=3)
    assert truth.hits(order[:, [2, 0, 1]])[0].all()
    assert not truth.hits(order[:, [0, 1, 1]])[0].any()
    assert not truth.hits(order[:, [0, 1, 3]])[0].any()


def test_ties_are_no_mistake():
    x, codes = torch.zeros(2, 3), torch.eye(3)
    assert Nearest(x, codes).hits(torch.tensor([0, 2]))[0].all()
    scaled = codes * torch.tensor([[1.0], [5.0], [1.0]])
    cosine = Nearest(scaled[1:2], scaled, "cosine")
    assert cosine.hits(torch.tensor([1]))[0].all()


def test_close_and_finite():
    one = torch.ones(4)
    assert check_close("xq", "z", one * 1.01, one, 0.02) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(Red, match=r"xq: z is off by 0.01, relative; 0.001 is allowed"):
        check_close("xq", "z", one * 1.01, one, 0.001)
    with pytest.raises(Red, match="off by nan"):
        check_close("xq", "z", one * float("nan"), one, 0.02)
    with pytest.raises(Red, match=r"no gradient reaches a tensor of shape \(4,\)"):
        gradient(one)
    with pytest.raises(Red, match="xq: gradient is not finite"):
        check_finite("xq", gradient=one / 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")
def test_memory_that_is_freed_again_is_seen():
    size = 64 * MIB
    # in a process of its own, where nothing else comes or goes; what was freed before must not
    # hide what is taken now
    work = (
        "import torch; from benchmarks.memory import resident_peak; torch.set_num_threads(1); "
        f"torch.ones({size // 4}); "
        f"print(resident_peak(lambda: [torch.ones({size // 4}).sum() for _ in range(3)]))"
    )
    said = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert size - MIB < int(said.stdout) < size + 8 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")
def test_memory_of_a_kept_buffer_counts(fresh):
    spec = Spec("step", step.lfq_case, {"tokens": 4096, "bits": 12}, {"tokens": 8, "bits": 4})
    peak = fresh.peak(spec, XQ)
    assert 4096 * 12 * 4 < peak < 64 * MIB


def test_a_process_that_fails_tells_nothing(fresh):
    sizes = {"n": 32, "k": 16, "dim": 4}
    assert fresh.peak(Spec("x", lookup.lookup_case, sizes, {}), "no such contender") is None
    assert fresh.peak(Spec("x", lookup.lookup_case, sizes, {}), XQ) is not None


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with harness.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with harness.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_limit_is_the_best_of_all_rounds():
    yardsticks = Yardsticks("cpu", quick=True)
    quiet = {name: Times([2.0, 1.0, 3.0]) for name in yardsticks.runs()}
    busy = {name: Times([9.0]) for name in yardsticks.runs()}
    first = yardsticks.limits(quiet)
    assert first.flops > 0
    assert first.bandwidth == 2 * (1 << 20) * 4
    assert yardsticks.limits(busy) == first


def test_words():
    assert [time(s) for s in (4.5678, 0.99951, 0.0235, 2.3e-6)] == [
        "4.57 s",
        "1.00 s",
        "23.5 ms",
        "2.30 us",
    ]
    assert [memory(m) for m in (5, 3 * MIB, 1100 * MIB, None)] == [
        "< 1 MiB",
        "3.00 MiB",
        "1.07 GiB",
        "",
    ]
    assert [ratio(r) for r in (0.949, 9.996, 41.23, 215.4)] == ["0.95x", "10.0x", "41.2x", "215x"]
    assert share(0.917) == "92 %"


def test_the_page_has_the_tables_of_the_results():
    page = report.PAGE.read_text()
    assert report.rewritten(page, harness.RESULTS) == page
    for name in MODULES:
        assert page.count(f"<!-- {name}: begin -->") == page.count(f"<!-- {name}: end -->") == 1


def test_a_table_from_a_run(quick, tmp_path):
    assert quick("step") == 0
    path = tmp_path / "step.json"
    page = "top\n<!-- step: begin -->\nstale\n<!-- step: end -->\nbottom\n"
    with pytest.raises(ValueError, match=r"step.json comes from a quick run"):
        report.rewritten(page, tmp_path)
    path.write_text(path.read_text().replace('"quick": true', '"quick": false'))
    written = report.rewritten(page, tmp_path)
    assert "stale" not in written
    assert written.startswith("top\n")
    assert written.endswith("bottom\n")
    assert "| VQ 64 x 48 x 8, EMA |" in written
    assert "![" in written
    assert report.rewritten(written, tmp_path) == written
    rows = [line.count("|") for line in written.splitlines() if "x 8" in line or "| time" in line]
    assert len(set(rows)) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("module", [lookup, entropy, step, trees], ids=lambda m: m.__name__)
def test_cases_have_names_of_their_own(module, device):
    names = [spec.name for spec in module.BENCHMARK.specs(device, False)]
    assert len(names) == len(set(names))


def test_what_was_asked_names_cases_that_exist():
    for module in (lookup, step, trees):
        for device, lines in module.BENCHMARK.asked.items():
            names = {spec.name for spec in module.BENCHMARK.specs(device, False)}
            assert {line.work for line in lines} <= names | {None}

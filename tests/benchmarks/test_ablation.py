"""The ablation: its runs, what is kept of earlier ones, its numbers and its table."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("matplotlib", reason="the pictures of the bench extra")
pytest.importorskip("timm", reason="the networks of the bench extra")

import timm

from benchmarks import ablation, ablation_cases as cases, ablation_table, report
from benchmarks.ablation_judge import Judge, Networks, squares, used
from benchmarks.ablation_run import Settings, Training, trained
from examples.common.network import make_network
from xq.losses import LPIPS, TimmTeacher
from xq.losses.trunks import NETS, Trunk
from xq.metrics import CodebookUsage, psnr
from xq.models import Tokenizer

FEATURES = "test_efficientnet"
TINY = Settings(steps=3, batch=4, channels=8, shown=2, start=8, perceived=2)


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """The command sets those of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven pictures of smooth noise, three of them held out."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 3)):
        (folder / part).mkdir()
        for i in range(count):
            coarse = random.integers(256, size=(9, 9, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((70, 66), Image.Resampling.BICUBIC)
            picture.save(folder / part / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random networks in files."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    trunk = {name: 0.05 * torch.randn(t.shape) for name, t in Trunk("alex").named_buffers()}
    save_file(trunk, folder / "alex.safetensors")
    channels = enumerate(NETS["alex"].channels)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in channels}
    save_file(heads, folder / "heads.safetensors")
    save_file(timm.create_model(FEATURES).state_dict(), folder / "features.safetensors")
    return folder


@pytest.fixture(scope="module")
def judge(data, weights) -> Judge:
    """With all networks."""
    lpips = LPIPS("alex", weights=weights / "alex.safetensors", heads=weights / "heads.safetensors")
    file = weights / "features.safetensors"
    teachers = [TimmTeacher(FEATURES, weights=file, size=size) for size in (96, 64)]
    networks = Networks(lpips, *teachers, FEATURES)
    return Judge(sorted((data / "val").iterdir()), networks)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a quick run without networks, and what it said."""
    folder = tmp_path_factory.mktemp("ablation")
    return folder, _told(["--quick", "--data", str(data), "--out", str(folder)])


def _told(options: list[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        assert ablation.main(options) == 0
    return "\n".join(said)


def test_runs_and_writes(run):
    folder, said = run
    assert {path.name for path in folder.iterdir()} == {"ablation.json", "ablation.png"}
    document = json.loads((folder / "ablation.json").read_text())
    assert document["shared"]["data"].startswith("4 of photographs")
    assert document["shared"]["side"] == 64
    assert [case["name"] for case in document["cases"]] == ["VQ", "MSVQ P=2, dropout"]
    for case in document["cases"]:
        assert 8 < case["psnr"] < 50
        assert case["lpips"] is case["fd"] is None
        assert 0 < case["used"] <= 1
        assert [point["step"] for point in case["curve"]] == [0, 2, 3]
    assert [case["bits"] for case in document["cases"]] == [64 * 4, 130 * 2 * 4]
    bits = [point["bits"] for point in document["cases"][1]["partials"]]
    assert bits == pytest.approx([8 * places for places in (1, 5, 14, 30, 66, 130)])
    with Image.open(folder / "ablation.png") as picture:
        picture.load()
        assert picture.width > 800
    assert "no --lpips-weights: LPIPS is neither trained with nor measured" in said
    assert "no --features-weights: no Frechet distance, no alignment" in said


def test_what_is_there_is_not_made_again(run, data, tmp_path, monkeypatch):
    for path in run[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = json.loads((tmp_path / "ablation.json").read_text())["cases"]
    made = []

    def again(case, *_):
        made.append(case.name)
        return {**before[len(made) - 1], "psnr": 1.0}

    monkeypatch.setattr(ablation, "trained", again)
    options = ["--quick", "--data", str(data), "--out", str(tmp_path)]
    _told(options)
    assert not made
    assert json.loads((tmp_path / "ablation.json").read_text())["cases"] == before
    # what all share is another
    _told([*options, "--steps", "4"])
    assert made == ["VQ", "MSVQ P=2, dropout"]
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert document["shared"]["steps"] == 4
    assert [case["psnr"] for case in document["cases"]] == [1.0, 1.0]


def test_a_case_that_changed_is_made_again(run, data, tmp_path, monkeypatch):
    for path in run[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = [cases.vq(16), cases.varied(cases.msvq(32, 2), dropout=True)]
    made = []
    monkeypatch.setattr(ablation, "cases", lambda quick: changed)
    case = json.loads((tmp_path / "ablation.json").read_text())["cases"][1]
    monkeypatch.setattr(ablation, "trained", lambda case_, *_: made.append(case_) or case)
    _told(["--quick", "--data", str(data), "--out", str(tmp_path)])
    assert made == changed[1:]


def test_no_case_is_begun_late(run, data, tmp_path, monkeypatch):
    case = json.loads((run[0] / "ablation.json").read_text())["cases"][0]
    monkeypatch.setattr(ablation, "trained", lambda *_: case)
    for minutes, count in (("2", 2), ("1", 1)):
        clock = iter([0.0, 59.0, 61.0])
        monkeypatch.setattr(ablation.time, "monotonic", lambda clock=clock: next(clock))
        out = tmp_path / minutes
        options = ["--quick", "--data", str(data), "--out", str(out), "--minutes", minutes]
        said = _told(options)
        assert ("MSVQ P=2, dropout, seed 0: left out, no minutes" in said) == (count == 1)
        assert len(json.loads((out / "ablation.json").read_text())["cases"]) == count


def test_with_networks_there_are_more_columns(data, weights, tmp_path):
    options = ["--lpips-weights", str(weights / "alex.safetensors")]
    options += ["--lpips-heads", str(weights / "heads.safetensors"), "--features", FEATURES]
    options += ["--features-weights", str(weights / "features.safetensors")]
    said = _told(["--quick", "--data", str(data), "--out", str(tmp_path), *options])
    assert "no --" not in said
    path = tmp_path / "ablation.json"
    document = json.loads(path.read_text())
    assert all(case["lpips"] > 0 and case["fd"] > 0 for case in document["cases"])
    path.write_text(json.dumps(document | {"quick": False}))
    page = "top\n<!-- ablation: begin -->\nstale\n<!-- ablation: end -->\n"
    written = report.rewritten(page, tmp_path)
    assert "stale" not in written
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert f"| LPIPS | fd_{FEATURES} |" in rows[0]
    assert len(rows) == 2 + len(document["cases"])
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere is no folder"),
        (["--steps", "0"], "must be positive, got 0"),
        (["--lpips-weights", "nothing.pth"], "nothing.pth"),
        (["--features-weights", "nothing.pth"], "nothing.pth"),
    ],
)
def test_bad_input_is_an_error(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablation.main(["--quick", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_cases_are_what_they_are_called():
    found = cases.cases(quick=False)
    assert len({(case.name, case.seed) for case in found}) == len(found)
    names = {case.name for case in found}
    assert {case.variant_of for case in found} <= {*names, ""}
    for case in found:
        json.dumps(case.described())
        quantizer = case.make()
        assert quantizer.codebook_size == case.codes
        assert case.codes == (16384 if "16384" in case.name else 4096)
        assert quantizer.dim == (
            24
            if "BSQ" not in case.name and case.family != "LFQ"
            else (14 if case.codes == 16384 else 12) * getattr(quantizer, "P", 1)
        )
        assert case.alignment == ("alignment" in case.name)
        assert case.dropout == ("dropout" in case.name)
        assert case.discriminator == ("discriminator" in case.name)
    # at three levels of equal bits, within 2 %
    tokens = {c.name: _tokens(c) for c in found if not c.variant_of}
    for level in (
        [64, "VQ", "LFQ", "BSQ"],
        [128, "RQ 2", "PQ P=2", "MSVQ", "MSBSQ"],
        [256, "RQ 4", "PQ P=4", "MSVQ P=2", "MSBSQ P=2"],
    ):
        wanted, *names = level
        assert all(tokens[name] == pytest.approx(wanted, rel=0.02) for name in names)


def _tokens(case):
    """Codes of a crop."""
    quantizer = case.make()
    places = sum(h * w for h, w in quantizer.grids) or 64
    return places * int(np.prod(quantizer.code_shape))


@pytest.mark.parametrize("added", ["alignment", "discriminator", "dropout"])
def test_what_is_added_takes_part(added, judge, data, monkeypatch):
    base = cases.msvq(16, 2) if added != "alignment" else cases.vq(16, 2)
    calls = []
    taps = {
        "alignment": ("xq.losses.alignment.FeatureAlignment.forward"),
        "discriminator": ("xq.losses.discriminators.patchgan.PatchGAN.forward"),
        "dropout": ("xq.quantizers.depth.DepthDropout.forward"),
    }
    owner, _, name = taps[added].rpartition(".")
    module, _, owner = owner.rpartition(".")
    tapped = getattr(__import__(module, fromlist=[owner]), owner)
    true = getattr(tapped, name)
    monkeypatch.setattr(
        tapped, name, lambda *given, **named: calls.append(1) or true(*given, **named)
    )
    paths = sorted((data / "train").iterdir())
    plain = trained(base, TINY, paths, judge)
    assert not calls
    varied = trained(cases.varied(base, **{added: True}), TINY, paths, judge)
    # the discriminator sees the last step: the tokenizer's own, then both pictures
    assert len(calls) == 3
    assert varied["variant_of"] == plain["name"]
    assert varied["curve"][0] == plain["curve"][0]


def test_the_same_seed_gives_the_same_numbers(judge, data):
    paths = sorted((data / "train").iterdir())
    first, second = (trained(cases.vq(16), TINY, paths, judge) for _ in range(2))
    other = trained(cases.again(cases.vq(16), 1), TINY, paths, judge)
    for numbers in (first, second, other):
        del numbers["seconds"]
    assert first == second
    assert first["psnr"] != other["psnr"]


def test_longer_trainings_have_more_steps(judge, data):
    paths = sorted((data / "train").iterdir())
    long = trained(cases.longer_trained(cases.vq(16), 2), TINY, paths, judge)
    assert [point["step"] for point in long["curve"]] == [0, 3, 6]


def test_training_lowers_the_loss(judge, data):
    torch.manual_seed(0)
    quantizer = cases.bsq().make()
    tokenizer = Tokenizer(*_with(make_network(12, 8), quantizer))
    training = Training(cases.bsq(), replace(TINY, steps=20), tokenizer, judge.networks)
    images = torch.rand(4, 3, 64, 64) * 0.2 + torch.tensor([0.5, -0.5, 0.0]).view(1, 3, 1, 1)
    before = float(training._loss(images, judged=False)[0].detach())
    for _ in range(20):
        training.step(images, 0.0)
    assert float(training._loss(images, judged=False)[0].detach()) < 0.7 * before


def _with(network, quantizer):
    encoder, decoder = network
    return encoder, quantizer, decoder


def test_squares_are_as_large_as_all_pictures_have():
    pictures = [
        torch.randint(256, (3, h, w), dtype=torch.uint8) for h, w in ((300, 520), (260, 257))
    ]
    found = squares(pictures)
    assert found.shape == (3, 3, 256, 256)
    assert torch.equal(found[1], pictures[0][:, :256, 256:512])
    # one picture alone is cut smaller
    assert squares(pictures[1:]).shape == (4, 3, 128, 128)
    assert squares([pictures[0][:, :100, :70]]).shape == (1, 3, 64, 64)


def test_usage_is_of_all_scales_together():
    usage = CodebookUsage(4, (2,), [(1, 1), (1, 2)])
    usage.update(torch.tensor([[[0, 3], [1, 3], [0, 3]]]))
    found = used(usage)
    assert found["used"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    entropy = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    assert found["perplexity"] == pytest.approx((np.exp(entropy) + 1) / 2)


def test_numbers_are_means_over_pictures(judge):
    rows = torch.tensor([0, 2])
    made = (judge.pixels[rows].float() + torch.tensor([10.0, 40.0]).view(2, 1, 1, 1)).clamp(0, 255)
    made = made.round().byte()
    found = judge.compared(made, rows)
    each = [psnr(made[i].float(), judge.pixels[rows[i]].float(), 255.0) for i in range(2)]
    assert found["psnr"] == pytest.approx(float(sum(each)) / 2, rel=1e-5)
    assert judge.compared(judge.pixels[rows], rows)["fd"] == pytest.approx(0, abs=1e-6)
    assert found["fd"] > 1e-3 or found["lpips"] > 0


def test_a_pyramid_grows_with_the_picture(judge):
    tokenizer = Tokenizer(*_with(make_network(24, 8), cases.msvq(16).make())).train()
    assert judge.whole(tokenizer).quantizer.grids[-1] == (8, 8)
    larger = copy.copy(judge)
    larger.pixels = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    whole = larger.whole(tokenizer)
    assert whole.quantizer.grids[:2] == ((2, 2), (4, 4))
    assert whole.quantizer.grids[-1] == (16, 16)
    assert not whole.training


def test_seeds_share_a_row():
    def case(name, seed, psnr, bits=100.0, variant_of=""):
        numbers = {"psnr": psnr, "lpips": None, "fd": None, "used": 0.5, "perplexity": 8.0}
        return {"name": name, "seed": seed, "bits": bits, "variant_of": variant_of, **numbers}

    runs = [case("b", 0, 20.0, 200.0), case("a", 0, 25.0), case("a", 1, 25.5)]
    runs += [case("a, more", 0, 26.0, 300.0, "a")]
    document = {"cases": runs, "shared": {"features": None}}
    head, rows = ablation_table.table(document)
    assert head == ["", "bits a picture", "PSNR", "codes used", "perplexity", "runs"]
    assert [row[0] for row in rows] == ["a", "a, more", "b"]
    assert rows[0][2:] == ["25.25 ± 0.25", "50.0 % ± 0.0 %", "8 ± 0", "2"]
    assert ablation_table.spread(document, "psnr") == 0.5
    assert ablation_table.spread({"cases": runs[:1]}, "psnr") is None

"""The benchmark of errors: what it trains on, its recipe, its gate and its tables."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="the pictures of the bench extra")
pytest.importorskip("skimage", reason="the photographs of the bench extra")

from benchmarks import coders, distortion, distortion_cases, report
from benchmarks.asked import judged
from benchmarks.cases import XQ, Red, Skip
from benchmarks.coders import BEAM, FAISS, Coder, Plan
from benchmarks.distortion_asked import Error, Sooner, Used
from benchmarks.patches import DIM, Patches, patches
from benchmarks.peers import VQP
from xq.quantizers import LFQ, ProductQuantizer, ResidualQuantizer, beam_encode

CASE = {"name", "bits", "batch", "epochs", "skipped", "best_peer", "contenders"}
NUMBERS = {"mse", "used_test", "used_train", "wall_seconds", "cpu_seconds", "coding_seconds"}


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """The command sets those of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a quick run of the command, and what it said."""
    folder = tmp_path_factory.mktemp("distortion")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        assert distortion.main(["--quick", "--out", str(folder)]) == 0
    return folder, "\n".join(said)


def test_runs_and_writes(run):
    folder, said = run
    assert {path.name for path in folder.iterdir()} == {"distortion.json", "distortion.png"}
    document = json.loads((folder / "distortion.json").read_text())
    assert document["machine"]["threads"] == 1
    assert "scikit-image" in document["data"]["words"]
    assert [case["name"].split()[0] for case in document["cases"]] == [
        "VQ",
        "FSQ",
        "LFQ",
        "BSQ",
        "PQ",
        "RQ",
    ]
    for case in document["cases"]:
        assert case.keys() == CASE
        assert case["contenders"][0]["name"] == XQ
        names = {c["name"] for c in case["contenders"]} | set(case["skipped"])
        assert VQP in names
        for c in case["contenders"]:
            assert c.keys() == NUMBERS | {"name", "ours", "runs"}
            assert 0 < c["mse"] < document["data"]["variance"]
            assert 0 < c["used_test"] <= 1
            assert len(c["runs"]) == 1
    names = [c["name"] for c in document["cases"][-1]["contenders"]]
    assert names[:2] == [XQ, XQ + BEAM]
    with Image.open(folder / "distortion.png") as picture:
        picture.load()
        assert picture.width > 1000
    lines = said.replace(str(folder), "").splitlines()
    assert max(map(len, lines)) <= 100


def test_a_table_from_a_run(run, tmp_path):
    document = json.loads((run[0] / "distortion.json").read_text())
    (tmp_path / "distortion.json").write_text(json.dumps(document | {"quick": False}))
    page = "top\n<!-- distortion: begin -->\nstale\n<!-- distortion: end -->\n"
    written = report.rewritten(page, tmp_path)
    assert "stale" not in written
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    # what was asked is of other cases
    assert len(rows) == 2 + len(document["cases"])
    assert len({row.count("|") for row in rows}) == 1
    assert report.rewritten(written, tmp_path) == written


def test_the_page_has_a_place_for_it():
    page = report.PAGE.read_text()
    assert page.count("<!-- distortion: begin -->") == page.count("<!-- distortion: end -->") == 1


def test_a_broken_search_gives_no_number(tmp_path, capsys, monkeypatch):
    from xq.quantizers.lookup import nearest

    def wrong(x, codes, *args, **kwargs):
        found = nearest(x, codes, *args, **kwargs)
        return torch.where(found == found.flatten()[0], (found + 1) % 2, found)

    monkeypatch.setattr("xq.quantizers.vq.nearest", wrong)
    assert distortion.main(["--quick", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "misses the nearest code" in said.err
    assert "error x 1000" not in said.out
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_none_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        distortion.main(["--quick", "--data", str(tmp_path / "none")])
    assert end.value.code == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_peer_that_is_not_there_is_named(monkeypatch, data):
    def missing(codebook_size):
        raise Skip("not installed (pip install faiss-cpu)")

    monkeypatch.setattr(distortion_cases, "faiss_kmeans", missing)
    case = distortion.measured(distortion_cases.vq_work(4, Plan(32, 1)), data, rounds=2)
    assert case["skipped"] == {FAISS: "not installed (pip install faiss-cpu)"}
    assert "faiss: left out, not installed" in distortion.block(case)
    head, (row,) = distortion.table({"cases": [case]})
    assert len(head) == len(row)
    assert len(case["contenders"][0]["runs"]) == 2


@pytest.fixture
def data():
    x = torch.randn(600, DIM, generator=torch.Generator().manual_seed(0))
    return Patches(x[:400], x[400:], "noise")


def write(path, colour, side=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(path)


def test_patches_are_pixel_by_pixel_and_centred(tmp_path):
    for i in range(4):
        write(tmp_path / "train" / f"{i}.png", (10 * i, 20, 30 + i))
    for i in range(2):
        write(tmp_path / "val" / f"{i}.png", (255, 0, 51))
    found = patches(str(tmp_path), train=40, test=10)
    assert found.train.shape == (40, DIM)
    assert found.test.shape == (10, DIM)
    assert found.train.mean(0).abs().max() < 1e-6
    mean = torch.tensor([15.0, 20.0, 31.5]) / 255
    torch.testing.assert_close(
        found.test, (torch.tensor([1.0, 0.0, 0.2]) - mean).repeat(10, DIM // 3)
    )
    assert "4 of photographs" in found.words
    # as many of each
    reds = (found.train[:, 0] + mean[0]).mul(255).round().long()
    assert torch.bincount(reds)[::10].tolist() == [10, 10, 10, 10]
    again = patches(str(tmp_path), train=40, test=10)
    assert torch.equal(found.train, again.train)


def test_without_two_parts_the_last_tenth_is_held_out(tmp_path):
    for i in range(20):
        write(tmp_path / f"{i:02}.png", 10 * i)
    found = patches(str(tmp_path), train=180, test=20)
    assert found.words.startswith("18 of photographs")
    assert found.test.unique().numel() == 2


def test_a_plan_sees_each_vector_once_an_epoch():
    x = torch.arange(10.0)[:, None]
    steps = list(Plan(batch=3, epochs=2).steps(x, seed=0))
    assert [done for done, _ in steps] == [i / 6 for i in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert torch.cat([batch for _, batch in epoch]).unique().numel() == 9
    assert not torch.equal(steps[0][1], steps[3][1])


def test_the_recipe_ends_where_it_should(data, monkeypatch):
    quantizer = coders.averaged(DIM, 16)
    seen = []
    quantizer.register_forward_pre_hook(
        lambda q, _: seen.append((q.codebook.decay, q.codebook.revive))
    )
    coders.train_(quantizer, data.train, Plan(batch=20, epochs=1, revive=0.1), seed=0)
    decays = [decay for decay, _ in seen]
    assert decays[0] == pytest.approx(0.9)
    assert decays[8] == pytest.approx(1 - 10**-1.5)
    assert decays[16:] == pytest.approx([0.99] * 4)
    assert [revive for _, revive in seen] == [0.1] * 18 + [0.0] * 2
    assert not quantizer.training


TREES = {
    "vq": lambda: coders.averaged(DIM, 8),
    "product": lambda: ProductQuantizer(coders.averaged(DIM // 2, 8), P=2),
    "residual": lambda: ResidualQuantizer(coders.averaged(DIM, 8), 3),
}


@pytest.mark.parametrize("name", TREES)
def test_the_gate_tells_other_codes(data, name):
    quantizer = TREES[name]()
    coders.train_(quantizer, data.train, Plan(100, 1), seed=0)
    indices = quantizer.encode(data.test)
    z = quantizer.decode(indices)
    coders.check_coded(quantizer, data.test, indices, z, width=1)
    wrong = indices.clone().reshape(len(indices), -1)
    wrong[3, -1] = (wrong[3, -1] + 1) % 8
    with pytest.raises(Red, match="misses the nearest code in 1 of"):
        coders.check_coded(quantizer, data.test, wrong.reshape(indices.shape), z, width=1)
    with pytest.raises(Red, match="decode differs"):
        coders.check_coded(quantizer, data.test, indices, z + 1, width=1)


def test_the_gate_tells_a_search_that_does_harm(data):
    quantizer = TREES["residual"]()
    coders.train_(quantizer, data.train, Plan(100, 1), seed=0)
    indices = beam_encode(quantizer, data.test, 4)
    z = quantizer.decode(indices)
    coders.check_coded(quantizer, data.test, indices, z, width=4)
    z[5] = data.test[5] + 10
    with pytest.raises(Red, match="1 vectors are worse off than by encode"):
        coders.check_coded(quantizer, data.test, indices, z, width=4)


def test_error_and_used_codes_are_what_they_say(data):
    table = torch.randn(5, 2, DIM, generator=torch.Generator().manual_seed(1))
    chosen = torch.randint(4, (len(data.test), 2), generator=torch.Generator().manual_seed(2))
    rows = iter(chosen.split(64))

    def code(x):
        indices = next(rows)
        return indices, table[indices, torch.arange(2)].sum(1)

    before, distortion._BLOCK = distortion._BLOCK, 64
    try:
        error, used = distortion._coded(Coder("any", code, codes=5), data.test)
    finally:
        distortion._BLOCK = before
    naive = (table[chosen[:, 0], 0] + table[chosen[:, 1], 1] - data.test).square().mean()
    assert error == pytest.approx(naive.item(), rel=1e-6)
    assert used == pytest.approx(4 / 5)


def test_linear_maps_learn(data):
    x = data.train * torch.linspace(0.1, 2, DIM)
    (start,) = coders.behind_linear(XQ, lambda: LFQ(6, regularize=False), Plan(400, 1))(x, 0)
    (end,) = coders.behind_linear(XQ, lambda: LFQ(6, regularize=False), Plan(20, 20))(x, 0)
    assert start.codes == 2**6
    before, after = (distortion._coded(coder, x)[0] for coder in (start, end))
    assert after < 0.97 * before < 0.97 * x.square().mean()


def case(**errors):
    contenders = [
        {"name": name, "mse": mse, "used_train": 0.9995, "cpu_seconds": 10 * mse, "ours": True}
        for name, mse in errors.items()
    ]
    return {"name": "work", "contenders": contenders, "best_peer": None}


@pytest.mark.parametrize(
    ("asked", "measured", "met"),
    [
        (Error("work", 1.02, FAISS), "x 1.010", True),
        (Error("work", 1.0, FAISS), "x 1.010", False),
        (Error(None, 1.02, FAISS), "x 1.010 (work)", True),
        (Error("work", 1.0, "absent"), None, None),
        (Sooner("work", 1.0, FAISS), "x 1.01", False),
        (Used("work", 0.999), "100.0 %", True),
        (Used("work", 0.9999), "100.0 %", False),
    ],
)
def test_asked_beside_measured(asked, measured, met):
    line = judged(asked, [case(xq=1.01, faiss=1.0)])
    assert (line["measured"], line["met"]) == (measured, met)


def test_what_was_asked_names_cases_that_exist():
    works = distortion.works(quick=False)
    names = [work.name for work in works]
    assert len(names) == len(set(names))
    assert {line.work for line in distortion.ASKED} <= {*names, None}
    assert [work.bits for work in works] == [8, 10, 12, 12, 12, 12, 32, 64, 32, 64]

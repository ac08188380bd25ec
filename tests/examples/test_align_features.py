"""The example trains both tokenizers, and tells what came of them."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["--teacher", "test_resnet", "--tile", "64", "--steps", "3", "--batch", "4"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples/align_features.py` as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import align_features

    return align_features


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of four tiles each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in "abc":
        coarse = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((140, 130), Image.Resampling.BICUBIC)
        picture.save(folder / f"{name}.png")
    return folder


def test_it_runs_and_says_what_it_compares(script, pictures, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    results = script.main([*QUICK, "--data", str(pictures), "--weights", str(path)])
    printed = capsys.readouterr().out
    assert list(results) == ["teacher", "unaligned", "aligned"]
    for name, numbers in results.items():
        assert 0 <= numbers["retrieval"] <= 1
        assert -1 <= numbers["likeness"] <= 1
        assert f"{name:<10}" in printed
    assert "teacher test_resnet with trained weights" in printed
    assert "by chance   retrieval 0.333  (3 held-out tiles)" in printed
    # both start from the same weights
    first = [results[name]["alignment at first"] for name in ("unaligned", "aligned")]
    assert first[0] == pytest.approx(first[1], abs=0.3)


def test_the_demo_has_a_random_teacher(script, capsys):
    pytest.importorskip("skimage")
    results = script.main(["--teacher", "test_resnet", "--steps", "2", "--batch", "4"])
    assert results["aligned"]["error"] > 0
    assert "with random weights" in capsys.readouterr().out


def test_alignment_moves_the_branch(script, pictures):
    results = script.main([*QUICK[:-4], "--steps", "30", "--batch", "6", "--data", str(pictures)])
    assert results["aligned"]["at last"] < results["unaligned"]["at last"] - 0.1


def test_retrieval(script):
    codes = torch.eye(5)
    assert script.retrieval(codes, codes) == 1
    assert script.retrieval(codes, codes.roll(1, 0)) == 0


def test_likeness(script):
    codes = torch.randn(6, 4)
    assert script.likeness(codes, 3 * codes) == pytest.approx(1, abs=1e-4)
    assert script.likeness(codes, codes - codes.mean(0) + 1) == pytest.approx(1, abs=1e-4)
    assert abs(script.likeness(torch.randn(200, 4), torch.randn(200, 4))) < 0.1


def test_errors(script, pictures, tmp_path):
    for wrong, message in (
        (["--data", str(tmp_path / "none")], "is no folder"),
        (["--data", str(pictures), "--tile", "128"], "has 3 tiles of 128 pixels, below 8"),
        (["--data", str(pictures), "--weights", str(tmp_path / "none.pth")], "finds no file"),
        (["--data", str(pictures), "--weights", "x", "--teacher", "none"], "knows no model 'none'"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main([*QUICK, *wrong])


def test_it_is_short():
    assert len((EXAMPLES / "align_features.py").read_text().split("\n")) < 150
    assert str(EXAMPLES) not in sys.path

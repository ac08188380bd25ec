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
def views(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples/common/views.py` as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from common import views

    return views


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
        assert f"{name:<10}" in printed
    assert "teacher test_resnet with trained weights" in printed
    assert "by chance   retrieval 0.333  (3 held-out tiles)" in printed
    gain = results["aligned"]["retrieval"] - results["unaligned"]["retrieval"]
    assert f"aligned finds {gain:+.3f}, standard error" in printed


def test_the_demo_has_a_random_teacher(script, capsys):
    pytest.importorskip("skimage")
    results = script.main(["--teacher", "test_resnet", "--steps", "2", "--batch", "4"])
    assert results["aligned"]["error"] > 0
    assert "with random weights" in capsys.readouterr().out


def test_only_the_weight_tells_them_apart(script, pictures):
    results = script.main([*QUICK, "--data", str(pictures), "--weight", "0"])
    assert results["aligned"] == results["unaligned"]


def test_the_loss_falls(script, pictures):
    results = script.main([*QUICK[:-4], "--steps", "20", "--batch", "9", "--data", str(pictures)])
    aligned = results["aligned"]
    assert aligned["at last"] < aligned["alignment at first"] - 0.5


def test_the_branch_that_is_read_is_the_one_that_is_aligned(script):
    quantizer = script.ProductQuantizer([script.BSQ(3), script.BSQ(3)])
    z = torch.randn(3, 5, 5, 6)
    code = script.branch_code(torch.nn.ModuleList([_Given(z), quantizer]), torch.rand(3, 3, 10, 10))
    expected = torch.where(z[..., 3:] > 0, 1, -1).float().mean((1, 2)) / 3**0.5
    torch.testing.assert_close(code, expected)


def test_finds(script):
    codes = torch.eye(5)
    assert script.finds(codes, 3 * codes).all()
    assert not script.finds(codes, codes.roll(1, 0)).any()
    swapped = codes[[1, 0, 2, 3, 4]]
    assert script.finds(codes, swapped).tolist() == [False, False, True, True, True]


def test_likeness(script):
    codes = torch.randn(6, 4)
    assert script.likeness(codes, 3 * codes) == pytest.approx(1, abs=1e-4)
    assert script.likeness(codes, codes - codes.mean(0) + 1) == pytest.approx(1, abs=1e-4)
    assert abs(script.likeness(torch.randn(200, 4), torch.randn(200, 4))) < 0.1


class TestViews:
    def test_tiles_are_held_out(self, views, pictures):
        train, held_out = views.load_tiles(str(pictures), 64)
        assert train.shape == (9, 3, 64, 64)
        assert held_out.shape == (3, 3, 64, 64)
        assert not (train[:, None] == held_out).flatten(2).all(2).any()

    def test_each_draw_is_another_view_of_its_own_tile(self, views):
        tiles = (torch.arange(4) * 60 + 30).byte()[:, None, None, None].expand(4, 3, 40, 40).clone()
        first, second = (views.random_views(tiles, np.random.default_rng(s)) for s in (0, 1))
        assert first.shape == (4, 3, views.VIEW, views.VIEW)
        assert first.min() >= -1
        assert first.max() <= 1
        assert not torch.equal(first, second)
        assert torch.equal(first, views.random_views(tiles, np.random.default_rng(0)))
        # flat tiles change in brightness alone, each by a factor of its own
        ratios = (first.mean((1, 2, 3)) + 1) * 127.5 / torch.tensor([30.0, 90, 150, 210])
        assert (ratios > 0.59).all()
        assert (ratios < 1.41).all()
        assert len(ratios.unique()) == 4

    def test_some_views_are_grey(self, views):
        tile = torch.tensor([200, 60, 90]).byte()[:, None, None].expand(3, 16, 16)
        made = views.random_views(tile.expand(300, 3, 16, 16), np.random.default_rng(0))
        grey = (made[:, 0] - made[:, 1]).abs().amax((1, 2)) < 1e-5
        assert 0.1 < grey.float().mean() < 0.3

    def test_crops_and_flips(self, views):
        ramp = torch.linspace(0, 255, 64).byte().expand(1, 3, 64, 64)
        made = views.random_views(ramp.expand(60, -1, -1, -1), np.random.default_rng(0))
        slope = (made[..., -1] - made[..., 0]).mean((1, 2))
        assert (slope > 0).any()
        assert (slope < 0).any()
        # half of the ramp at least, all of it at most, contrast and brightness up to 1.4 times
        assert slope.abs().min() > 0.5 * 0.6**2 * 2 * 0.9
        assert slope.abs().std() > 0.1


def test_errors(script, pictures, tmp_path):
    for wrong, message in (
        (["--data", str(tmp_path / "none")], "is no folder"),
        (["--data", str(pictures), "--tile", "128"], "has 3 tiles of 128 pixels, below 8"),
        (["--data", str(pictures), "--weights", str(tmp_path / "none.pth")], "finds no file"),
        (["--data", str(pictures), "--weights", "x", "--teacher", "none"], "knows no model 'none'"),
        (["--data", str(pictures), "--teacher", "none"], "Unknown model"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main([*QUICK, *wrong])


class _Given(torch.nn.Module):
    """An encoder that gives this, for the pictures in order."""

    def __init__(self, z: torch.Tensor) -> None:
        super().__init__()
        self.z = z

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[2] == 5
        return self.z


def test_it_is_short():
    assert len((EXAMPLES / "align_features.py").read_text().split("\n")) < 150
    assert str(EXAMPLES) not in sys.path

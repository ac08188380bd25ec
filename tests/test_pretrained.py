"""Bare quantizers and wrappers as folders, and the Hub; tokenizers are in models/."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import xq.pretrained
from xq.models import LinearDecoder, LinearEncoder, Tokenizer
from xq.pretrained import Pretrained
from xq.quantizers import (
    BSQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    ProductQuantizer,
    Projected,
    Pyramid,
    Quantizer,
    Refine,
    ResidualQuantizer,
    Wrapper,
    rotation_trick,
)

FILES = ["config.json", "model.safetensors"]


class OwnLeaf(BSQ):
    """A leaf of one's own."""


def ema(dim: int = 4) -> VQ:
    return VQ(dim, 11, codebook=partial(EMACodebook, decay=0.9))


MODULES = {
    "leaf": lambda: VQ(4, 11, normalize=True, estimator=rotation_trick),
    "nothing-to-learn": lambda: BSQ(4),
    "ema": ema,
    "residual-shared": lambda: ResidualQuantizer(ema(), depth=3, shared=True),
    "pyramid-product": lambda: ProductQuantizer(
        ResidualQuantizer(ema(2), multiscale=Pyramid((1, 2, 3), [Refine(2)])), P=2
    ),
    "wrapper": lambda: ChannelFirst(Projected(ema(), dim=6)),
}


def inputs(module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, module.dim, 3, 3) if isinstance(module, ChannelFirst) else (2, 3, 3, module.dim)
    return torch.randn(shape, generator=generator)


def trained(module, steps: int = 3, seed: int = 0):
    """After some steps of SGD, and of averages."""
    optimizer = torch.optim.SGD([*module.parameters(), torch.zeros(1, requires_grad=True)], 0.1)
    for step in range(steps):
        x = inputs(module.train(), seed + step).requires_grad_()
        z, _, losses = module(x)
        optimizer.zero_grad()
        (z.square().sum() + losses.total()).backward()
        optimizer.step()
    return module


def assert_equal_states(one, other) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


@pytest.mark.parametrize("name", MODULES)
def test_saved_and_read_back(name, tmp_path):
    module = trained(MODULES[name]())
    module.save_pretrained(tmp_path / "q")
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == FILES
    for cls in (type(module), Wrapper if isinstance(module, Wrapper) else Quantizer, Pretrained):
        again = cls.from_pretrained(tmp_path / "q")
        assert type(again) is type(module)
        assert not any(part.training for part in again.modules())
        assert_equal_states(again, module)
        x = inputs(module, 9)
        assert torch.equal(again(x).z, module.eval()(x).z)
        assert torch.equal(again.encode(x), module.encode(x))


@pytest.mark.parametrize("name", MODULES)
def test_training_resumes_bit_for_bit(name, tmp_path):
    straight = trained(MODULES[name]())
    straight.save_pretrained(tmp_path)
    again = Pretrained.from_pretrained(tmp_path)
    assert_equal_states(trained(again, seed=5), trained(straight, seed=5))


def test_whoever_reads_one_file_reads_the_other(tmp_path):
    VQ(4, 11).save_pretrained(tmp_path)
    (tmp_path / "other").touch()
    modes = {(tmp_path / name).stat().st_mode for name in (*FILES, "other")}
    assert len(modes) == 1


def test_a_class_of_ones_own_is_passed_in(tmp_path):
    ProductQuantizer([OwnLeaf(3), OwnLeaf(3)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'OwnLeaf' is not a part of xq; pass your own class"):
        Quantizer.from_pretrained(tmp_path)
    again = Quantizer.from_pretrained(tmp_path, classes=[OwnLeaf])
    assert type(again.branches[0]) is OwnLeaf
    OwnLeaf(3).save_pretrained(tmp_path)
    assert type(OwnLeaf.from_pretrained(tmp_path)) is OwnLeaf


def test_of_another_class(tmp_path):
    BSQ(4).save_pretrained(tmp_path / "leaf")
    ChannelFirst(BSQ(4)).save_pretrained(tmp_path / "wrapper")
    Tokenizer(LinearEncoder(4, 2), BSQ(4), LinearDecoder(4, 2)).save_pretrained(tmp_path / "model")
    for cls, name, found in (
        (VQ, "leaf", "BSQ"),
        (Tokenizer, "leaf", "BSQ"),
        (Wrapper, "leaf", "BSQ"),
        (Quantizer, "wrapper", "ChannelFirst"),
        (Quantizer, "model", "Tokenizer"),
    ):
        with pytest.raises(ValueError, match=f"describes a {found}, not a {cls.__name__}$"):
            cls.from_pretrained(tmp_path / name)


def test_an_end_between_the_files_leaves_no_mixture(tmp_path, monkeypatch):
    VQ(4, 11).save_pretrained(tmp_path)
    replace = Path.replace

    def ends(path, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", ends)
    with pytest.raises(KeyboardInterrupt):
        VQ(4, 11, normalize=True).save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"VQ.from_pretrained finds no config\.json in"):
        VQ.from_pretrained(tmp_path)


# the Hub


class Hub:
    """Stands for huggingface_hub: one repository, which lies in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []

    def snapshot_download(self, repo_id, **options):
        self.calls.append((repo_id, options))
        if repo_id != "someone/some-quantizer":
            raise OSError(f"404: no repository {repo_id}")
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    found = Hub(tmp_path / "snapshot")
    trained(ema()).save_pretrained(found.folder)
    module = ModuleType("huggingface_hub")
    module.snapshot_download = found.snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


def test_from_the_hub(hub):
    quantizer = VQ.from_pretrained("someone/some-quantizer")
    assert_equal_states(quantizer, VQ.from_pretrained(hub.folder))
    options = {"revision": None, "cache_dir": None, "local_files_only": False}
    assert hub.calls == [("someone/some-quantizer", {**options, "allow_patterns": FILES})]


def test_options_go_to_the_hub(hub, tmp_path):
    options = {"revision": "v1.0", "cache_dir": tmp_path / "cache", "local_files_only": True}
    Quantizer.from_pretrained("someone/some-quantizer", **options)
    assert hub.calls == [("someone/some-quantizer", {**options, "allow_patterns": FILES})]


def test_a_folder_comes_before_the_hub(hub):
    BSQ(4).save_pretrained("someone/some-quantizer")
    assert type(Quantizer.from_pretrained("someone/some-quantizer")) is BSQ
    with pytest.raises(ValueError, match=r"found the folder someone.some-quantizer, which has no "):
        Quantizer.from_pretrained("someone/some-quantizer", revision="main")
    assert hub.calls == []


@pytest.mark.parametrize(
    "name",
    ["nowhere", "./some/folder", "../some-quantizer", "a/b/c", "/no/where", "a/", "a b/c", ""],
)
def test_what_can_only_be_a_folder(hub, name):
    with pytest.raises(FileNotFoundError, match=r"VQ.from_pretrained finds no config\.json in"):
        VQ.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match=r"VQ.from_pretrained finds no config\.json in"):
        VQ.from_pretrained(Path("someone/some-quantizer"))
    assert hub.calls == []


def test_what_the_hub_says_is_passed_on(hub):
    message = "404: no repository runs/nothing\nVQ.from_pretrained found no folder runs/nothing"
    with pytest.raises(OSError, match=message):
        VQ.from_pretrained("runs/nothing")


def test_a_repository_of_something_else(hub):
    (hub.folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="describes no xq model"):
        VQ.from_pretrained("someone/some-quantizer")
    (hub.folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"finds no config\.json in .*snapshot"):
        VQ.from_pretrained("someone/some-quantizer")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = 'found no folder someone/q, .* needs the extra "hub": pip install huggingface_hub'
    with pytest.raises(ImportError, match=message):
        VQ.from_pretrained("someone/q")


def test_the_real_package_looks_in_its_cache(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache" / "models--someone--q"
    BSQ(4).save_pretrained(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert type(Quantizer.from_pretrained("someone/q", **options)) is BSQ
    with pytest.raises(
        huggingface_hub.errors.LocalEntryNotFoundError, match="found no folder someone/r"
    ):
        Quantizer.from_pretrained("someone/r", **options)


def test_the_hub_is_imported_when_it_is_asked():
    assert not hasattr(xq.pretrained, "snapshot_download")

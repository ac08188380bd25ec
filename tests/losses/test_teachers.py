"""Frozen teachers: what they see is the model's own, and nothing of them is trained or saved."""

import copy
import importlib
import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from xq.losses import CLIPTeacher, Features, Teacher, TimmTeacher

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def picture(batch: int = 2, side: int = 64) -> Tensor:
    return torch.rand(batch, 3, side, side) * 2 - 1


def saved(model: nn.Module, path: Path) -> Path:
    """Weights that are not those of a new model, in a file."""
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


class Colours(Teacher):
    """What a teacher of one's own is: the image, made small."""

    def extract(self, image: Tensor) -> Features:
        return Features(image.mean((2, 3)), F.avg_pool2d(image, 4).movedim(1, -1))


# for each kind of layout: the name, and the mean and deviation that its configuration tells
MODELS = {
    "test_vit": ((0.5,) * 3, (0.5,) * 3),
    "test_resnet": ((0.5,) * 3, (0.5,) * 3),
    "test_efficientnet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "vit_tiny_patch16_224.augreg_in21k": ((0.5,) * 3, (0.5,) * 3),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("classes", [0, 7], ids=["trunk", "classifier"])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_the_model(name, classes, suffix, tmp_path):
    model = timm.create_model(name, num_classes=classes).eval()
    path = saved(model, tmp_path / f"weights{suffix}")
    teacher = TimmTeacher(name, weights=path)
    image = picture(side=teacher.size)
    token, patches = teacher(image)

    mean, std = (torch.tensor(colours).view(3, 1, 1) for colours in MODELS[name])
    with torch.no_grad():
        features = model.forward_features((image * 0.5 + 0.5 - mean) / std)
        want = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(token, want, rtol=1e-4, atol=1e-5)
    assert (teacher.token_dim, teacher.patch_dim) == (token.shape[1], patches.shape[3])
    if features.ndim == 3:
        side = math.isqrt(features.shape[1] - 1)
        assert patches.shape[1:3] == (side, side)
        # without the class token, row by row
        features = features[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)
    torch.testing.assert_close(patches.movedim(-1, 1), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2_is_resampled_to_a_grid_of_16(name, tmp_path):
    model = timm.create_model(name, depth=1)
    own = model.pos_embed.shape[1]
    state = {k: v for k, v in model.state_dict().items() if "blocks." not in k}
    assert own in (37 * 37, 37 * 37 + 1)
    # all blocks are needed, so that the file fits
    for i in range(12):
        state |= {
            k.replace("blocks.0.", f"blocks.{i}."): v
            for k, v in model.state_dict().items()
            if "blocks.0." in k
        }
    torch.save(state, tmp_path / "weights.pth")
    teacher = TimmTeacher(name, weights=tmp_path / "weights.pth")
    assert teacher.size == 224
    features = teacher(picture(1, 256))
    assert features.patches.shape == (1, 16, 16, 384)
    assert features.token.shape == (1, 384)


def test_sam_is_loaded_at_its_own_size_and_run_at_a_smaller_one():
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "neck_chans": 8}
    options |= {"global_attn_indexes": (1,)}
    model = timm.create_model("samvit_base_patch16", img_size=64, **options)
    teacher = TimmTeacher(model, size=32)
    assert teacher(picture()).patches.shape == (2, 2, 2, 8)
    assert model.pos_embed.shape == (1, 4, 4, 16)


def test_images_are_resized_as_an_ordinary_resampling_does():
    teacher = Colours(nn.Identity(), 16, (0.5,) * 3, (0.5,) * 3)
    image = picture(side=40)
    want = F.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(image).token, want.mean((2, 3)))
    small = picture(side=16)
    torch.testing.assert_close(teacher(small).token, small.mean((2, 3)))
    wide = Colours(nn.Identity(), 16, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(wide(small).token, (small * 0.5 + 0.5).mean((2, 3)))


@pytest.fixture
def open_clip(tmp_path, monkeypatch):
    """open_clip with a tiny model named "tiny"."""
    open_clip = pytest.importorskip("open_clip")
    factory = importlib.import_module("open_clip.factory")
    for table in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
        monkeypatch.setattr(factory, table, copy.copy(getattr(factory, table)))
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / "tiny.json")
    return open_clip


@pytest.mark.parametrize("size", [None, 48])
def test_clip_sees_what_its_image_tower_does(open_clip, size, tmp_path):
    model = open_clip.create_model("tiny").eval()
    path = saved(model, tmp_path / "weights.pt")
    teacher = CLIPTeacher("tiny", weights=path, size=size)
    assert teacher.size == (size or 32)
    image = picture(side=teacher.size)
    token, patches = teacher(image)
    assert token.shape == (2, 12)
    assert patches.shape == (2, teacher.size // 8, teacher.size // 8, 64)
    if size is None:
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        mean, std = (torch.tensor(colours).view(3, 1, 1) for colours in (mean, std))
        with torch.no_grad():
            want = model.encode_image((image * 0.5 + 0.5 - mean) / std)
        torch.testing.assert_close(token, want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def teacher() -> TimmTeacher:
    return TimmTeacher(timm.create_model("test_vit", img_size=32), size=32)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_a_teacher_is_frozen_and_in_no_state(name):
    teacher = TimmTeacher(timm.create_model(name), size=160)
    holder = nn.ModuleDict({"teacher": teacher, "own": nn.Linear(2, 2)})
    image = picture(side=32).requires_grad_()
    before = teacher(image).token
    assert not before.requires_grad
    assert not list(teacher.parameters())
    assert list(holder.state_dict()) == ["own.weight", "own.bias"]
    # as a safetensors file has it, without metadata
    holder.load_state_dict(dict(holder.state_dict()))
    holder.train()
    assert holder.training
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(image).token, before)
    assert torch.equal(copy.deepcopy(teacher)(image).token, before)
    moved = holder.double()["teacher"]
    assert moved(image).token.dtype == torch.float64
    torch.testing.assert_close(moved(image).token.float(), before, rtol=1e-4, atol=1e-5)


def test_half_precision(teacher):
    image = picture(side=32)
    want = teacher(image)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = teacher(image)
    in_half = copy.deepcopy(teacher).bfloat16()(image)
    for found in (under_autocast, in_half):
        for mine, theirs in zip(found, want, strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.1)


def test_bad_images(teacher):
    with pytest.raises(ValueError, match=r"floats in -1..1, got torch.uint8; .*127.5"):
        teacher(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    for shape in ((3, 32, 32), (1, 1, 32, 32), (0, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"shape \(b, 3, h, w\), got \("):
            teacher(torch.zeros(shape))
    for image in (picture() * 127.5 + 127.5, picture() * 2.5, picture() / 0):
        with pytest.raises(ValueError, match=r"TimmTeacher expects images in -1..1, got values"):
            teacher(image)
    teacher(picture())
    # later calls do not look
    assert teacher(picture() * 2.5).token.isfinite().all()


def test_unknown_names_tell_near_ones(open_clip):
    with pytest.raises(ValueError, match=r"no model 'resnet18x'.*timm.list_models.*resnet18"):
        TimmTeacher("resnet18x")
    with pytest.raises(ValueError, match=r"no model 'vit_base_patch14_dinov2.nonsense'"):
        TimmTeacher("vit_base_patch14_dinov2.nonsense")
    with pytest.raises(ValueError, match=r"no model 'ViT-B-17'.*open_clip.list_models.*ViT-B-16"):
        CLIPTeacher("ViT-B-17")


def test_sizes_are_whole_patches(tmp_path):
    with pytest.raises(ValueError, match="multiple of the patches of 16 x 16, got 50; 48 is one"):
        TimmTeacher(timm.create_model("test_vit", img_size=48), size=50)


def test_sizes_are_positive():
    for make in (TimmTeacher, CLIPTeacher):
        with pytest.raises(ValueError, match=f"{make.__name__} needs a positive size, got 0"):
            make("test_vit", size=0)


def test_missing_packages_name_the_extra(monkeypatch):
    for package in ("timm", "open_clip"):
        monkeypatch.setitem(importlib.import_module("sys").modules, package, None)
    with pytest.raises(ImportError, match=r'TimmTeacher needs timm: pip install "xq\[vision\]"'):
        TimmTeacher("test_vit")
    with pytest.raises(ImportError, match=r'open_clip_torch: pip install "xq\[vision\]"'):
        CLIPTeacher()


def test_missing_weights_name_the_argument(open_clip, monkeypatch, tmp_path):
    def offline(*_, **__) -> None:
        raise ConnectionError("no network")

    missing = tmp_path / "missing.pth"
    with pytest.raises(FileNotFoundError, match=r"TimmTeacher finds no file weights='.*missing"):
        TimmTeacher("test_vit", weights=missing)
    with pytest.raises(FileNotFoundError, match=r"no file weights='.*; tags of ViT-B-32: openai"):
        CLIPTeacher("ViT-B-32", weights=missing)
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(open_clip, "create_model", offline)
    for make in (lambda: TimmTeacher("test_vit"), CLIPTeacher):
        with pytest.raises(OSError, match=r"cannot be downloaded \(no network\); pass weights=, a"):
            make()


def test_files_that_do_not_fit(open_clip, tmp_path):
    path = saved(timm.create_model("test_vit"), tmp_path / "vit.pth")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nonsense")
    for make in (
        lambda: TimmTeacher("test_resnet", weights=path),
        lambda: TimmTeacher("test_vit2", weights=path),
        lambda: TimmTeacher("test_vit", weights=broken),
        lambda: CLIPTeacher("tiny", weights=path),
        lambda: CLIPTeacher("tiny", weights=broken),
    ):
        with pytest.raises(ValueError, match=r"cannot use weights='.*no state dict of"):
            make()
    with pytest.raises(ValueError, match="weights for a name; a module has its own"):
        TimmTeacher(timm.create_model("test_vit"), weights=path)


def test_half_a_file_is_refused(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    del state["blocks.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv.weight"):
        TimmTeacher("test_vit", weights=tmp_path / "half.pth")


@pytest.mark.compile
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_compiled(name):
    teacher = TimmTeacher(timm.create_model(name), size=160)
    image = picture(side=32)
    want, got = teacher(image), torch.compile(teacher, backend="aot_eager", fullgraph=True)(image)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from discriminator_checks import golden_shapes, shapes
from safetensors.torch import save_file
from torch import nn

from xq.config import build, describe
from xq.losses import DiffAug, DINODiscriminator

timm = pytest.importorskip("timm")

DEPTHS = (0, 2, 4)


def tiny(**sizes) -> nn.Module:
    """A ViT with 4 x 4 patches of 8 pixels."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2} | sizes
    vit = timm.models.VisionTransformer(num_classes=0, **sizes)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def discriminator(vit: nn.Module | None = None, **options) -> DINODiscriminator:
    options = {"depths": DEPTHS, "size": 32} | options
    return DINODiscriminator(vit or tiny(), **options)


def naive(model: DINODiscriminator, vit: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits in eval mode: the ViT block by block, the heads without their modules."""
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).to(images)
    x = ((images + 1) / 2 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    x = vit.patch_embed(x)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
    features = [x]
    for block in vit.blocks:
        features.append(block(features[-1]))
    features = [(f[:, 1:] + f[:, :1]).mT for f in features]
    state = model.state_dict()

    def conv(x, name):
        weight = state[f"{name}.weight_orig"]
        u, v = state[f"{name}.weight_u"], state[f"{name}.weight_v"]
        weight = weight / (u @ weight.flatten(1) @ v)
        pad = weight.shape[2] // 2
        x = torch.cat([x[..., x.shape[2] - pad :], x, x[..., :pad]], dim=2)
        return F.conv1d(x, weight, state[f"{name}.bias"])

    def block(x, name):
        x, shape = conv(x, f"{name}.0"), x.shape
        if model.norm == "batch":
            mean = x.mean((0, 2), keepdim=True)
            variance = x.var((0, 2), correction=0, keepdim=True)
        else:
            x = x.reshape(len(x), 16, -1)
            mean, variance = x.mean(2, keepdim=True), x.var(2, correction=0, keepdim=True)
        x = ((x - mean) / (variance + 1e-6).sqrt()).reshape(shape)
        x = x * state[f"{name}.1.weight"][:, None] + state[f"{name}.1.bias"][:, None]
        return torch.where(x > 0, x, 0.2 * x)

    logits = []
    for i, depth in enumerate(model.depths):
        x = block(features[depth], f"heads.{i}.0")
        x = (x + block(x, f"heads.{i}.1.fn")) / 2**0.5
        logits.append(conv(x, f"heads.{i}.2")[:, 0])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("depths", [(0, 2, 4), (1,), (0, 1, 2, 3)])
def test_equals_the_naive_one(norm, depths):
    vit = tiny().eval()
    model = discriminator(vit, norm=norm, depths=depths).eval().double()
    vit = copy.deepcopy(vit).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    actual, expected = model(images), naive(model, vit, images)
    assert actual.shape == (3, 16 * len(depths))
    # the mean and deviation of colours have single precision
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    weights = torch.randn_like(actual)
    (gradient,) = torch.autograd.grad((actual * weights).sum(), images)
    (right,) = torch.autograd.grad((expected * weights).sum(), images)
    torch.testing.assert_close(gradient, right, atol=1e-5, rtol=0)


def test_defaults_are_the_original_ones():
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224.dino", num_classes=0)
        model = DINODiscriminator(vit)
        assert model(torch.empty(2, 3, 256, 256)).shape == (2, 5 * 196)
    assert sum(p.numel() for p in model.parameters()) == 7_386_245
    assert shapes(model) == golden_shapes("dino.")


def test_the_vit_is_neither_trained_nor_saved():
    model = discriminator().train()
    assert all(key.startswith("heads.") for key, _ in model.named_parameters())
    assert all(key.startswith("heads.") for key in model.state_dict())
    assert not any(module.training for module in model.vit.modules())
    model.requires_grad_(False).requires_grad_(True)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    model(images).square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not any(b.requires_grad for b in model.buffers())


def test_the_vit_moves_along():
    model = discriminator().double()
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    assert all(b.is_meta for b in model.to("meta").buffers())


def test_the_module_handed_in_stays_as_it_was():
    vit = tiny(drop_rate=0.5).train()
    before = copy.deepcopy(vit.state_dict())
    model = discriminator(vit)
    assert vit.training
    assert len(vit.blocks) == 4
    assert len(list(vit.parameters())) == len(before)
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert torch.equal(model(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
    assert torch.equal(copy.deepcopy(model)(images), expected)


def test_larger_images_are_averaged_down_in_eval_mode():
    model = discriminator().eval()
    images = torch.randn(2, 3, 64, 96)
    small = images.unflatten(3, (32, 3)).mean(4).unflatten(2, (32, 2)).mean(3)
    torch.testing.assert_close(model(images), model(small), atol=1e-5, rtol=0)
    assert model(torch.randn(2, 3, 33, 47)).shape == (2, 48)


@pytest.mark.parametrize("training", [True, False])
def test_smaller_images_are_enlarged(training):
    model = discriminator(norm="group").train(training)
    images = torch.randn(2, 3, 20, 33)
    enlarged = F.interpolate(images, (32, 32), mode="bicubic")
    assert torch.equal(copy.deepcopy(model)(images), model(enlarged))


def test_crops_in_training_mode():
    generator = torch.Generator().manual_seed(0)
    model = discriminator(generator=generator)
    # each pixel says where it is
    rows = torch.arange(35.0)[:, None].expand(35, 34) / 100
    columns = torch.arange(34.0).expand(35, 34) / 100
    images = torch.stack([rows, columns, rows + columns]).expand(2, -1, -1, -1)
    resized = F.interpolate(images, (32, 32), mode="area")
    places, resizes = set(), 0
    for _ in range(400):
        sized = model._sized(images)
        if torch.equal(sized, resized):
            resizes += 1
            continue
        top, left = (round(100 * v) for v in sized[0, :2, 0, 0].tolist())
        # one place for the whole batch
        assert torch.equal(sized, images[:, :, top : top + 32, left : left + 32])
        places.add((top, left))
    assert places == {(top, left) for top in range(4) for left in range(3)}
    assert 150 < resizes < 250


def test_crop_probability():
    images = torch.randn(2, 3, 40, 40)
    resized = F.interpolate(images, (32, 32), mode="area")
    never, always = discriminator(crop=0.0), discriminator(crop=1.0)
    state = torch.get_rng_state()
    assert torch.equal(never._sized(images), resized)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(always._sized(images), resized) for _ in range(20))


def test_seeded():
    images = torch.randn(2, 3, 48, 48)
    vit, results = tiny(), []
    for _ in range(2):
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(1)
        model = discriminator(vit, generator=generator)
        torch.manual_seed(len(results))
        results.append([model(images) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_device_waits():
    # a tensor without data cannot be waited for
    with torch.device("meta"):
        model = discriminator()
        assert model(torch.empty(9, 3, 40, 40)).shape == (9, 48)


@pytest.mark.parametrize(
    ("name", "patch", "logits"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 14, 256),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 14, 256),
        ("vit_small_patch8_224.dino", 8, 784),
        ("vit_small_patch16_dinov3.lvd1689m", 16, 196),
    ],
)
def test_families_of_vits(name, patch, logits):
    # narrow and shallow, else as published
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, "img_size": 224}
    vit = timm.create_model(name, pretrained=False, **sizes).eval()
    assert vit.patch_embed.patch_size == (patch, patch)
    model = DINODiscriminator(vit, depths=(0, 2), norm="group").eval()
    images = torch.randn(1, 3, 250, 230)
    assert model(images).shape == (1, 2 * logits)

    x = (model._sized(images) - model.shift) / model.scale
    tokens = vit.forward_intermediates(x, [1], True, output_fmt="NLC", intermediates_only=True)
    patches, prefix = tokens[0]
    expected = (patches + prefix[:, :1]).mT
    torch.testing.assert_close(model.vit(x)[1], expected)


def test_a_vit_without_class_token():
    vit = tiny(class_token=False, global_pool="avg")
    model = discriminator(vit)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.vit(x)[0], (vit.patch_embed(x) + vit.pos_embed).mT)


def test_colours_as_the_vit_knows_them():
    vit = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32)
    model = DINODiscriminator(vit, depths=(1,), size=32)
    assert vit.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert torch.equal(model.shift.flatten(), torch.zeros(3))
    assert torch.equal(model.scale.flatten(), torch.ones(3))


@pytest.fixture
def saved(tmp_path):
    """Files of one ViT that timm knows by name, and the ViT."""
    vit = timm.create_model("test_vit", pretrained=False)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    torch.save({"model": vit.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    return tmp_path, vit


@pytest.mark.parametrize("file", ["vit.safetensors", "vit.pth", "checkpoint.pth"])
def test_local_weights(saved, file):
    folder, vit = saved
    options = {"depths": (0, 3), "size": 160}
    torch.manual_seed(1)
    model = DINODiscriminator("test_vit", weights=folder / file, **options).eval()
    vit.reset_classifier(0)
    other = DINODiscriminator(vit, **options).eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(model(images), other(images))


def test_local_weights_of_another_size(saved):
    folder, vit = saved
    model = DINODiscriminator("test_vit", weights=folder / "vit.pth", depths=(0,), size=96)
    grid = vit.pos_embed[:, 1:].mT.unflatten(2, (10, 10))
    grid = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.vit.module.vit.pos_embed[:, 1:], grid.flatten(2).mT)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 36)


@pytest.mark.slow
def test_weights_in_the_layout_of_their_authors(tmp_path):
    name = "vit_small_patch14_dinov2.lvd142m"
    # 518 pixels, with a token for masked patches that timm does without
    vit = timm.create_model(name, pretrained=False, num_classes=0)
    state = {**vit.state_dict(), "mask_token": torch.zeros(1, 384)}
    save_file(state, tmp_path / "dinov2_vits14_pretrain.safetensors")
    model = DINODiscriminator(name, weights=tmp_path / "dinov2_vits14_pretrain.safetensors")
    inner = model.vit.module.vit
    assert torch.equal(inner.blocks[12].mlp.fc2.weight, vit.blocks[11].mlp.fc2.weight)
    assert torch.equal(inner.blocks[1].ls1.gamma, vit.blocks[0].ls1.gamma)
    assert model(torch.randn(2, 3, 224, 224)).shape == (2, 5 * 256)


def test_files_that_do_not_fit(saved):
    folder, vit = saved
    torch.save({"blocks.0.norm1.weight": torch.ones(64)}, folder / "part.pth")
    torch.save({**vit.state_dict(), "neck": torch.ones(1)}, folder / "more.pth")
    torch.save(tiny().state_dict(), folder / "other.pth")
    torch.save(vit, folder / "pickle.pth")
    (folder / "noise.safetensors").write_bytes(b"noise" * 9)
    for file, message in {
        "none.pth": r"finds no file weights=.*none.pth",
        "part.pth": r"no state dict of test_vit: .*Missing key.*\"cls_token\", \"pos_embed\"",
        "more.pth": r"no state dict of test_vit: .*Unexpected key.*\"neck\"",
        "other.pth": r"cannot use weights=.*other.pth.*no state dict of test_vit",
        "pickle.pth": r"cannot use weights=.*pickle.pth.*no state dict of test_vit",
        "noise.safetensors": r"cannot use weights=.*noise.safetensors.*no state dict of test_vit",
    }.items():
        error = FileNotFoundError if file == "none.pth" else ValueError
        with pytest.raises(error, match=f"(?s){message}"):
            DINODiscriminator("test_vit", weights=folder / file, size=160, depths=(0,))


def test_no_weights_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    message = r"no weights of vit_small.*pass weights=, a local file.*pip install \"xq\[vision\]\""
    with pytest.raises(OSError, match=message):
        DINODiscriminator("vit_small_patch14_dinov2.lvd142m")
    with pytest.raises(OSError, match=r"No pretrained weights exist.*pass weights="):
        DINODiscriminator("vit_base_patch32_plus_256")


def test_config_round_trip(saved):
    folder, _ = saved
    options = {"depths": (0, 3), "size": 160, "norm": "group", "crop": 0.25}
    model = DINODiscriminator("test_vit", weights=folder / "vit.safetensors", **options)
    config = json.loads(json.dumps(describe(model)))
    assert config["weights"] == str(folder / "vit.safetensors")
    again = build(config)
    assert isinstance(again, DINODiscriminator)
    assert again.config() == model.config()
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_config_of_a_module_handed_in():
    with pytest.raises(
        TypeError, match="cannot write a ViT that was handed in as JSON; build it by"
    ):
        describe(discriminator())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradcheck(norm):
    vit = tiny(embed_dim=4, depth=1, img_size=16)
    model = DINODiscriminator(vit, depths=(0, 1), size=16, norm=norm).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (images,), fast_mode=True)

    def of_parameters(*parameters):
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(model, named, (images.detach(),))

    assert torch.autograd.gradcheck(of_parameters, tuple(model.parameters()), fast_mode=True)


def test_second_derivatives():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    vit = tiny(embed_dim=4, depth=1, img_size=16)
    model = DINODiscriminator(vit, depths=(0, 1), size=16).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(model, (images,), fast_mode=True)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_finite_at_extremes(norm, scale):
    model = discriminator(norm=norm)
    images = torch.randn(2, 3, 40, 40).mul(scale).requires_grad_()
    logits = model(images)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert images.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_autocast(norm):
    model = discriminator(norm=norm).eval()
    images = torch.rand(3, 3, 32, 32, requires_grad=True)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    # half a mantissa through four blocks
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()
    logits.float().sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm='batch' or 'group', got 'layer'"),
        ({"crop": 1.5}, r"crop in \[0, 1\], got 1.5"),
        ({"size": 0}, "`size` to be a positive integer, got 0"),
        ({"size": 36}, "the patch 8 x 8 of VisionTransformer divides, got 36; the nearest is 32"),
        ({"size": 8}, "at least two patches .* got 8; the nearest is 16"),
        (
            {"size": 64},
            r"for images of \(32, 32\) pixels: pass size=32, or build it with img_size=64",
        ),
        ({"depths": ()}, r"at most 4, the blocks of its ViT, got \(\)"),
        ({"depths": (0, 5)}, r"at most 4, the blocks of its ViT, got \(0, 5\)"),
        ({"depths": (2, 1)}, r"depths that rise from 0 \(embedding\)"),
        ({"depths": (-1, 1)}, r"depths that rise from 0 \(embedding\)"),
        ({"weights": "vit.pth"}, "load them into the VisionTransformer before"),
    ],
)
def test_refuses_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        discriminator(**options)


def test_refuses_other_backbones(tmp_path):
    with pytest.raises(ValueError, match="knows no model 'vit_of_mine'"):
        DINODiscriminator("vit_of_mine")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="timm's test_resnet does not take img_size=224"):
        DINODiscriminator("test_resnet", weights=tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"needs a timm ViT, which has blocks .* got Linear"):
        DINODiscriminator(nn.Linear(3, 3))


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_one(training):
    image = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"got one alone; use two or more, .* norm='group'"):
        discriminator().train(training)(image)
    assert discriminator(norm="group").train(training)(image).shape == (1, 48)


def test_refuses_images():
    for images, message in (
        (torch.zeros(2, 1, 32, 32), r"expects images \(b, 3, H, W\), got shape \(2, 1, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3), r"move the channels with images.permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "bytes become that with images / 127.5 - 1"),
        (torch.zeros(2, 3, 0, 32), r"at least 1 x 1 pixels, got \(0, 32\)"),
        (torch.zeros(0, 3, 32, 32), "got an empty batch"),
    ):
        with pytest.raises(ValueError, match=message):
            discriminator()(images)


@pytest.mark.compile
@pytest.mark.parametrize(("norm", "side"), [("batch", 40), ("group", 32)])
def test_compiles(norm, side):
    torch._dynamo.reset()
    model = discriminator(tiny(depth=1), depths=(0, 1), norm=norm)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    images = torch.randn(3, 3, side, side)
    for training in (True, False):
        twin.train(training)
        torch.manual_seed(2)
        expected = model.train(training)(images)
        torch.manual_seed(2)
        logits = compiled(images)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(twin.state_dict(), model.state_dict())
    (gradient,) = torch.autograd.grad(logits.sum(), twin.heads[0][2].weight_orig)
    (right,) = torch.autograd.grad(expected.sum(), model.heads[0][2].weight_orig)
    torch.testing.assert_close(gradient, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_gpu_never_waits(norm):
    generator = torch.Generator("cuda").manual_seed(0)
    model = discriminator(norm=norm, generator=generator).cuda()
    augment = DiffAug(generator=generator)
    images = torch.randn(9, 3, 40, 40, device="cuda", requires_grad=True)
    model(augment(images, 0.5)).square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.float16):
            logits = model(augment(images, 0.5))
        logits.float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()

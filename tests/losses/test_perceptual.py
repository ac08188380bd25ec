import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xq.losses import LPIPS, perceptual, trunks
from xq.losses.trunks import NETS, Trunk

SIZES = {"vgg": [(16, 16), (33, 47)], "alex": [(31, 31), (66, 45)], "squeeze": [(17, 17), (61, 38)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random trunks and heads of all nets, `{net}.safetensors` and `{net}_heads.pth`."""
    folder, generator = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    for net in NETS:
        trunk = {}
        for name, empty in Trunk(net).named_buffers():
            deviation = (2 / max(empty[0].numel(), 1)) ** 0.5 if name.endswith("weight") else 0.1
            trunk[name] = deviation * torch.randn(empty.shape, generator=generator)
        # as in torchvision's files
        trunk["classifier.1.weight"] = torch.zeros(10, 4)
        save_file(trunk, folder / f"{net}.safetensors")
        heads = {
            f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
            for i, channels in enumerate(NETS[net].channels)
        }
        torch.save(heads, folder / f"{net}_heads.pth")
    return folder


def make(folder: Path, net: str = "alex") -> LPIPS:
    return LPIPS(net, weights=folder / f"{net}.safetensors", heads=folder / f"{net}_heads.pth")


def pair(batch: int, *size: int) -> tuple[Tensor, Tensor]:
    """An image and a target that it is like."""
    target = torch.rand(batch, 3, *size) * 2 - 1
    return (target + 0.2 * torch.randn_like(target)).requires_grad_(), target


def reference(folder: Path, net: str) -> Any:
    """The lpips package's own module with these weights."""
    lpips = pytest.importorskip("lpips")
    with pytest.warns(UserWarning, match="deprecated"), torch.device("meta"):
        module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    features = load_file(folder / f"{net}.safetensors")
    state = torch.load(folder / f"{net}_heads.pth")
    for name in module.state_dict():
        start, _, rest = name.partition(".")
        if start == "net":
            state[name] = features["features." + rest.partition(".")[2]]
        elif start == "lins":
            state[name] = state["lin" + rest]
        elif start == "scaling_layer":
            state[name] = torch.tensor(getattr(perceptual, f"_{rest.upper()}")).view(1, 3, 1, 1)
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


@pytest.mark.parametrize(("net", "size"), [(net, size) for net in NETS for size in SIZES[net]])
def test_equals_the_lpips_package(folder, net, size):
    ours, theirs = make(folder, net), reference(folder, net)
    image, target = pair(3, *size)
    target.requires_grad_()
    found, expected = ours.distances(image, target), theirs(image, target).flatten()
    assert expected.min() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    weights = torch.randn(3)
    gradients = torch.autograd.grad((found * weights).sum(), (image, target))
    wanted = torch.autograd.grad((expected * weights).sum(), (image, target))
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5 * want.abs().max().item(), rtol=0)


def naive(folder: Path, image: Tensor, target: Tensor) -> Tensor:
    """The definition in float64, with AlexNet, one pixel of features at a time."""
    state = load_file(folder / "alex.safetensors")
    heads = torch.load(folder / "alex_heads.pth").values()
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    x = (torch.stack([image, target]).double() - shift) / scale
    total = 0.0
    steps = [(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]
    for (layer, stride, padding), head in zip(steps, heads, strict=True):
        x = F.max_pool2d(x, 3, 2) if layer in (3, 6) else x
        weight, bias = (state[f"features.{layer}.{kind}"].double() for kind in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, stride, padding).clamp(min=0)
        a, b = F.normalize(x, dim=1, eps=1e-10).flatten(2)
        places = [head.flatten().double() @ (p - q) ** 2 for p, q in zip(a.t(), b.t(), strict=True)]
        total += sum(places) / len(places)
    return total


def test_equals_the_definition(folder):
    image, target = pair(2, 40, 37)
    found = make(folder).distances(image, target)
    expected = torch.stack([naive(folder, *images) for images in zip(image, target, strict=True)])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_forward_is_the_mean(folder):
    loss, (image, target) = make(folder), pair(3, 40, 40)
    found = loss(image, target)
    assert found.shape == ()
    assert found.item() == pytest.approx(loss.distances(image, target).mean().item())
    found.backward()
    assert image.grad.abs().sum() > 0


def test_has_torchvisions_names():
    models = pytest.importorskip("torchvision.models")
    for net, entry in NETS.items():
        with torch.device("meta"):
            state = getattr(models, entry.name)(weights=None).state_dict()
        wanted = {name: t.shape for name, t in state.items() if name.startswith("features.")}
        assert {name: t.shape for name, t in Trunk(net).named_buffers()} == wanted


def test_nothing_to_train_save_or_drop(folder):
    loss, (image, target) = make(folder), pair(2, 40, 40)
    before = loss.eval()(image, target)
    assert torch.equal(loss.train()(image, target), before)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    loss.requires_grad_(True)
    loss(image, target).backward()
    assert all(not b.requires_grad and b.grad is None for b in loss.buffers())
    torch.nn.Sequential(loss).load_state_dict({})


def test_copies(folder):
    loss, (image, target) = make(folder), pair(1, 40, 40)
    want = loss(image, target)
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), saved):
        assert torch.equal(twin(image, target), want)


def test_moves_but_is_not_rounded(folder):
    loss, (image, target) = make(folder), pair(2, 40, 40)
    want = loss(image, target)
    assert torch.equal(copy.deepcopy(loss).half()(image, target), want)
    double = copy.deepcopy(loss).double()(image.double(), target.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), want)
    last = copy.deepcopy(loss).to(memory_format=torch.channels_last)
    assert last.trunk.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    found = last(image.to(memory_format=torch.channels_last), target)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("gradients", [False, True])
def test_parts_of_a_batch_change_nothing(folder, gradients, monkeypatch):
    loss, (image, target) = make(folder), pair(5, 40, 40)
    image.requires_grad_(gradients)
    want = loss.distances(image, target)
    calls, plain = [], loss._distances
    monkeypatch.setitem(NETS, "alex", NETS["alex"]._replace(pixels=2 * 1600 + 1))
    monkeypatch.setattr(loss, "_distances", lambda *x: calls.append(len(x[0])) or plain(*x))
    found = loss.distances(image, target)
    assert calls == [2, 2, 1]
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    if gradients:
        weights = torch.randn(5)
        one, other = (torch.autograd.grad(d @ weights, image)[0] for d in (want, found))
        torch.testing.assert_close(one, other, atol=1e-5 * one.abs().max().item(), rtol=0)


def test_memory_does_not_grow_with_the_batch(folder, monkeypatch):
    monkeypatch.setitem(NETS, "alex", NETS["alex"]._replace(pixels=64 * 64))
    loss = make(folder)

    def step(batch: int) -> int:
        image, target = pair(batch, 64, 64)
        return peak_bytes(lambda: loss(image, target).backward())

    images = 3 * 64 * 64 * 4
    # normalized twice, a gradient and its like; not one image's features, about ten images
    assert step(9) - step(1) < 8 * 6 * images


def test_backward_runs_no_network(folder):
    loss, (image, target) = make(folder), pair(2, 40, 40)
    found = loss(image, target)
    with Recorder() as seen:
        (once,) = torch.autograd.grad(found, image, retain_graph=True)
        (twice,) = torch.autograd.grad(3 * found, image)
    assert "mul" in seen.names
    assert not any("conv" in name for name in seen.names)
    torch.testing.assert_close(twice, 3 * once)


def test_there_is_no_second_derivative(folder):
    image, target = pair(1, 40, 40)
    loss = make(folder)(image, target)
    with pytest.raises(NotImplementedError, match="LPIPS has no second derivative"):
        torch.autograd.grad(loss, image, create_graph=True)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_gradients(folder, net):
    loss = make(folder, net).double()
    image, target = (x.detach().double().requires_grad_() for x in pair(2, 31, 31))
    assert torch.autograd.gradcheck(loss.distances, (image, target), fast_mode=True)


def test_activation_checkpointing(folder):
    loss, (image, target) = make(folder), pair(2, 40, 40)
    (want,) = torch.autograd.grad(loss(image, target), image)
    again = torch.utils.checkpoint.checkpoint(loss, image, target, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, image)[0], want)


def test_equal_images_are_at_zero(folder):
    _, target = pair(2, 40, 40)
    image = target.clone().requires_grad_()
    found = make(folder)(image, target)
    assert found == 0
    found.backward()
    assert not image.grad.any()


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dead", [False, True])
def test_extremes_are_finite(folder, value, dead):
    loss = make(folder)
    if dead:
        # no feature of the last layer is above zero: vectors of length zero
        loss.trunk.features[10].bias.fill_(-1e9)
    target = torch.zeros(1, 3, 40, 40)
    image = torch.full_like(target, value)
    image[..., :7] = -value
    image.requires_grad_()
    # looks for NaN in between too; lpips has it where vectors have length zero
    with torch.autograd.set_detect_anomaly(True):
        found = loss(image, target)
        found.backward()
    assert found.isfinite()
    assert image.grad.isfinite().all()


def test_autocast(folder):
    loss, (image, target) = make(folder), pair(4, 64, 64)
    want = loss.distances(image, target)
    (gradient,) = torch.autograd.grad(want.sum(), image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss.distances(image, target)
    assert found.dtype == torch.float32
    assert not torch.equal(found, want)
    torch.testing.assert_close(found, want, atol=0, rtol=0.03)
    (rounded,) = torch.autograd.grad(found.sum(), image)
    assert F.cosine_similarity(rounded.flatten(), gradient.flatten(), dim=0) > 0.97
    # in float16 gradients would vanish
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(loss.distances(image, target), want)


def test_half_precision_images(folder):
    loss, (image, target) = make(folder), pair(2, 40, 40)
    half, target = image.detach().half().requires_grad_(), target.half()
    found = loss(half, target)
    assert torch.equal(found, loss(half.float(), target.float()))
    found.backward()
    assert half.grad.dtype == torch.float16
    assert half.grad.any()


def test_an_empty_batch(folder):
    image = torch.zeros(0, 3, 40, 40, requires_grad=True)
    found = make(folder)(image, image.detach())
    assert found == 0
    found.backward()
    assert image.grad.shape == image.shape


class Recorder(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


def test_only_the_first_call_reads_values(folder):
    loss, (image, target) = make(folder), pair(2, 40, 40)
    seen = []
    for _ in range(2):
        with Recorder() as recorder:
            loss(image, target).backward()
        seen.append("_local_scalar_dense" in recorder.names)
    assert seen == [True, False]


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_images(folder, net):
    loss, side = make(folder, net), NETS[net].smallest
    assert loss(*pair(1, side, side)).isfinite()
    with pytest.raises(ValueError, match=rf"{net}.*needs images of {side} x {side} or more, got"):
        loss(*pair(1, side + 1, side - 1))


def test_bad_images(folder):
    loss = make(folder)
    images = torch.zeros(2, 3, 40, 40)
    with pytest.raises(ValueError, match=r"in -1\.\.1, got image of torch.uint8; .*127\.5"):
        loss(images.byte(), images)
    with pytest.raises(ValueError, match=r"got target of torch.int64"):
        loss(images, images.long())
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\), got image of \(2, 1, 40, 40\)"):
        loss(images[:, :1], images[:, :1])
    with pytest.raises(ValueError, match=r"got target of \(3, 40, 40\)"):
        loss(images, images[0])
    with pytest.raises(ValueError, match=r"one shape, got .*\(1, 3, 40, 40\)"):
        loss(images, images[:1])
    with pytest.raises(ValueError, match=r"target in -1\.\.1, got values from 0 to 255"):
        loss(images, torch.linspace(0, 255, images.numel()).view_as(images))
    # reconstructions and resampled images overshoot
    assert loss(images + 3, images + 1.2).isfinite()


def test_an_unknown_net():
    with pytest.raises(ValueError, match="has the nets vgg, alex, squeeze, got net='vgg16'"):
        LPIPS("vgg16")


def test_a_file_in_torchs_format(folder, tmp_path):
    state = load_file(folder / "alex.safetensors")
    # rounded files are fine
    torch.save({name: t.half() for name, t in state.items()}, tmp_path / "alexnet.pth")
    loss = LPIPS(
        "alex", weights=os.fspath(tmp_path / "alexnet.pth"), heads=folder / "alex_heads.pth"
    )
    assert torch.equal(loss.trunk.features[3].weight, state["features.3.weight"].half().float())


def test_bad_files(folder, tmp_path):
    heads = folder / "alex_heads.pth"
    with pytest.raises(FileNotFoundError, match=r"no file weights=nowhere\.pth"):
        LPIPS("alex", weights="nowhere.pth", heads=heads)
    with pytest.raises(FileNotFoundError, match=r"no file heads=nowhere\.pth"):
        LPIPS("alex", heads="nowhere.pth")
    with pytest.raises(ValueError, match=r"has features\.12\.weight, which alexnet has not"):
        LPIPS("alex", weights=_edited(folder, tmp_path, {"features.12.weight": torch.ones(2)}))
    with pytest.raises(
        ValueError, match=r"features.0.bias of shape \(64,\) and has one of .*\(2,\)"
    ):
        LPIPS("alex", weights=_edited(folder, tmp_path, {"features.0.bias": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"features\.6\.weight .* and has none: weights="):
        LPIPS("alex", weights=_edited(folder, tmp_path, {"features.6.weight": None}))
    with pytest.raises(ValueError, match=r"lin0 of shape \(64,\).*has none: heads="):
        LPIPS("alex", weights=folder / "alex.safetensors", heads=folder / "alex.safetensors")
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=f"cannot read weights=.*{name}.* damaged or no plain"):
            LPIPS("alex", weights=tmp_path / name, heads=heads)
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="something else than tensors by name"):
        LPIPS("alex", weights=tmp_path / "list.pth", heads=heads)
    torch.save(Trunk("alex"), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"cannot read weights=.*module\.pth"):
        LPIPS("alex", weights=tmp_path / "module.pth", heads=heads)


def _edited(folder: Path, tmp_path: Path, changes: dict[str, Tensor | None]) -> Path:
    state = load_file(folder / "alex.safetensors") | changes
    path = tmp_path / "edited.safetensors"
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


def test_downloads_only_what_is_not_given(folder, monkeypatch):
    asked = []

    def download(url: str, **options: Any) -> dict[str, Tensor]:
        asked.append(url)
        assert options == {"map_location": "cpu", "check_hash": True, "weights_only": True}
        return load_file(folder / "alex.safetensors")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    make(folder)
    assert not asked
    LPIPS("alex", heads=folder / "alex_heads.pth")
    assert asked == ["https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"]


def test_the_urls_are_torchvisions():
    models = pytest.importorskip("torchvision.models")
    for entry in NETS.values():
        assert models.get_model_weights(entry.name)["IMAGENET1K_V1"].url == entry.url


def test_offline(folder, monkeypatch):
    def fail(*args: Any, **options: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(OSError, match=r"no route to host.* Pass weights=, a local file of .*vgg16"):
        LPIPS(heads=folder / "vgg_heads.pth")


def test_without_the_lpips_package(folder, monkeypatch):
    monkeypatch.setattr(trunks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "xq\[vision\]", or pass heads='):
        LPIPS("alex", weights=folder / "alex.safetensors")


@pytest.mark.parametrize("net", NETS)
def test_heads_come_from_the_lpips_package(folder, net):
    pytest.importorskip("lpips")
    loss = LPIPS(net, weights=folder / f"{net}.safetensors")
    heads = [getattr(loss, f"lin{i}") for i in range(len(NETS[net].taps))]
    assert all(head.min() >= 0 and head.max() > 0.1 for head in heads)


@pytest.mark.compile
def test_one_graph(folder):
    loss, (image, target) = make(folder), pair(2, 40, 40)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, found = loss(image, target), compiled(image, target)
    torch.testing.assert_close(found, want)
    (expected,) = torch.autograd.grad(want, image)
    (gradient,) = torch.autograd.grad(found, image)
    torch.testing.assert_close(gradient, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(compiled(image, target), loss(image, target))

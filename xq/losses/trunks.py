"""The convolutions of VGG16, AlexNet and SqueezeNet 1.1 under torchvision's names, frozen.

Weights are buffers outside the saved state: they move with the module, no optimizer finds them,
and no checkpoint carries them.
"""

import os
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PathLike = str | os.PathLike[str]


class _Net(NamedTuple):
    """A trunk: its layers, which of them are compared, and where its weights come from.

    `pixels` is how many of images it takes at a time on a CPU, where that is fastest.
    """

    layers: Callable[[], list[nn.Module]]
    taps: tuple[int, ...]
    channels: tuple[int, ...]
    smallest: int
    pixels: int
    name: str
    url: str


class Trunk(nn.Module):
    """`features` up to the last layer that LPIPS compares, without weights yet.

    Args:
        net: "vgg", "alex" or "squeeze".
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        self.features = nn.Sequential(*NETS[net].layers())
        self.taps = NETS[net].taps


class _Convolution(nn.Module):
    """A convolution that nothing can train."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        weight = torch.empty(outputs, inputs, kernel, kernel)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", torch.empty(outputs), persistent=False)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o y x"]:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class _Fire(nn.Module):
    """SqueezeNet's block: a few channels, then 1x1 and 3x3 convolutions side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = _Convolution(inputs, squeezed, 1)
        self.expand1x1 = _Convolution(squeezed, expanded, 1)
        self.expand3x3 = _Convolution(squeezed, expanded, 3, padding=1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        x = F.relu_(self.squeeze(x))
        return F.relu_(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def _vgg() -> list[nn.Module]:
    layers, inputs = [], 3
    for stage in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        layers += [nn.MaxPool2d(2, 2)] if layers else []
        for outputs in stage:
            layers += [_Convolution(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = outputs
    return layers


def _alex() -> list[nn.Module]:
    return [
        _Convolution(3, 64, 11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        _Convolution(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        _Convolution(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        _Convolution(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        _Convolution(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
    ]


def _squeeze() -> list[nn.Module]:
    return [
        _Convolution(3, 64, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(64, 16, 64),
        _Fire(128, 16, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(128, 32, 128),
        _Fire(256, 32, 128),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(256, 48, 192),
        _Fire(384, 48, 192),
        _Fire(384, 64, 256),
        _Fire(512, 64, 256),
    ]


_HUB = "https://download.pytorch.org/models/"
NETS = {
    "vgg": _Net(
        layers=_vgg,
        taps=(3, 8, 15, 22, 29),
        channels=(64, 128, 256, 512, 512),
        smallest=16,
        pixels=1 << 16,
        name="vgg16",
        url=_HUB + "vgg16-397923af.pth",
    ),
    "alex": _Net(
        layers=_alex,
        taps=(1, 4, 7, 9, 11),
        channels=(64, 192, 384, 256, 256),
        smallest=31,
        pixels=1 << 17,
        name="alexnet",
        url=_HUB + "alexnet-owt-7be5be79.pth",
    ),
    "squeeze": _Net(
        layers=_squeeze,
        taps=(1, 4, 7, 9, 10, 11, 12),
        channels=(64, 128, 256, 384, 384, 512, 512),
        smallest=17,
        pixels=1 << 17,
        name="squeezenet1_1",
        url=_HUB + "squeezenet1_1-b8a52dc0.pth",
    ),
}


def load_trunk_(trunk: Trunk, net: str, path: PathLike | None) -> None:
    """Fills the trunk from a file of torchvision's, downloaded where no path is given."""
    state = _download(net) if path is None else read_state("weights", path, "features.")
    wanted = dict(trunk.named_buffers())
    unknown = [name for name in state if name.startswith("features.") and name not in wanted]
    if unknown:
        raise ValueError(
            f"LPIPS: {path} has {unknown[0]}, which {NETS[net].name} has not; "
            f"weights= for net={net!r} is a file of torchvision's {NETS[net].name}"
        )
    fill_(wanted, state, f"weights={path}, a file of torchvision's {NETS[net].name}")


def load_heads_(heads: dict[str, Tensor], net: str, path: PathLike | None) -> None:
    """Fills the linear heads from a file, by default that of the lpips package."""
    source = _packaged_heads(net) if path is None else path
    state = read_state("heads", source, "lin")
    state = {name.replace(".model.1.weight", ""): tensor for name, tensor in state.items()}
    state = {name: tensor.flatten() for name, tensor in state.items()}
    fill_(heads, state, f"heads={source}, lin0.model.1.weight and so on of net={net!r}")


@torch.no_grad()
def fill_(wanted: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Copies by name; every tensor must be there in its shape.

    Raises:
        ValueError: If one is not.
    """
    for name, tensor in wanted.items():
        found = state.get(name)
        if found is None or found.shape != tensor.shape:
            got = "has none" if found is None else f"has one of shape {tuple(found.shape)}"
            raise ValueError(
                f"LPIPS wants {name} of shape {tuple(tensor.shape)} and {got}: {source}"
            )
        tensor.copy_(found)


def read_state(argument: str, path: PathLike, prefix: str) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file whose names start with `prefix`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"LPIPS finds no file {argument}={path}")
    try:
        state = _contents(path)
    except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"LPIPS cannot read {argument}={path}, which is damaged or no plain state dict "
            f"(.safetensors or .pth): {error}"
        ) from error
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _contents(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError("it holds something else than tensors by name")
    return state


def _download(net: str) -> dict[str, Any]:
    """The file of torchvision, from torch.hub's cache if it was there before."""
    name, url = NETS[net].name, NETS[net].url
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        raise OSError(
            f"LPIPS has no weights: {url} cannot be fetched ({error}). Pass weights=, a local "
            f"file of torchvision's {name} (.safetensors or .pth), or put that file into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error


def _packaged_heads(net: str) -> Path:
    # found without an import, which would load torchvision
    package = find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "LPIPS takes its linear heads from the lpips package, which is not installed: "
            f'pip install "xq[vision]", or pass heads=, a local copy of its {net}.pth'
        )
    return Path(package.submodule_search_locations[0], "weights", "v0.1", f"{net}.pth")

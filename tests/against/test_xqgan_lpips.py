"""LPIPS against XQ-GAN's own in eval mode; in training mode its heads drop half their channels."""

import pytest
import torch
from golden import assert_gradient, assert_values, leaf, load
from hashed import hashed, hashed_images, hashed_parameter
from safetensors.torch import save_file

from xq.losses import LPIPS
from xq.losses.trunks import NETS, Trunk

# layers of its five slices
SLICES = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}


@pytest.fixture(scope="module")
def loss(tmp_path_factory) -> LPIPS:
    folder = tmp_path_factory.mktemp("hashed")
    trunk, heads = {}, {}
    for name, empty in Trunk("vgg").named_buffers():
        _, layer, kind = name.split(".")
        key = f"lpips.net.slice{SLICES[int(layer)]}.{layer}.{kind}"
        trunk[name] = hashed_parameter(key, tuple(empty.shape))
    for i, channels in enumerate(NETS["vgg"].channels):
        key = f"lin{i}.model.1.weight"
        heads[key] = hashed(f"lpips.{key}", (1, channels, 1, 1)).abs()
    save_file(trunk, folder / "trunk.safetensors")
    save_file(heads, folder / "heads.safetensors")
    loss = LPIPS(weights=folder / "trunk.safetensors", heads=folder / "heads.safetensors")
    loss.scale.copy_(0.5 * hashed("lpips.scaling_layer.scale", (1, 3, 1, 1)))
    return loss


def test_distances_and_gradients(loss):
    numbers = load("xqgan_lpips")
    target = hashed_images("lp_a", (2, 3, 64, 64))
    image = leaf(0.3 * hashed_images("lp_b", (2, 3, 64, 64)) + 0.7 * target)
    distances = loss.train().distances(image, target)
    assert_values(distances, numbers["distances"], atol=1e-6)
    (gradient,) = torch.autograd.grad(distances.sum(), image)
    assert_gradient(gradient[..., ::4, ::4], numbers["gradient"], tolerance=1e-5)

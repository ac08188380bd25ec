import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from xq.backbones import timm_model
from xq.losses.frozen import Frozen


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = Frozen(network())
        self.head = nn.Conv2d(2, 1, 1)

    def forward(self, x):
        return self.head(self.frozen(x))


def test_only_the_rest_is_trained_and_saved():
    owner = Owner()
    assert [key for key, _ in owner.named_parameters()] == ["head.weight", "head.bias"]
    assert set(owner.state_dict()) == {"head.weight", "head.bias"}
    # as a safetensors file, without the versions of modules
    owner.load_state_dict(dict(Owner().state_dict()))
    # as training loops switch a discriminator off and on
    owner.requires_grad_(False).requires_grad_(True)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    owner(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in owner.frozen.buffers())


def test_stays_in_evaluation_mode():
    owner = Owner().train()
    assert owner.training
    assert not any(module.training for module in owner.frozen.modules())
    before = copy.deepcopy(dict(owner.frozen.named_buffers()))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(owner(x), owner(x))
    torch.testing.assert_close(dict(owner.frozen.named_buffers()), before, atol=0, rtol=0)


def test_computes_what_the_module_computes():
    plain = network().eval()
    frozen = Frozen(copy.deepcopy(plain))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(frozen(x), plain(x))
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(twin(x), plain(x))
        assert not twin.state_dict()


def test_moves_along():
    owner = Owner().double()
    assert {b.dtype for b in owner.frozen.buffers() if b.is_floating_point()} == {torch.float64}
    assert owner(torch.randn(1, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64
    assert all(b.is_meta for b in owner.to("meta").frozen.buffers())


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'Someone needs timm: pip install "xq\[vision\]"'):
        timm_model("Someone", "vit_small_patch16_224.dino", img_size=224)

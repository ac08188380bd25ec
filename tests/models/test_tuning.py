import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from xq.models import (
    CNNEncoder,
    Tokenizer,
    ViTDecoder,
    ViTEncoder,
    add_lora_,
    check_optimizer,
    freeze_,
    load_lora_,
    lora_state_dict,
    merge_lora_,
    save_lora,
)
from xq.quantizers import VQ, EMACodebook

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 1.0}
SIZES = {"image_size": 16, "patch_size": 4, "tokens": 2, "options": TINY}
ATTENTION = r"blocks\.\d+\.attn\.(qkv|proj)"


def tokenizer(seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    quantizer = VQ(6, 11, codebook=EMACodebook)
    return Tokenizer(ViTEncoder(6, **SIZES), quantizer, ViTDecoder(6, **SIZES))


def adapted(seed: int = 0) -> Tokenizer:
    model = tokenizer(seed)
    add_lora_(model.encoder)
    add_lora_(model.decoder, 3, 5.0, targets=ATTENTION)
    return model


def trained(model: Tokenizer, steps: int = 3) -> Tokenizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    check_optimizer(model, optimizer)
    for _ in range(steps):
        step(model, optimizer)
    return model


def step(model: Tokenizer, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    image = torch.randn(3, 3, 16, 16)
    found, q = model(image)
    (F.mse_loss(found, image) + q.losses.total()).backward()
    optimizer.step()


def state(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_frozen_backbones_stay_and_the_rest_trains():
    model = tokenizer()
    assert freeze_(model.encoder) is model.encoder
    before = state(model)
    trained(model)
    for key, value in model.state_dict().items():
        moved = not torch.equal(value, before[key])
        assert moved != key.startswith("encoder.backbone."), key


def test_full_tuning_moves_everything():
    model = tokenizer()
    before = state(model)
    trained(model)
    assert not [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_lora_changes_nothing_until_it_trains(part):
    model = tokenizer().eval()
    image = torch.randn(2, 3, 16, 16)
    expected = model(image).image
    assert add_lora_(getattr(model, part)) is getattr(model, part)
    assert torch.equal(model(image).image, expected)


def test_lora_trains_its_updates_and_what_is_outside():
    model, plain = adapted(), tokenizer()
    before, base = state(model), state(plain)
    trained(model)
    assert not torch.equal(
        model(torch.ones(1, 3, 16, 16)).image, plain(torch.ones(1, 3, 16, 16)).image
    )
    for key, value in model.state_dict().items():
        inside = ".backbone." in key and ".lora_" not in key and ".backbone.norm." not in key
        assert torch.equal(value, before[key]) == inside, key
        if inside:
            assert torch.equal(value, base[key.replace("base_layer.", "")]), key


def test_each_update_gets_a_gradient():
    model = trained(adapted())
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key


def test_which_layers_get_updates():
    model = adapted()
    for part, layers in (("encoder", "mlp.fc1 mlp.fc2"), ("decoder", "attn.qkv attn.proj")):
        names = {key.split(".lora_")[0] for key in model.state_dict() if ".lora_" in key}
        expected = {f"{part}.backbone.blocks.{i}.{n}" for i in range(2) for n in layers.split()}
        assert {name for name in names if name.startswith(part)} == expected
    # a rank of 8: inputs and outputs of both MLP layers, in both blocks
    count = sum(p.numel() for n, p in model.encoder.named_parameters() if ".lora_" in n)
    assert count == 2 * 2 * 8 * (16 + 64)


def test_the_patch_embedding_is_spared():
    encoder = add_lora_(ViTEncoder(6, **SIZES), targets=ATTENTION)
    assert type(encoder.backbone.patch_embed.proj) is torch.nn.Conv2d


def test_an_optimizer_from_before_is_noticed():
    model = tokenizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check_optimizer(model, optimizer)
    add_lora_(model.encoder)
    message = r"SGD does not hold 8 parameters that train \(encoder.backbone.*build it after add_l"
    with pytest.raises(ValueError, match=message):
        check_optimizer(model, optimizer)


def test_an_optimizer_may_hold_what_is_frozen():
    model = tokenizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    freeze_(model.encoder)
    check_optimizer(model, optimizer)
    before = state(model.encoder.backbone)
    step(model, optimizer)
    for key, value in model.encoder.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_merged_is_the_same_function_with_plain_names():
    model, plain = trained(adapted()).eval(), tokenizer()
    image, tokens = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 2, 6)
    expected = model.encoder(image), model.decoder(tokens)
    before = state(plain)
    assert merge_lora_(model) is model
    for found, wanted in zip((model.encoder(image), model.decoder(tokens)), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == list(before)
    weight = "encoder.backbone.blocks.1.mlp.fc1.weight"
    assert not torch.equal(model.state_dict()[weight], before[weight])
    assert all(p.requires_grad for p in model.parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(image).image, model(image).image)


def test_merged_models_take_lora_again_and_are_saved_whole(tmp_path):
    model = merge_lora_(trained(adapted())).eval()
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(image).image, model(image).image)
    add_lora_(model.encoder, 2)
    assert torch.equal(again(image).image, model.eval()(image).image)


def test_a_model_with_lora_says_how_it_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"ViTEncoder has LoRA layers.*merge_lora_.*save_lora"):
        adapted().save_pretrained(tmp_path / "model")


def test_saved_alone_and_loaded(tmp_path):
    path = tmp_path / "lora.safetensors"
    model = trained(adapted()).eval()
    save_lora(model, path)
    saved = load_file(path)
    assert saved.keys() == lora_state_dict(model).keys()
    inside = {k for k in saved if ".backbone." in k}
    assert all(".lora_" in key or ".backbone.norm." in key for key in inside)
    # the same base, without LoRA and with it
    for other in (tokenizer(), adapted()):
        assert load_lora_(other, path) is other
        assert state(other).keys() == state(model).keys()
        for key, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key
        image = torch.randn(2, 3, 16, 16)
        assert torch.equal(other.eval()(image).image, model(image).image)


def test_saved_of_an_encoder_alone(tmp_path):
    path = tmp_path / "lora.safetensors"
    torch.manual_seed(0)
    encoder = ViTEncoder(6, **SIZES)
    base = copy.deepcopy(encoder)
    add_lora_(encoder)
    image = torch.randn(2, 3, 16, 16)
    encoder(image).square().sum().backward()
    torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1).step()
    save_lora(encoder, path)
    assert torch.equal(load_lora_(base, path)(image), encoder(image))


def test_a_copy_for_averages_is_independent():
    model = trained(adapted())
    average = copy.deepcopy(model).requires_grad_(False)
    before = state(model)
    trained(model)
    for key, value in average.state_dict().items():
        assert torch.equal(value, before[key]), key
    with torch.no_grad():
        for mine, new in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(new, 0.5)
    key = "encoder.backbone.blocks.0.mlp.fc1.lora_A.default.weight"
    expected = (before[key] + model.state_dict()[key]) / 2
    torch.testing.assert_close(average.state_dict()[key], expected)
    assert lora_state_dict(average).keys() == lora_state_dict(model).keys()
    merge_lora_(average)
    assert ".lora_" not in " ".join(average.state_dict())


def test_lora_with_checkpointing_gives_the_same_gradients():
    model = trained(adapted())
    other = copy.deepcopy(model)
    other.encoder.checkpointing = other.decoder.checkpointing = True
    image = torch.randn(2, 3, 16, 16)
    for each in (model, other):
        each.zero_grad()
        each(image).image.square().mean().backward()
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "qkv"}, r"finds no layer for targets='qkv' in vit_base_.*blocks.0.attn.qkv"),
        ({"rank": 0}, "needs rank >= 1, .*got rank=0"),
        ({"alpha": 0.0}, "alpha > 0 .*alpha=0.0"),
        ({"dropout": 1.0}, "dropout < 1, .*dropout=1.0"),
    ],
)
def test_bad_arguments(options, message):
    encoder = ViTEncoder(6, **SIZES)
    keys = list(encoder.state_dict())
    with pytest.raises(ValueError, match=message):
        add_lora_(encoder, **options)
    assert list(encoder.state_dict()) == keys


def test_lora_twice():
    with pytest.raises(ValueError, match="found LoRA layers in this ViTEncoder; merge_lora_"):
        add_lora_(adapted().encoder)


@pytest.mark.parametrize("function", [merge_lora_, lora_state_dict])
def test_a_model_without_lora(function):
    with pytest.raises(ValueError, match=f"{function.__name__} finds no LoRA in this Tokenizer"):
        function(tokenizer())


@pytest.mark.parametrize("function", [freeze_, add_lora_])
def test_other_networks(function):
    with pytest.raises(ValueError, match=f"{function.__name__} takes a ViTEncoder .* CNNEncoder"):
        function(CNNEncoder(4, channels=8, multipliers=(1,), blocks=1, z_channels=4))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'add_lora_ needs peft: pip install "xq\[vision\]"'):
        add_lora_(ViTEncoder(6, **SIZES))


def test_files_that_do_not_fit(tmp_path):
    path, other = tmp_path / "lora.safetensors", tmp_path / "other.safetensors"
    save_lora(adapted(), path)
    with pytest.raises(ValueError, match="'encoder', which is no ViT of this model"):
        load_lora_(ViTEncoder(6, **SIZES), path)
    one_more = adapted()
    merge_lora_(one_more.encoder)
    add_lora_(one_more.encoder, 2)
    with pytest.raises(ValueError, match=r"LoRA with \{'rank': 8.*encoder \{'rank': 2"):
        load_lora_(one_more, path)
    only = tokenizer()
    add_lora_(only.encoder)
    save_lora(only, other)
    with pytest.raises(ValueError, match=r"has no LoRA for \['decoder'\]"):
        load_lora_(adapted(), other)
    save_file(load_file(path), other)
    with pytest.raises(ValueError, match="is none of save_lora"):
        load_lora_(tokenizer(), other)
    other.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_lora_(tokenizer(), other)
    with pytest.raises(FileNotFoundError):
        load_lora_(tokenizer(), tmp_path / "none.safetensors")


def test_a_file_of_another_size_leaves_the_model_as_it_was(tmp_path):
    path = tmp_path / "lora.safetensors"
    sizes = SIZES | {"tokens": 4}
    save_lora(add_lora_(ViTEncoder(6, **sizes)), path)
    encoder = ViTEncoder(6, **SIZES)
    before = state(encoder)
    with pytest.raises(ValueError, match=r"latent_tokens of shape \(1, 16, 16\), the model of"):
        load_lora_(encoder, path)
    after = encoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())

"""The ViT tokenizers against XQ-GAN's own, tiny and at real size.

Deliberate differences:
- Branches are groups of tokens there, groups of channels here; the numbers are the same.
- Its 1x1 convolutions around the quantizer are linear maps of the encoder and the decoder here.
- Which level a token has is a buffer there (`lvl1LC`), which only fits images as wide as a patch
  has pixels; here it follows from the sizes.
- Options that no released model uses are not here: own positions for the queries, patches that do
  not see queries, mask tokens conditioned on the latents, other pixel heads.
"""

import pytest
import torch
import torch.nn.functional as F
from golden import Numbers, assert_gradient, assert_values, below, load
from hashed import fill_hashed_, hashed, hashed_images, hashed_parameter

from xq.backbones import timm_model
from xq.losses import ContrastiveLoss, FeatureAlignment, TimmTeacher
from xq.models import Tokenizer, ViTDecoder, ViTEncoder
from xq.models.checkpoints import formats
from xq.quantizers import VQ, ProductQuantizer, Pyramid, Refine, ResidualQuantizer

BETA = 0.25
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TABLE = formats()["xqgan"].table({})


def original_name(name: str) -> str:
    (original,) = TABLE.revert({name: torch.empty(1, 1)})
    return original


def tokenizer(quantizer, tokens, options=None) -> Tokenizer:
    P = getattr(quantizer, "P", 1)
    encoder = ViTEncoder(quantizer.dim, branches=P, tokens=tokens, options=options)
    return Tokenizer(encoder, quantizer, ViTDecoder(quantizer.dim, tokens=tokens, options=options))


def multiscale() -> ResidualQuantizer:
    grid = Pyramid((1, 2, 3, 4), [Refine(8) for _ in range(4)])
    return ResidualQuantizer(VQ(8, 64, metric="cosine"), multiscale=grid, shared=True)


QUANTIZERS = {
    "vq": lambda: VQ(8, 64, normalize=True),
    "vp2": lambda: ProductQuantizer(VQ(8, 64, normalize=True), P=2),
    "vp3": lambda: ProductQuantizer(VQ(8, 64, normalize=True), P=3),
    "msvrp2": lambda: ProductQuantizer(multiscale(), P=2),
}


@torch.no_grad()
def fill_(model) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(hashed_parameter(original_name(name), tuple(parameter.shape)))


@pytest.fixture(params=QUANTIZERS)
def tiny(request) -> tuple[Numbers, Tokenizer]:
    model = tokenizer(QUANTIZERS[request.param](), 4, TINY)
    fill_(model)
    return load(f"xqgan_vit_{request.param}"), model


def images() -> torch.Tensor:
    return hashed_images("sc_in", (2, 3, 256, 256))


@torch.no_grad()
def test_tiny_in_eval_mode(tiny):
    numbers, model = tiny
    model.eval()
    assert_values(model.encoder.features(images()), numbers["tokens"], atol=5e-4)
    assert_values(model.encoder(images()), numbers["features"], atol=5e-4)
    indices = model.encode(images())
    assert torch.equal(indices, numbers["indices"])
    assert_values(model.quantizer.decode(indices), numbers["z"])
    image = model.decode(indices).clamp(-1, 1)[:1, :, ::5, ::5]
    # in half precision: the rounding of numbers up to 1
    assert_values(image, numbers["image"].float(), atol=1e-3)


def alignment(model, numbers):
    """Its contrast of the last branch with a frozen ViT, projected by the encoder's own map."""
    teacher = timm_model(
        "the test", "vit_base_patch14_dinov2", pretrained=False, img_size=256, patch_size=16, **TINY
    )
    fill_hashed_(teacher, "semantic_model.")
    teacher = TimmTeacher(teacher)
    assert_values(teacher(images()).token, numbers["teacher"], atol=5e-4)
    loss = ContrastiveLoss(1.0, normalize=False)
    return FeatureAlignment(teacher, 8, loss=loss, projector=model.encoder.quant_conv)


def test_tiny_training_step(tiny):
    numbers, model = tiny
    image, q = model(images())
    commitment = BETA * getattr(getattr(model.quantizer, "branches", [None])[0], "depth", 1)
    assert_values(image[:, :, ::5, ::5], numbers["train.image"].float(), atol=4e-3)
    assert_values(q.losses.codebook, numbers["train.vq_loss"])
    assert_values(commitment * q.losses.commitment, numbers["train.commit_loss"])
    loss = F.mse_loss(image, images()) + q.losses.total(commitment=commitment)
    if "teacher" in numbers:
        P = getattr(model.quantizer, "P", 1)
        semantic = 0.1 * alignment(model, numbers)(images(), q.z.chunk(P, dim=-1)[-1])
        assert_values(semantic, numbers["train.sem_loss"])
        loss = loss + semantic
    loss.backward()
    found = {original_name(name): p.grad for name, p in model.named_parameters()}
    expected = below(numbers, "grad")
    assert {"encoder.latent_tokens", "decoder.to_pixel.model.weight"} < expected.keys()
    for name, gradient in expected.items():
        actual = found[name].flatten()
        actual = actual[:: 1 + 2 * (len(actual) // 4096)]
        assert_gradient(actual, gradient.flatten(), tolerance=1e-3)


@torch.no_grad()
def test_other_sizes():
    numbers = load("xqgan_vit_patch8")
    sizes = {"image_size": 64, "patch_size": 8, "tokens": 3, "options": TINY}
    encoder, decoder = ViTEncoder(8, **sizes), ViTDecoder(32, **sizes)
    for prefix, part in (("encoder.", encoder), ("decoder.", decoder)):
        for name, parameter in part.named_parameters():
            name = original_name(prefix + name)
            parameter.copy_(hashed_parameter(name, tuple(parameter.shape)))
    decoder.post_quant_conv.weight.copy_(torch.eye(32))
    decoder.post_quant_conv.bias.zero_()
    tokens = encoder.features(hashed_images("v64", (2, 3, 64, 64)))
    assert_values(tokens, numbers["tokens"], atol=5e-4)
    image = decoder(hashed("z9", (2, 9, 32)).unflatten(1, (3, 3)))[:, :, ::3, ::3]
    assert_values(image, numbers["image"], atol=5e-4)


FULL = {
    "VQ-4096": ("vq", lambda: VQ(64, 4096, normalize=True), 86_061_312, 49_216),
    "VP2-4096": (
        "vp2",
        lambda: ProductQuantizer(VQ(32, 4096, normalize=True), P=2),
        86_258_688,
        24_608,
    ),
}


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def remembered() -> dict[str, torch.Tensor]:
    """Both models have most names in common, and 170 million numbers take some seconds."""
    return {}


def full_size(make, remembered) -> Tokenizer:
    with torch.device("meta"):
        model = tokenizer(make(), 16)
    state = {}
    for name, value in TABLE.revert(model.state_dict()).items():
        key = f"{name} {tuple(value.shape)}"
        if key not in remembered:
            remembered[key] = hashed_parameter(name, tuple(value.shape))
        state[name] = remembered[key]
        if name.endswith("embedding.weight"):
            state[name.replace("embedding.weight", "ema_vocab_hit_SV")] = torch.zeros(4096)
    # as a released file is read
    read = formats()["xqgan"].read(state)
    assert read.quantizer.config() == model.quantizer.config()
    return read


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_real_size(name, remembered):
    file, make, encoder, projection = FULL[name]
    numbers, model = load(f"xqgan_vit_full_{file}"), full_size(make, remembered)
    assert count(model.encoder) == encoder + projection
    assert count(model.encoder.quant_conv) == projection
    assert count(model.decoder) == 85_865_472 + 49_920
    image = hashed_images("full_in", (1, 3, 256, 256))
    seen = []
    model.encoder.quant_conv.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    features = model.encoder(image)
    assert_values(seen[0][:, :2], numbers["tokens"], atol=5e-4)
    assert_values(features[:, ::5, ::5], numbers["features"], atol=5e-4)
    indices = model.quantizer.encode(features)
    assert torch.equal(indices, numbers["indices"])
    assert_values(model.decode(indices)[:, :, ::5, ::5], numbers["image"].float(), atol=5e-3)

"""What `examples/train_tokenizer.py` is made of, part by part."""

import io
import math
import tarfile
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from xq.models import (
    CNNDecoder,
    CNNEncoder,
    LinearDecoder,
    LinearEncoder,
    Sum,
    Tokenizer,
    ViTEncoder,
    fit_pca_,
)
from xq.quantizers import VQ, EMACodebook, ProductQuantizer

EXAMPLES = Path(__file__).parents[2] / "examples"
# parameters that train, in millions, and the start of the discriminator, of the released models
RELEASED = {
    "vq_4096": (172.29, 56),
    "vq_8192": (172.24, 56),
    "robusttok": (172.29, 56),
    "vp2_4096": (172.46, 56),
    "vp2_16384": (173.25, 56),
    "msvr10p2_4096": (172.33, 56),
    "msvr10p2_8192": (172.59, 56),
    "msvr10p2_16384": (173.11, 56),
    "msbr10p2_4096": (171.96, 64),
    "msbr10p2_16384": (171.96, 64),
}


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def png(pixels: np.ndarray) -> io.BytesIO:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    data.seek(0)
    return data


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Fifty pictures of one grey each, with labels, in five shards."""
    (tmp_path / "shards").mkdir()
    for k in range(5):
        with tarfile.open(tmp_path / "shards" / f"{k}.tar", "w") as shard:
            for i in range(10 * k, 10 * k + 10):
                data = png(np.full((9, 9), i, dtype=np.uint8)).getvalue()
                for kind, content in (("cls", b"%d" % (i % 3)), ("png", data), ("txt", b"!")):
                    member = tarfile.TarInfo(f"part.{k}/{i:03d}.{kind}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    return tmp_path / "shards"


@pytest.mark.parametrize("name", [*RELEASED, "laptop", "tiny"])
def test_shipped_configurations(name):
    from common.config import as_namespace, names, read_config
    from common.parts import DISCRIMINATORS, make_tokenizer

    assert set(names()) == {*RELEASED, "laptop", "tiny"}
    config = as_namespace(read_config(name, [("model.pretrained", "false")]))
    with torch.device("meta"):
        tokenizer = make_tokenizer(config.model)
    assert config.discriminator.kind in [*DISCRIMINATORS, ""]
    if name not in RELEASED:
        return
    size, start = RELEASED[name]
    assert sum(p.numel() for p in tokenizer.parameters()) / 1e6 == pytest.approx(size, abs=0.006)
    assert read_config(name)["model"]["pretrained"]
    assert (config.data.batch, config.run.epochs, config.data.size) == (1024, 200, 256)
    assert config.optimizer.lr * 1024 / config.optimizer.lr_batch == pytest.approx(2.4e-4)
    assert config.discriminator.start == start
    binary, multiscale = name.startswith("msb"), name.startswith("ms")
    assert config.dropout.p == (0.1 if multiscale else 0)
    assert config.loss.regularizer == (0.1 if binary else 0)
    assert config.optimizer.weight_decay == (5e-5 if binary else 0)
    # a sum over ten scales there, a mean here
    assert config.loss.commitment == (2.5 if multiscale and not binary else 0.25)
    assert config.semantic.normalize is binary
    for part in (config.semantic, config.detail):
        assert not part.weight or part.teacher in timm.list_models()


def test_the_command_line_has_the_last_word(tmp_path):
    from common.config import command_line, differences, read_config

    (tmp_path / "own.toml").write_text("[data]\nbatch = 8\n[model.arguments]\ncodebook_size = 1\n")
    words = "--data.size 64 --set optimizer.lr=1 --model.arguments.codebook_size=2 --run.out=7 "
    words += "--semantic.branch -2 --data.flip false --model.arguments.deep.er {a=[1]}"
    config = read_config(tmp_path / "own.toml", command_line(words.split()))
    assert (config["data"]["batch"], config["data"]["size"]) == (8, 64)
    assert config["optimizer"]["lr"] == 1.0
    assert type(config["optimizer"]["lr"]) is float
    assert config["model"]["arguments"] == {"codebook_size": 2, "deep": {"er": {"a": [1]}}}
    assert config["run"]["out"] == "7"
    assert config["semantic"]["branch"] == -2
    assert config["data"]["flip"] is False
    assert "data.batch was 1024, is 8" in differences(read_config(None), config)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("[data]\nbach = 8", "", r"own\.toml: there is no setting data\.bach; .* is data\.batch"),
        (
            "",
            "--optimizer.rl 1",
            r"no setting optimizer\.rl; the nearest is optimizer\.lr",
        ),
        ("", "--data.batch.x 1", r"there is no setting data\.batch\.x; .* is data\.batch"),
        ("", "--data.batch many", r"--data\.batch: data\.batch takes an integer, got 'many'"),
        ("", "--data.batch true", "takes an integer, got True"),
        ("data = 3", "", "data is a section, got 3"),
        ("", "--model.arguments 3", r"model\.arguments is a table of arguments, got 3"),
        ("[data\n", "", r"own\.toml is no TOML"),
        ("", "--batch 4", "'--batch' is no option; settings are written --data.batch 64"),
        ("", "--data.batch", r"--data\.batch needs a value"),
    ],
)
def test_bad_settings(tmp_path, text, words, message):
    from common.config import command_line, read_config

    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "own.toml", command_line(words.split()))


def test_no_such_configuration():
    from common.config import read_config

    with pytest.raises(FileNotFoundError, match="nowhere is no file; examples/configs has laptop"):
        read_config("nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "no tokenizer: --config NAME takes a configuration"),
        ("--model.preset nothing", "model.preset is one of bsq_vit, .* got 'nothing'"),
        ("--model.preset vqgan --model.arguments.size 3", "unexpected keyword argument 'size'"),
        ("--model.preset vqgan --model.pretrained true", "unexpected keyword .*'pretrained'"),
        ("--config laptop --model.preset vq", "are two tokenizers; leave one out"),
        ("--config laptop --model.encoder some", "are full, lora, frozen; got 'some'"),
        ("--config laptop --model.encoder lora", "takes a ViTEncoder or ViTDecoder, got a CNNEnc"),
        ("--config laptop --model.checkpointing true", "is for transformers, not for a CNNEncoder"),
        ("--config laptop --model.weights x", "are those of a ViT, not of a CNNEncoder"),
        ("--config laptop --init nowhere.pt", "nowhere.pt"),
        ("--config laptop --discriminator.kind gan", "is one of dino, patchgan, stylegan or empty"),
        ("--config laptop --loss.pixels l3", "loss.pixels is one of l1, l2; got 'l3'"),
        ("--config laptop --semantic.weight 1", "so semantic.teacher is needed"),
        ("--config laptop --detail.weight 1 --detail.branch 2", "= 2, and there are 2 branches"),
        ("--config laptop --data.batch 0", "data.batch = 0 cannot be shared by 1 processes"),
        ("--config laptop --data.accumulate 3", "16 cannot be shared .* 15 can"),
        ("--config laptop --data nowhere", "nowhere is neither .demo., nor a folder, nor .tar"),
        ("--config laptop --data.broken mend", "data.broken is one of stop, skip; got 'mend'"),
        ("--config laptop --save.on_error mend", "save.on_error is one of stop, skip"),
        ("--config laptop --save.last 0", "save.last must be 1 or more"),
        ("--config laptop --eval.every 0", "eval.every must be 1 or more, got 0"),
        ("--config laptop --eval.pictures 0", "eval.pictures must be 1 or more, got 0"),
        ("--config laptop --optimizer.clip -1.0", r"optimizer.clip must be 0 or more, got -1\.0"),
        ("--config laptop --optimizer.betas [0.9]", r"two numbers in \[0, 1\), got \[0\.9\]"),
        ("--config laptop --data.channels 2", "data.channels is 1 or 3, got 2"),
        ("--config laptop --model.compile me", "a backend such as .*inductor.*; got 'me'"),
        ("--config laptop --model.pretrained true", "model.pretrained is for a model.preset"),
        ("--config laptop --data.channels 1", "grey pictures of 64 x 64 .* CNNEncoder expects"),
        ("--config laptop --data.size 48", "colour pictures of 48 x 48 .* has scales up to 8 x 8"),
        (
            "--config laptop --data.channels 1 --model.tokenizer.encoder.image_channels 1",
            r"the decoder makes pictures of shape \(3, 64, 64\)",
        ),
        (
            # which is not asked for long
            "--config laptop --discriminator.kind stylegan "
            "--discriminator.arguments {image_size=128,max_channels=8}",
            "StyleGANDiscriminator was built for images of 128 x 128",
        ),
        ("--config laptop --model.start_batches 0", "model.start_batches must be 1 or more"),
        ("--config laptop --model.pca true", 'needs a Sum with a part "linear" .* got CNNEncoder'),
        ("--config laptop --data.zoom 0.9", "data.zoom must be 1 or more, got 0.9"),
        ("--config laptop --optimizer.ema 1.0", r"optimizer.ema is a decay in \[0, 1\), got 1.0"),
        ("--config laptop --data.per_class 1 --data.batch 1 --run.epochs 0", "are no step"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, shards, options, message):
    import train_tokenizer

    words = ["--data", str(shards), *options.split(), "--out", str(tmp_path / "out")]
    if "run.epochs" in options:
        words += ["--steps", "0"]
    with pytest.raises(SystemExit, match=message):
        train_tokenizer.main(words)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_dropout_needs_scales():
    from common.run import Run

    run: Any = SimpleNamespace(config=SimpleNamespace(dropout=SimpleNamespace(p=0.1, minimum=1)))
    with pytest.raises(ValueError, match=r"dropout\.p needs a quantizer with several steps"):
        Run._dropout(run, SimpleNamespace(quantizer=VQ(4, 8)))


def test_nothing_is_downloaded_that_another_file_replaces(monkeypatch):
    from common import parts
    from common.config import as_namespace, read_config

    asked: list[dict[str, Any]] = []

    def vq(**arguments: Any) -> Any:
        asked.append(arguments)
        return SimpleNamespace(encoder=nn.Identity(), decoder=nn.Identity())

    monkeypatch.setattr(parts.presets, "vq", vq)
    for name in ("_loaded", "_load_backbones_"):
        monkeypatch.setattr(parts, name, lambda tokenizer, path: tokenizer)
    for changes in ([], [("model.init", "x")], [("model.weights", "x")]):
        given = [("model.preset", "vq"), ("model.pretrained", "true"), *changes]
        parts.make_tokenizer(as_namespace(read_config(None, given)).model)
    assert asked == [{"pretrained": True}, {}, {}]


def test_transformers_recompute_where_asked():
    from common.config import as_namespace, read_config
    from common.parts import make_tokenizer

    # a transformer of its own, and one within encoder and decoder
    for preset in ("msvr10p2", "vit_vqgan"):
        for asked in (False, True):
            changes = [("model.preset", preset), ("model.checkpointing", str(asked).lower())]
            with torch.device("meta"):
                tokenizer = make_tokenizer(as_namespace(read_config(None, changes)).model)
            for part in (tokenizer.encoder, tokenizer.decoder):
                parts = [m for m in part.modules() if hasattr(m, "checkpointing")]
                assert parts
                assert all(m.checkpointing is asked for m in parts), preset


class Brightness(nn.Module):
    """A judge of how bright pictures are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * images.mean((1, 2, 3))


def test_what_the_discriminator_adds():
    from common.config import as_namespace, read_config
    from common.objective import Judge, Objective

    from xq.losses import LeCam, adaptive_weight
    from xq.quantizers.base import Losses

    config = as_namespace(read_config(None, [("discriminator.augment", "0.0")]))
    settings = config.discriminator
    settings.ramp, settings.lecam = 4, 0.5
    judge, layer = Judge(Brightness()), nn.Parameter(torch.tensor(0.5))
    images, base = torch.rand(2, 4, 3, 8, 8) - 0.5
    nothing = Losses(*[torch.zeros(())] * len(Losses._fields))
    found = {}
    for settings.adaptive in (True, False):
        objective = Objective(config, None, judge, 10)
        for step in (9, 10, 12, 14):
            made = base * layer
            total, terms = objective.of_tokenizer(images, made, nothing, {}, layer, step)
            found[settings.adaptive, step] = terms["adversarial"].item()
            rest = total - 0.5 * terms["adversarial"] - terms["reconstruction"]
            assert abs(rest.item()) < 1e-6
    error, score = (base * layer - images).square().mean(), -0.3 * (base * layer).mean()
    weight = adaptive_weight(error, score, layer).item()
    assert weight > 2
    for step, share in ((9, 0), (10, 0.2), (12, 0.6), (14, 1)):
        assert found[False, step] == pytest.approx(share * score.item())
        assert found[True, step] == pytest.approx(share * weight * score.item(), rel=1e-5)
    # it judges, and learns nothing of it
    assert judge.discriminator.weight.grad is None
    assert judge.discriminator.weight.requires_grad
    objective = Objective(config, None, judge, 10)
    loss, terms = objective.of_discriminator(judge, images, base)
    real, fake = judge(images, base)
    hinge = ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
    penalty = LeCam()(real, fake)
    assert penalty > 0
    torch.testing.assert_close(terms["lecam"], penalty.detach())
    torch.testing.assert_close(loss, hinge + 0.5 * penalty)


def test_what_decays():
    from common.learning import make_optimizer

    encoder = ViTEncoder(
        8,
        backbone="vit_small_patch14_dinov2",
        image_size=32,
        tokens=2,
        options={"depth": 1, "embed_dim": 32, "num_heads": 2},
    )
    decoder = CNNDecoder(8, channels=8, multipliers=(1,), blocks=1, z_channels=8)
    tokenizer = Tokenizer(encoder, VQ(8, 16), decoder)
    decaying, others = make_optimizer(tokenizer, 1e-3, (0.9, 0.95), 0.1).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0)
    names = {id(p): name for name, p in tokenizer.named_parameters()}
    decaying, others = ({names[id(p)] for p in g["params"]} for g in (decaying, others))
    assert {"encoder.quant_conv.weight", "encoder.backbone.blocks.0.mlp.fc1.weight"} <= decaying
    assert {"decoder.conv_in.weight", "encoder.backbone.patch_embed.proj.weight"} <= decaying
    assert others >= {
        "quantizer.codebook.weight",
        "encoder.latent_tokens",
        "encoder.lvl_embed.weight",
        "encoder.backbone.cls_token",
        "encoder.backbone.pos_embed",
        "encoder.backbone.blocks.0.ls1.gamma",
        "encoder.backbone.norm.weight",
        "decoder.conv_in.bias",
    }
    assert not decaying & others
    assert decaying | others == set(names.values())


def test_the_rate_rises_and_falls():
    from common.learning import cosine_rate, scaled

    rates = [
        cosine_rate(step, first=10, last=30, warmup=4, rates=(1.0, 5.0, 2.0)) for step in range(32)
    ]
    # before its start, where nothing of it is computed, it stands below
    assert rates[10:15] == [1, 2, 3, 4, 5]
    assert rates[22] == pytest.approx(3.5)
    assert rates[30] == rates[31] == pytest.approx(2)
    assert all(a > b for a, b in pairwise(rates[14:31]))
    assert scaled(3e-5, 1024, 128) == pytest.approx(2.4e-4)
    assert scaled(3e-5, 1024, 0) == 3e-5


def test_gradients_are_clipped_together():
    from common.learning import clip_

    module = nn.Linear(3, 2)
    module.weight.grad, module.bias.grad = torch.full((2, 3), 3.0), torch.full((2,), 4.0)
    norm = math.sqrt(6 * 9 + 2 * 16)
    assert clip_(module, 0) == pytest.approx(norm)
    assert module.weight.grad[0, 0] == 3
    assert clip_(module, 2.0) == pytest.approx(norm)
    assert module.weight.grad[0, 0] == pytest.approx(6 / norm)
    assert clip_(module, 0) == pytest.approx(2)


def test_averages_of_weights_and_codes():
    from common.learning import Average

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), VQ(2, 4, codebook=EMACodebook))
    average = Average(model, 0.9)
    want = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(200):
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn_like(value))
            else:
                value.fill_(step)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            mean = decay * want[name] + (1 - decay) * value
            want[name] = mean if value.is_floating_point() else value.clone()
    found = average.module.state_dict()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert not average.module.training
    assert not any(p.requires_grad for p in average.module.parameters())


def test_the_middle_and_a_random_crop():
    from common.adm import read_crop

    # a ramp from left to right
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (60, 240, 3)).copy()
    middle = read_crop(png(ramp), "x", 60, 3)
    assert middle.shape == (3, 60, 60)
    expected = torch.arange(90, 150) / 127.5 - 1
    torch.testing.assert_close(middle[1, 7], expected)
    draws = [read_crop(png(ramp), "x", 60, 3, np.random.default_rng(i), True) for i in range(40)]
    slopes = torch.stack([(d[0, 0, -1] - d[0, 0, 0]) * 127.5 for d in draws])
    # sizes from 60 to 75, half of them mirrored
    assert slopes.abs().min() < 50
    assert slopes.abs().max() > 56
    assert 10 < (slopes < 0).sum() < 30
    again = read_crop(png(ramp), "x", 60, 3, np.random.default_rng(3), True)
    assert torch.equal(again, draws[3])
    far = [read_crop(png(ramp), "x", 20, 3, np.random.default_rng(i), zoom=3.0) for i in range(40)]
    slopes = torch.stack([(d[0, 0, -1] - d[0, 0, 0]) * 127.5 / 19 for d in far])
    # a column is three of the picture, or one
    assert slopes.max() > 2.8
    assert 0.9 < slopes.min() < 1.1


def test_linear_parts_start_at_principal_components():
    from common.parts import start_at_pca_

    images = torch.randn(4, 3, 16, 16).cumsum(-1).cumsum(-2) / 10
    sizes = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "z_channels": 4, "patch": 2}
    tokenizer = Tokenizer(
        Sum(linear=LinearEncoder(6, 4), cnn=CNNEncoder(6, **sizes)),
        ProductQuantizer(VQ(3, 8), P=2),
        Sum(linear=LinearDecoder(6, 4), cnn=CNNDecoder(6, **sizes)),
    )
    start_at_pca_(tokenizer, images)
    forth, back = LinearEncoder(6, 4), LinearDecoder(6, 4)
    fit_pca_(forth, back, images)
    with torch.no_grad():
        z, expected = tokenizer.encoder(images), forth(images)
        # each branch of the product has large ones and small ones
        torch.testing.assert_close(z, expected[..., [0, 2, 4, 1, 3, 5]])
        torch.testing.assert_close(tokenizer.decoder(z), back(expected))


def test_grey_and_sixteen_bits():
    from common.adm import BrokenPicture, read_crop

    fine = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) + 30000
    made = read_crop(png(fine), "x", 64, 1)
    assert made.shape == (1, 64, 64)
    expected = torch.from_numpy(fine.astype(np.float32)) / 32767.5 - 1
    torch.testing.assert_close(made[0], expected, rtol=0, atol=1e-6)
    # more than 8 bits can tell apart
    assert len(made.unique()) > 2000
    assert torch.equal(read_crop(png(fine), "x", 64, 3), made.expand(3, -1, -1))
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    assert (read_crop(png(clear), "x", 8, 1) == 1).all()
    tiff = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tiff, "tiff")
    with pytest.raises(BrokenPicture, match=r"scan has values from 0\.5 to 0\.5 in mode F"):
        read_crop(tiff, "scan", 8, 1)
    with pytest.raises(BrokenPicture, match="scan cannot be read as an image"):
        read_crop(io.BytesIO(b"no picture"), "scan", 8, 1)


def greys(batch: torch.Tensor) -> list[int]:
    return ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def settings(**changed: Any) -> SimpleNamespace:
    given = {"size": 8, "channels": 3, "batch": 8, "accumulate": 2, "flip": True, "window": 2}
    return SimpleNamespace(**given | {"workers": 0, "broken": "stop", "zoom": 1.25} | changed)


def test_shards_are_read_at_any_place(shards, tmp_path):
    from common.sources import find_source
    from common.stream import Crops, training_batches

    source = find_source(str(shards), tmp_path / "cache")
    again = find_source(str(shards / "*.tar"), tmp_path / "cache")
    assert len(source) == len(again) == 50
    assert isinstance(again.labels.base, np.memmap)
    assert again.labels.tolist() == [i % 3 for i in range(50)]
    crops = Crops(again, range(50), settings(), seed=3)
    seen = [greys(images) for images, _ in training_batches(crops, range(25), 0, 1)]
    flat = list(chain(*seen))
    # four epochs, each of all pictures, in another order
    epochs = [flat[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # windows of two shards
    assert len({grey // 10 for grey in epochs[0][:20]}) == 2
    # from any step on, and shared by processes
    later = [greys(images) for images, _ in training_batches(crops, range(5, 7), 0, 1)]
    assert later == seen[10:14]
    halves = [list(training_batches(crops, range(1), rank, 2)) for rank in range(2)]
    parts = [greys(halves[rank][micro][0]) for micro in range(2) for rank in range(2)]
    assert list(chain(*parts)) == flat[:8]


def test_classes_are_balanced(shards):
    from common.sources import chosen, find_source, split

    source = find_source(str(shards))
    rows = chosen(source, 5, 0)
    assert np.bincount(np.asarray(source.labels)[rows]).tolist() == [5, 5, 5]
    assert list(rows) == sorted(rows)
    assert list(chosen(source, 5, 1)) != list(rows)
    assert len(chosen(source, 17, 0)) == 50
    train, held_source, held_out = split(source, None, 0, 0)
    assert held_source is source
    assert list(held_out) == [9, 19, 29, 39, 49]
    assert sorted([*train, *held_out]) == list(range(50))


def test_bad_sources(tmp_path, shards):
    from common.sources import chosen, find_source, split

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither pictures nor \.tar files"):
        find_source(str(tmp_path / "empty"))
    (shards / "5.tar").write_bytes(b"no shard" * 100)
    with pytest.raises(ValueError, match=r"5\.tar cannot be read as a shard"):
        find_source(str(shards))
    Image.new("RGB", (9, 9)).save(tmp_path / "empty" / "one.png")
    with pytest.raises(ValueError, match="has 1 pictures; two are needed, one to test on"):
        split(find_source(str(tmp_path / "empty")), None, 0, 0)
    with tarfile.open(tmp_path / "plain.tar", "w") as shard:
        member = tarfile.TarInfo("a.png")
        member.size = 3
        shard.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match=r"per_class needs classes: a folder each, or \.cls"):
        chosen(find_source(str(tmp_path / "plain.tar")), 1, 0)


def test_a_file_is_what_it_was_until_it_is_whole(tmp_path, monkeypatch):
    from common import checkpoints

    path, events = tmp_path / "file", []
    path.write_bytes(b"before")
    replace = Path.replace
    monkeypatch.setattr(checkpoints.os, "fsync", lambda _: events.append("synced"))
    monkeypatch.setattr(
        Path, "replace", lambda one, other: (events.append("renamed"), replace(one, other))
    )

    def half(file: Any) -> None:
        file.write(b"af")
        file.flush()
        events.append(path.read_bytes())

    def full(file: Any) -> None:
        half(file)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"file cannot be written .*No space left"):
        checkpoints.write_whole(path, full)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"
    checkpoints.write_whole(path, half)
    assert path.read_bytes() == b"af"
    assert events == [b"before", b"before", "synced", "renamed", "synced"]


def test_a_damaged_checkpoint_names_the_one_before(tmp_path):
    from common.checkpoints import Checkpoints

    kept = Checkpoints(tmp_path, 2, "stop")
    assert kept.load() is None
    for step in range(1, 6):
        kept.save(step, {"step": step}, best=2)
    assert kept.steps() == [2, 4, 5]
    assert kept.load() == {"step": 5}
    (tmp_path / "step-00000005.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"step-00000005\.pt is damaged .* go on from step 4"):
        kept.load()


def test_other_parts_do_not_go_on(tmp_path):
    import train_tokenizer

    words = ["--config", "laptop", "--steps", "1", "--data.workers", "0", "--data.batch", "2"]
    words += ["--out", str(tmp_path), "--model.kmeans", "false", "--discriminator.kind", ""]
    train_tokenizer.main(words)
    with pytest.raises(SystemExit, match="holds checkpoints of other parts; take another --out"):
        train_tokenizer.main([*words, "--model.tokenizer.encoder.z_channels", "8", "--steps", "2"])

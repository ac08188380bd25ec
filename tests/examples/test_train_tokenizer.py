"""The recipe: every part of it takes steps, and what was killed goes on as if it had not been."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from xq.losses.trunks import Trunk
from xq.models import CNNDecoder, CNNEncoder, Tokenizer
from xq.models.checkpoints import formats
from xq.models.checkpoints.llamagen import FORMAT
from xq.quantizers import VQ

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "train_tokenizer.py"

TINY = """
[model.tokenizer]
encoder = {class = "CNNEncoder", dim = 8, channels = 8, multipliers = [1], blocks = 1, \
z_channels = 8, patch = 4}
decoder = {class = "CNNDecoder", dim = 8, channels = 8, multipliers = [1], blocks = 1, \
z_channels = 8, patch = 4}

[model.tokenizer.quantizer]
class = "ProductQuantizer"
P = 2

[model.tokenizer.quantizer.quantizer]
class = "ResidualQuantizer"
quantizer = {class = "VQ", dim = 4, codebook_size = 16, codebook = \
{class = "EMACodebook", decay = 0.9, revive = 0.0}}
multiscale = [1, 2, 8]

[data]
size = 32
batch = 4
workers = 0

[run]
steps = 4
bf16 = false

[optimizer]
lr = 1e-3
lr_batch = 0
warmup_epochs = 0.0
min_lr = 1e-4
ema = 0.9

[loss]
perceptual = 0.0

[discriminator]
kind = "patchgan"
arguments = {channels = 8, depth = 1, norm = "group"}
start = 0.3
lr = 1e-3
augment = 0.0

[log]
every = 1

[eval]
every = 4
pictures = 4
shown = 2

[save]
every = 2
"""
VIT = {
    "backbone": "vit_base_patch16_224",
    "image_size": 32,
    "patch_size": 8,
    "tokens": 2,
    "dim": 8,
    "options": {"embed_dim": 64, "depth": 2, "num_heads": 2},
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples/train_tokenizer.py` as a module, alone."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    import train_tokenizer

    return train_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration for moments, with a folder of 24 pictures in two classes."""
    folder = tmp_path_factory.mktemp("tiny")
    draws = np.random.default_rng(0)
    for i in range(24):
        path = folder / "pictures" / ("cats" if i < 16 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draws.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((50, 40), Image.Resampling.BICUBIC).save(path)
    text = TINY.replace("[data]", f'[data]\ntrain = "{folder / "pictures"}"')
    (folder / "tiny.toml").write_text(text)
    return folder / "tiny.toml"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: `teacher.pth`, `vit.pth` for the tokenizers, and `alex.safetensors`."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "teacher.pth")
    backbone = timm.create_model(VIT["backbone"], num_classes=0, **VIT["options"])
    torch.save(backbone.state_dict(), folder / "vit.pth")
    trunk = {name: 0.05 * torch.randn(b.shape) for name, b in Trunk("alex").named_buffers()}
    save_file(trunk, folder / "alex.safetensors")
    return folder


@pytest.fixture
def train(script: ModuleType, tiny: Path, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """`train("--data.batch 2", ..., out="name")`: runs it; records, folder and last numbers."""

    def run(*options: str, out: str = "out") -> SimpleNamespace:
        folder = tmp_path / out
        words = [word for option in options for word in option.split(" ", 1)]
        numbers = script.main(["--config", str(tiny), "--out", str(folder), *words])
        return SimpleNamespace(numbers=numbers, out=folder, **records(folder))

    return run


def records(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out"] for line in lines if "held_out" in line]
    return {"losses": losses, "held_out": held_out, "lines": lines}


def state(folder: Path) -> dict[str, Any]:
    return torch.load(sorted((folder / "checkpoints").iterdir())[-1])


def as_option(name: str, value: Any) -> str:
    """A setting as the command line has it."""

    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(toml, value)) + "]"
        return json.dumps(value)

    return f"--{name} {toml(value)}"


def beside(end: str) -> dict[str, Any]:
    """A CNN beside a linear path, the encoder or the decoder."""
    sizes = {"channels": 8, "multipliers": [1], "blocks": 1, "z_channels": 8, "patch": 4}
    cnn = {"class": f"CNN{end}", "dim": 8, "attention": False, **sizes}
    return {"class": "Sum", "linear": {"class": f"Linear{end}", "dim": 8, "patch": 4}, "cnn": cnn}


def vit(quantizer: dict[str, Any], branches: int = 1) -> list[str]:
    """Options for a tokenizer of small transformers."""
    encoder = {"class": "ViTEncoder", **VIT, "branches": branches}
    decoder = {"class": "ViTDecoder", **VIT}
    return [
        as_option("model.tokenizer.encoder", encoder),
        as_option("model.tokenizer.decoder", decoder),
        as_option("model.tokenizer.quantizer", quantizer),
    ]


def test_writes_everything(train):
    done = train("--save.last 1")
    assert [line["step"] for line in done.lines] == [1, 2, 3, 4, 4]
    assert {p.name for p in done.out.iterdir()} == {
        *("metrics.jsonl", "tensorboard", "checkpoints", "pictures", "tokenizer")
    }
    assert [p.name for p in (done.out / "checkpoints").iterdir()] == ["step-00000004.pt"]
    names = {"grid-00000004.png", "partials-00000004.png"}
    assert {p.name for p in (done.out / "pictures").iterdir()} == names
    with Image.open(done.out / "pictures" / "grid-00000004.png") as grid:
        assert grid.size == (2 * 38 + 6, 2 * 38 + 6)
    # by scale and branch
    assert set(done.held_out[0]["used"]) == {
        *("1: 1x1, 1", "1: 1x1, 2", "2: 2x2, 1", "2: 2x2, 2", "3: 8x8, 1", "3: 8x8, 2")
    }
    assert done.held_out[0] == done.numbers
    assert {"step", "data", "images"} == set(done.lines[0]["speed"])
    # the averaged weights are what is saved
    average = state(done.out)["average"]
    saved = Tokenizer.from_pretrained(done.out / "tokenizer").state_dict()
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    online = state(done.out)["tokenizer"]
    assert not torch.equal(online["decoder.conv_out.weight"], average["decoder.conv_out.weight"])


def test_nothing_of_the_discriminator_is_computed_before_its_start(train, monkeypatch):
    from common.objective import Judge, LeCam

    # but for two plain pictures that are tried beforehand
    calls = []
    before = Judge.forward

    def forward(self: Any, *images: Any) -> Any:
        if images[0].any():
            calls.append(len(images))
        return before(self, *images)

    monkeypatch.setattr(Judge, "forward", forward)
    late = train("--discriminator.start 9")
    assert calls == []
    assert all("discriminator" not in loss and loss["adversarial"] == 0 for loss in late.losses)
    assert state(late.out)["lecam"] == dict.fromkeys(LeCam().state_dict(), 0)
    # 0.3 epochs of 22 pictures in batches of 4 are two steps
    early = train(out="early")
    assert len(calls) == 2
    assert ["discriminator" in loss for loss in early.losses] == [False, False, True, True]
    assert early.losses[2]["adversarial"] != 0
    assert state(early.out)["lecam"]["fake_mean"] != 0


OPTIONS = {
    "bf16": ["--run.bf16 true"],
    "no discriminator": ["--discriminator.kind "],
    "stylegan, grey": [
        *("--discriminator.kind stylegan", "--discriminator.kind_of_loss non_saturating"),
        "--discriminator.arguments {image_size = 32, max_channels = 8}",
        "--data.channels 1",
        "--model.tokenizer.encoder.image_channels 1",
        "--model.tokenizer.decoder.image_channels 1",
    ],
    "augmented, fixed weight, faded in": [
        *("--discriminator.augment 1.0", "--discriminator.adaptive false"),
        "--discriminator.ramp 3",
    ],
    "dropout, l1, micro-batches, k-means": [
        *("--dropout.p 0.5", "--dropout.minimum 1", "--loss.pixels l1", "--data.accumulate 2"),
        "--model.kmeans true",
    ],
    "principal components, k-means of two batches": [
        as_option("model.tokenizer.encoder", beside("Encoder")),
        as_option("model.tokenizer.decoder", beside("Decoder")),
        *("--model.pca true", "--model.kmeans true", "--model.start_batches 2"),
        *("--discriminator.adaptive false", "--data.zoom 1.1"),
    ],
    "workers, a class each, other decay": [
        *("--data.workers 1", "--data.per_class 6", "--optimizer.weight_decay 0.1"),
        "--data.flip false",
    ],
}


@pytest.fixture(scope="module")
def plain_losses() -> list[Any]:
    """Those of three steps without options, once they are known."""
    return []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(train, options, plain_losses):
    plain_losses[:] = plain_losses or train("--steps 3", out="plain").losses
    done = train("--steps 3", *options)
    assert len(done.losses) == 3
    assert done.losses != plain_losses
    assert all(np.isfinite(list(loss.values())).all() for loss in done.losses)
    assert done.held_out[-1]["psnr"] > 5


def test_teachers_lpips_and_a_dino_discriminator(train, weights, script):
    quantizer = {
        "class": "ProductQuantizer",
        "P": 2,
        "quantizer": {"class": "VQ", "dim": 4, "codebook_size": 16},
    }
    dino = {"backbone": "test_vit", "weights": str(weights / "teacher.pth"), "size": 32,
            "depths": [0, 2]}  # fmt: skip
    teacher = f"teacher_weights {weights / 'teacher.pth'}"
    done = train(
        *vit(quantizer, branches=2),
        "--steps 3",
        "--discriminator.kind dino",
        as_option("discriminator.arguments", dino),
        "--loss.perceptual 1.0",
        "--loss.net alex",
        f"--loss.net_weights {weights / 'alex.safetensors'}",
        *("--semantic.weight 0.1", "--semantic.teacher test_vit", f"--semantic.{teacher}"),
        *("--semantic.shared_projector true", "--semantic.normalize false"),
        *("--semantic.temperature 1.0", "--semantic.cool_to 0.01"),
        *("--detail.weight 0.1", "--detail.teacher test_vit", f"--detail.{teacher}"),
        "--model.checkpointing true",
    )
    for loss in done.losses:
        assert loss["semantic"] > 0
        assert loss["detail"] > 0
        assert loss["perceptual"] > 0
    assert "lpips" in done.numbers
    found = state(done.out)
    # the temperature of the last step, two thirds of the way
    scale = found["alignments"]["semantic.loss.log_scale"].exp()
    assert scale == pytest.approx(1 / 3 + 100 * 2 / 3, rel=1e-5)
    # shared with the tokenizer
    shared = found["alignments"]["semantic.projector.weight"]
    assert torch.equal(shared, found["tokenizer"]["encoder.quant_conv.weight"])
    assert "detail.projector.weight" in found["alignments"]


def test_lora_and_frozen_backbones(train, weights):
    options = vit({"class": "VQ", "dim": 8, "codebook_size": 16})
    options += [f"--model.weights {weights / 'vit.pth'}", "--discriminator.kind ", "--steps 2"]
    done = train(*options, "--model.encoder lora", "--model.decoder frozen", "--model.lora_rank 2")
    given = torch.load(weights / "vit.pth")
    after = state(done.out)["tokenizer"]
    key = "backbone.blocks.0.mlp.fc1"
    assert torch.equal(after[f"encoder.{key}.base_layer.weight"], given["blocks.0.mlp.fc1.weight"])
    assert after[f"encoder.{key}.lora_B.default.weight"].abs().max() > 0
    assert torch.equal(after[f"decoder.{key}.weight"], given["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(after["encoder.backbone.norm.weight"], given["norm.weight"])
    # saved as plain weights, updates included
    trained = Tokenizer.from_pretrained(done.out / "tokenizer")
    saved = trained.state_dict()
    assert not torch.equal(saved[f"encoder.{key}.weight"], given["blocks.0.mlp.fc1.weight"])
    # from a released file likewise
    torch.save({"model": formats()["xqgan"].write(trained)}, done.out / "released.pt")
    tuned = train(*vit({"class": "VQ", "dim": 8, "codebook_size": 16}), "--model.encoder lora",
                  f"--init {done.out / 'released.pt'}", "--model.decoder frozen", "--steps 1",
                  "--discriminator.kind ", out="tuned")  # fmt: skip
    after = state(tuned.out)["tokenizer"]
    for name, there in (("encoder", ".base_layer"), ("decoder", "")):
        assert torch.equal(after[f"{name}.{key}{there}.weight"], saved[f"{name}.{key}.weight"])
    assert after[f"encoder.{key}.lora_B.default.weight"].abs().max() > 0
    # and goes on
    again = train(*options, "--model.encoder lora", "--model.decoder frozen", "--model.lora_rank 2",
                  "--steps 3")  # fmt: skip
    assert len(again.losses) == 3


def test_perturbed_tokens_know_how_far_training_is(train, script, monkeypatch):
    from xq.quantizers import Perturbed

    seen = []
    setter: Any = Perturbed.progress.fset

    def record(self: Perturbed, value: float) -> None:
        seen.append(value)
        setter(self, value)

    monkeypatch.setattr(Perturbed, "progress", Perturbed.progress.setter(record))
    leaf = {"class": "VQ", "dim": 8, "codebook_size": 16}
    perturbed = {"class": "Perturbed", "delta": 4, "quantizer": leaf}
    train(as_option("model.tokenizer.quantizer", perturbed))
    # once as it is built
    assert seen == [0, 0, 0.25, 0.5, 0.75]


@pytest.mark.compile
# dynamo looks at its inputs, which are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled(train):
    torch._dynamo.reset()
    compiled = train("--model.compile aot_eager", "--steps 3")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    plain = train("--steps 3", out="plain")
    for one, other in zip(compiled.losses, plain.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_wandb(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        train("--wandb")
    logged: list[Any] = []
    run = SimpleNamespace(log=lambda x, step: logged.append((step, x)), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **options: run, Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train("--wandb")
    assert [step for step, _ in logged] == [1, 2, 3, 4, 4, 4, 4]
    assert "loss/total" in logged[0][1]
    assert "held_out/used/1: 1x1, 1" in logged[4][1]


def test_starts_from_a_folder(train):
    first = train()
    then = train(f"--init {first.out / 'tokenizer'}", "--steps 1", out="then")
    # as good as what it starts from
    assert then.losses[0]["reconstruction"] < first.losses[0]["reconstruction"]
    with pytest.raises(SystemExit, match="is another tokenizer"):
        train(f"--init {first.out / 'tokenizer'}", "--model.tokenizer.encoder.channels 16", out="x")


def test_starts_from_a_released_file(train, tmp_path):
    small = {"channels": 8, "multipliers": (1, 1), "blocks": 1, "z_channels": 8}
    given = Tokenizer(CNNEncoder(8, **small), VQ(8, 16, normalize=True), CNNDecoder(8, **small))
    state_there = FORMAT.table({}).revert(given.state_dict())
    torch.save({"model": state_there}, tmp_path / "vq.pt")
    # whose codes are kept
    options = [f"--init {tmp_path / 'vq.pt'}", "--steps 1", "--optimizer.lr 0.0"]
    options.append("--model.kmeans true")
    done = train("--model.tokenizer {}", *options, "--optimizer.warmup_lr 0.0")
    after = state(done.out)["tokenizer"]
    assert all(torch.equal(after[name], value) for name, value in given.state_dict().items())
    with pytest.raises(SystemExit, match=r"vq\.pt cannot be read"):
        train(*options, out="into another")


def test_goes_on_after_a_kill_as_if_there_had_been_none(train, tiny, tmp_path):
    steps = ["--steps 24", "--save.every 2", "--discriminator.augment 1.0", "--dropout.p 0.5",
             "--dropout.minimum 1", "--eval.every 10", "--save.last 2"]  # fmt: skip
    whole = train(*steps, out="whole")
    words = [word for option in steps for word in option.split(" ", 1)]
    command = [sys.executable, str(SCRIPT), "--config", str(tiny)]
    killed = tmp_path / "killed"
    running = subprocess.Popen(
        [*command, "--out", str(killed), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert running.stdout is not None
    deadline = time.monotonic() + 120
    while len(list(killed.glob("checkpoints/*.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 0.3))
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    done = len(records(killed)["losses"])
    assert 3 <= done < 24, f"{done} steps were done"
    # in the middle of a write
    (killed / "checkpoints" / "step-00000099.pt.part").write_bytes(b"half")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    resumed = train(*steps, out="killed")
    assert resumed.losses == whole.losses
    assert resumed.held_out == whole.held_out
    one, other = state(whole.out), state(resumed.out)
    for part in ("tokenizer", "average", "judge", "lecam"):
        assert all(torch.equal(one[part][k], other[part][k]) for k in one[part])


def test_micro_batches_are_one_batch(train):
    options = ["--steps 3", "--data.batch 8", "--discriminator.kind "]
    one, four = (train(*options, f"--data.accumulate {n}", out=str(n)) for n in (1, 4))
    for alone, joint in zip(one.losses, four.losses, strict=True):
        assert joint == pytest.approx(alone, abs=1e-4)
    alone, joint = (state(done.out)["tokenizer"] for done in (one, four))
    codes = [key for key in alone if "codebook" in key]
    assert any(key.endswith("step") for key in codes)
    for key in codes:
        torch.testing.assert_close(joint[key], alone[key], rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
def test_two_processes_are_one_with_the_joint_batch(train, tiny, tmp_path, weights):
    options = [
        *("--data.accumulate 2", "--data.batch 8", "--steps 3"),
        *("--semantic.weight 0.1", "--semantic.teacher test_vit"),
        f"--semantic.teacher_weights {weights / 'teacher.pth'}",
        "--eval.pictures 3",
    ]
    one = train(*options, out="one")
    words = [word for option in options for word in option.split(" ", 1)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(SCRIPT), "--config", str(tiny)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    two = records(tmp_path / "two")
    assert len(two["losses"]) == 3
    for alone, joint in zip(one.losses, two["losses"], strict=True):
        for name, value in alone.items():
            # Adam magnifies rounding, and gradients more than losses
            room = 1e-2 if name.startswith("gradient") else 1e-5
            assert joint[name] == pytest.approx(value, abs=room), name
    assert two["held_out"][0]["psnr"] == pytest.approx(one.numbers["psnr"], abs=1e-3)
    assert two["held_out"][0]["used"] == one.numbers["used"]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_full_disk_destroys_nothing(train, tmp_path, monkeypatch, capsys, on_error):
    import common.checkpoints

    save = torch.save

    def write(state: Any, file: Any) -> None:
        if state["step"] == 4:
            file.write(b"a part of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(common.checkpoints.torch, "save", write)
    options = ["--steps 6", f"--save.on_error {on_error}", "--eval.every 100", "--save.last 1"]
    if on_error == "stop":
        message = (
            r"step-00000004\.pt cannot be written .*No space left on device.*goes on from step 2$"
        )
        with pytest.raises(SystemExit, match=message):
            train(*options)
        kept = ["step-00000002.pt"]
    else:
        train(*options)
        assert "step-00000004.pt cannot be written" in capsys.readouterr().err
        kept = ["step-00000006.pt"]
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == kept
    # with room again, the same command goes on
    monkeypatch.undo()
    monkeypatch.syspath_prepend(EXAMPLES)
    assert len(train(*options).losses) == 6


def test_a_broken_picture(train, tiny, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    shutil.copytree(tiny.parent / "pictures", pictures)
    broken = pictures / "cats" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    # in a process that loads for others as well; one line
    options = [f"--data {pictures}", "--steps 8", "--save.every 8"]
    for workers in (0, 1):
        with pytest.raises(
            SystemExit, match=r"^step \d: [^\n]*03\.png cannot be read.*starts anew$"
        ):
            train(*options, f"--data.workers {workers}")
    options = [f"--data {pictures}", f"--val {pictures}", "--data.broken skip", "--steps 6"]
    done = train(*options, out="skip")
    assert len(done.losses) == 6
    # once in an epoch, and in each of two evaluations
    assert (done.out / "skipped.txt").read_text().count("03.png") == 3
    assert capsys.readouterr().err.count("skipped: ") == 3


def test_weights_that_are_not_finite_are_not_kept(train, tmp_path):
    with pytest.raises(SystemExit, match=r"^step 2: not all is finite: .*nan.*optimizer\.lr"):
        train("--optimizer.lr 1e30", "--log.every 100", "--discriminator.kind ")
    assert not (tmp_path / "out" / "checkpoints").exists()

"""Evaluation: the numbers of other tools, on any number of processes, and clear errors."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageFilter
from torch import Tensor, nn

from xq.images import to_images, to_pil
from xq.metrics import FrechetDistance, psnr, ssim
from xq.models import LinearDecoder, LinearEncoder, Tokenizer, fit_pca_
from xq.quantizers import BSQ, VQ, ProductQuantizer, ResidualQuantizer, initialize

EXAMPLES = Path(__file__).parents[2] / "examples"
SIDE = 32


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`examples/evaluate.py` as a module, alone, in an empty folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    import evaluate

    return evaluate


def smooth(seed: int, width: int, height: int, red: int | None = None) -> Image.Image:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    if red is not None:
        coarse[..., 0] = red
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 pictures of several sizes in three folders."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(13):
        path = root / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        smooth(i, 40 + 7 * i, 33 + 3 * i).save(path)
    return root


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tokenizers, as good as principal components and k-means are."""
    torch.manual_seed(0)
    images = to_images([smooth(1000 + i, SIDE, SIDE) for i in range(30)])
    root = tmp_path_factory.mktemp("tokenizers")
    quantizers = {
        "vq": VQ(6, 20),
        "steps": ResidualQuantizer(VQ(6, 20), depth=3),
        "scales": ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, 2, 4)), P=2),
    }
    for name, quantizer in quantizers.items():
        dim = quantizer.dim
        encoder, decoder = LinearEncoder(dim, 8), LinearDecoder(dim, 8)
        fit_pca_(encoder, decoder, images)
        if name != "scales":
            initialize(quantizer, encoder(images).detach())
        Tokenizer(encoder, quantizer, decoder).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of timm's test_resnet, random."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


class SmallExtractor(nn.Module):
    """Stands for InceptionV3: pools colours, and calls a random map of them logits."""

    def __init__(self, name: str = "small", features: Any = None, **_: Any) -> None:
        super().__init__()
        self.name, self.names = name, features or ["2048", "logits_unbiased"]
        map_of = torch.randn(12, 9, generator=torch.Generator().manual_seed(3))
        self.register_buffer("map_of", map_of)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        pooled = F.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)
        found = {"2048": pooled, "logits_unbiased": pooled @ self.map_of * 4}
        return tuple(found[name] for name in self.names)

    def convert_features_tuple_to_dict(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(self.names, features, strict=True))


@pytest.fixture
def small_inception(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from common import scores

    monkeypatch.setattr(scores, "load_inception", lambda weights, device: SmallExtractor())


def fidelity(made: Path, reference: Path, subset: int) -> dict[str, float]:
    """What torch-fidelity itself says of two folders of PNG files."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features: Any, **_: Any) -> None:
            super().__init__(name, features)
            self.small = SmallExtractor(name, features)

        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            return self.small(pixels)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "2048", "logits_unbiased"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits_unbiased" if metric == "isc" else "2048"

    FEATURE_EXTRACTORS_REGISTRY["small"] = Registered
    found = torch_fidelity.calculate_metrics(
        input1=str(made),
        input2=str(reference),
        feature_extractor="small",
        **dict.fromkeys(("isc", "fid", "kid", "prc", "save_cpu_ram"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        kid_subset_size=subset,
        batch_size=5,
        samples_find_deep=True,
    )
    names = {
        "is": "inception_score_mean",
        "is_deviation": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
        "kid_deviation": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
        "fid": "frechet_inception_distance",
    }
    return {ours: found[theirs] for ours, theirs in names.items()}


def crops(script: ModuleType, folder: Path) -> Float[Tensor, "n 3 side side"]:
    """The pictures as the script cuts them."""
    from common.rows import centre_crop

    files = sorted(folder.rglob("*.png"))
    return torch.stack([centre_crop(file, SIDE) for file in files])


def save_folder(pixels: Tensor, folder: Path, blur: float = 0) -> Path:
    folder.mkdir(parents=True)
    for i, picture in enumerate(to_pil(pixels.float() / 127.5 - 1)):
        picture.filter(ImageFilter.GaussianBlur(blur)).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("name", ["vq", "steps", "scales"])
def test_numbers_are_those_of_the_parts(script, pictures, tokenizers, weights, capsys, name):
    arguments = ["--tokenizer", str(tokenizers / name), "--data", str(pictures), "--batch", "5"]
    arguments += ["--size", str(SIDE), "--timm", "test_resnet", "--timm-weights", str(weights)]
    results = script.main([*arguments, "--partials", "--out", "out"])
    assert json.loads(Path("out/evaluation.json").read_text()) == results

    model = Tokenizer.from_pretrained(tokenizers / name)
    pixels = crops(script, pictures)
    indices = model.encode(pixels / 127.5 - 1)
    with torch.no_grad():
        parts = list(model.partials(indices))
    assert len(results["scores"]) == len(parts)
    from xq.losses import TimmTeacher

    teacher = TimmTeacher("test_resnet", weights=weights)
    for record, part in zip(results["scores"], parts, strict=True):
        made = script.to_uint8(part.clamp(-1, 1))
        each = [psnr(*(x.double() for x in pair), 255.0) for pair in zip(made, pixels, strict=True)]
        assert record["psnr"] == pytest.approx(torch.stack(each).mean().item(), rel=1e-9)
        want = ssim(made, pixels, 255.0).mean().item()
        assert record["ssim"] == pytest.approx(want, rel=1e-9)
        distance = FrechetDistance(teacher.token_dim)
        distance.made.update(teacher(made / 127.5 - 1).token)
        distance.reference.update(teacher(pixels / 127.5 - 1).token)
        assert record["fd_test_resnet"] == pytest.approx(distance.compute().item(), rel=1e-4)
    bits = indices[0].numel() * math.log2(model.quantizer.codebook_size)
    assert results["scores"][-1]["bits"] == pytest.approx(bits, abs=0.1)
    assert [r["indices"] for r in results["scores"]] == {
        "vq": [16],
        "steps": [16, 32, 48],
        "scales": [2, 10, 42],
    }[name]
    usage = results["usage"]
    assert len(usage) == {"vq": 1, "steps": 3, "scales": 6}[name]
    if name == "vq":
        used = len(indices.unique()) / 20
        assert usage[0]["used"] == pytest.approx(used)
    else:
        assert usage[0]["index"] == "0"
    said = capsys.readouterr().out
    assert "it is no FID" in said
    assert "PSNR" not in said
    for word in ("range 255", "centre crop of ADM", "utilisation", "test_resnet"):
        assert word in said
    with Image.open("out/best_and_worst.png") as shown:
        assert shown.mode == "RGB"
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "best_and_worst.png",
        "evaluation.json",
    ]


def test_a_tokenizer_of_grey_pictures(script, pictures, weights):
    from common.rows import centre_crop

    grey = {"image_channels": 1}
    parts = LinearEncoder(6, 8, **grey), VQ(6, 20), LinearDecoder(6, 8, **grey)
    model = Tokenizer(*parts).eval()
    model.save_pretrained("grey")
    arguments = ["--tokenizer", "grey", "--data", str(pictures), "--size", str(SIDE)]
    arguments += ["--timm", "test_resnet", "--timm-weights", str(weights), "--probe", str(pictures)]
    results = script.main([*arguments, "--perturb", "1,3"])
    files = sorted(pictures.rglob("*.png"))
    pixels = torch.stack([centre_crop(file, SIDE, 1)[:1] for file in files])
    red, green, blue = crops(script, pictures).double().unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    assert (pixels[:, 0] - luma).abs().max() < 4
    made = script.to_uint8(model.reconstruct(pixels / 127.5 - 1))
    each = [psnr(*(x.double() for x in pair), 255.0) for pair in zip(made, pixels, strict=True)]
    plain, perturbed = results["scores"]
    assert plain["psnr"] == pytest.approx(torch.stack(each).mean().item(), rel=1e-9)
    assert perturbed["psnr"] != plain["psnr"]
    assert results["preprocessing"]["pictures"].endswith("bytes; grey")


def test_torch_fidelity_says_the_same(script, small_inception, pictures, tmp_path):
    pixels = crops(script, pictures)
    real = save_folder(pixels, tmp_path / "real")
    blurred = save_folder(pixels[:11], tmp_path / "blurred", blur=3)
    common = ["--size", str(SIDE), "--inception", "any", "--batch", "4"]
    results = script.main(["--data", str(blurred), "--against", str(real), *common])
    (ours,) = results["scores"]
    theirs = fidelity(blurred, real, subset=11)
    for name, value in theirs.items():
        mine = ours["gfid" if name == "fid" else name]
        assert mine == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert theirs["fid"] > 1e-3
    assert not Path("runs/evaluation/best_and_worst.png").exists()
    assert "KID over 100 subsets of 11" in str(results["preprocessing"])


def test_torch_fidelity_says_the_same_of_reconstructions(
    script, small_inception, pictures, tokenizers, tmp_path
):
    arguments = ["--tokenizer", str(tokenizers / "steps"), "--data", str(pictures)]
    results = script.main([*arguments, "--size", str(SIDE), "--inception", "any", "--batch", "6"])
    (ours,) = results["scores"]
    model, pixels = Tokenizer.from_pretrained(tokenizers / "steps"), crops(script, pictures)
    made = script.to_uint8(model.reconstruct(pixels / 127.5 - 1))
    folders = [save_folder(x, tmp_path / name) for x, name in ((made, "made"), (pixels, "real"))]
    for name, value in fidelity(*folders, subset=13).items():
        mine = ours["rfid" if name == "fid" else name]
        assert mine == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_equal_folders_have_no_distance_and_blur_has_one(
    script, small_inception, pictures, weights, tmp_path
):
    pixels = crops(script, pictures)
    real = save_folder(pixels, tmp_path / "0")
    found = []
    for blur in (0, 1, 4):
        folder = real if blur == 0 else save_folder(pixels, tmp_path / str(blur), blur)
        arguments = ["--data", str(folder), "--against", str(real), "--size", str(SIDE)]
        arguments += ["--timm", "test_resnet", "--timm-weights", str(weights)]
        (scores,) = script.main([*arguments, "--inception", "any"])["scores"]
        found.append([scores["fd_test_resnet"], scores["gfid"]])
    assert found[0] == pytest.approx([0, 0], abs=1e-9)
    for k in range(2):
        assert 1e-6 < found[1][k] < found[2][k]


def evaluate_on_a_process(rank: int, join: Any, arguments: list[str]) -> dict[str, Any]:
    sys.path.insert(0, str(EXAMPLES))
    import evaluate
    from common import scores

    scores.load_inception = lambda weights, device: SmallExtractor()
    join()
    return evaluate.main(arguments)


@pytest.mark.distributed
def test_two_processes_say_what_one_says(
    script, small_inception, pictures, tokenizers, weights, tmp_path, on_processes
):
    arguments = ["--tokenizer", str(tokenizers / "vq"), "--data", str(pictures), "--size", "32"]
    arguments += ["--timm", "test_resnet", "--timm-weights", str(weights), "--inception", "any"]
    # the last batch, of a single picture, leaves one process without any
    arguments += ["--batch", "4", "--perturb", "0.7,3", "--probe", str(pictures)]
    alone = script.main([*arguments, "--out", str(tmp_path / "one")])
    two = on_processes(evaluate_on_a_process, [*arguments, "--out", str(tmp_path / "two")])
    first = two[0]
    assert first["usage"] == alone["usage"]
    assert first["probe"] == alone["probe"]
    for mine, theirs in zip(alone["scores"], first["scores"], strict=True):
        for name, value in mine.items():
            want = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-8)
            assert theirs[name] == want, name
    for file in ("one", "two"):
        assert (tmp_path / file / "evaluation.json").is_file()
    images = [tmp_path / name / "best_and_worst.png" for name in ("one", "two")]
    assert images[0].read_bytes() == images[1].read_bytes()


def test_perturbed_tokens_are_worse_and_repeat(script, pictures, tokenizers):
    arguments = ["--tokenizer", str(tokenizers / "vq"), "--data", str(pictures), "--size", "32"]
    arguments += ["--perturb", "0,5", "1,1", "1,20", "0.5,20"]
    found = [script.main([*arguments, "--batch", size])["scores"] for size in ("3", "13")]
    pairs = zip(*found, strict=True)
    whole, none, nearest, all_of_them, half = ([r["psnr"] for r in pair] for pair in pairs)
    assert whole == none == nearest
    assert all_of_them[0] < half[0] < whole[0]
    for pair in (whole, all_of_them, half):
        assert pair[0] == pytest.approx(pair[1], rel=1e-9)
    assert found[0][3]["reconstruction"] == "perturbed, alpha 1, delta 20"


def test_classes_are_told_from_tokens(script, tmp_path, tokenizers):
    for part, start in (("train", 0), ("val", 100)):
        for i in range(20):
            folder = tmp_path / part / ("dark" if i % 2 else "red")
            folder.mkdir(parents=True, exist_ok=True)
            picture = smooth(start + i, 32, 32, red=220 if i % 2 == 0 else 30)
            picture.save(folder / f"{i:02d}.png")
    arguments = ["--tokenizer", str(tokenizers / "vq"), "--data", str(tmp_path / "val")]
    arguments += ["--size", "32", "--batch", "7"]
    results = script.main([*arguments, "--probe", str(tmp_path / "train")])
    assert results["probe"]["continuous"] >= 0.9
    assert 0.5 < results["probe"]["quantized"] <= 1
    # one class of the two: labels go by name
    (tmp_path / "val" / "dark").rename(tmp_path / "elsewhere")
    again = script.main([*arguments, "--probe", str(tmp_path / "train")])
    assert again["probe"]["continuous"] >= 0.8


def test_the_probe_is_ridge_regression(script):
    from common.probe import Probe

    x, labels = torch.randn(60, 5) * torch.arange(1.0, 6) + 3, torch.randint(3, (60,))
    x = torch.cat([x, torch.full((60, 1), 7.0)], 1)
    probe = Probe(6, 3, torch.device("cpu"))
    for part in range(0, 60, 17):
        probe.update(x[part : part + 17], labels[part : part + 17])
    probe.solve()
    known = ((x - x.mean(0)) / x.std(0, correction=0))[:, :5].double()
    targets = F.one_hot(labels, 3).double()
    gram = known.T @ known / 60 + 1e-3 * torch.eye(5)
    want = torch.linalg.solve(gram, known.T @ (targets - targets.mean(0)) / 60)
    got = x.double() @ probe.weight + probe.bias
    torch.testing.assert_close(got, known @ want + targets.mean(0), rtol=1e-5, atol=1e-5)


class OwnEncoder(LinearEncoder):
    """Of the user's own."""


def test_classes_of_ones_own_and_of_the_demo(script, pictures, tmp_path):
    from common.network import SmallDecoder, SmallEncoder

    demo = Tokenizer(SmallEncoder(6, 8), VQ(6, 9), SmallDecoder(6, 8))
    plain = Tokenizer(OwnEncoder(6, 8), VQ(6, 9), LinearDecoder(6, 8))
    demo.save_pretrained("demo")
    plain.save_pretrained("own")
    common = ["--data", str(pictures), "--size", "32"]
    assert script.main(["--tokenizer", "demo", *common])["pictures"] == 13
    assert script.main(["--tokenizer", "own", *common], classes=[OwnEncoder])["size"] == 32
    with pytest.raises(SystemExit, match="OwnEncoder"):
        script.main(["--tokenizer", "own", *common])


def test_the_demos_picture(script, tokenizers):
    pytest.importorskip("skimage")
    results = script.main(["--tokenizer", str(tokenizers / "scales"), "--batch", "64"])
    # the finest scale has 4 x 4 tokens of 8 x 8 pixels
    assert results["size"] == SIDE
    assert results["pictures"] == (1 + (300 - 32) // 16) * (1 + (451 - 32) // 16)


def test_interrupted_writing_leaves_the_old_files(script, pictures, tokenizers, monkeypatch):
    arguments = ["--tokenizer", str(tokenizers / "vq"), "--data", str(pictures), "--size", "32"]
    script.main([*arguments, "--out", "out"])
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}

    def half(self: Image.Image, path: Any, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half of a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(SystemExit, match="no space left on device"):
        script.main([*arguments, "--out", "out", "--perturb", "1,3"])
    after = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert after.keys() == before.keys()
    assert after["best_and_worst.png"] == before["best_and_worst.png"]
    assert json.loads(after["evaluation.json"])["scores"][1]["psnr"] > 0


def test_a_file_is_written_whole_or_not_at_all(script, tmp_path):
    from common.whole import written_whole

    path = tmp_path / "new" / "file.txt"

    def interrupted() -> None:
        with written_whole(path) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(path.parent.iterdir()) == []
    with written_whole(path) as beside:
        beside.write_text("whole")
    assert [one.read_text() for one in path.parent.iterdir()] == ["whole"]


def test_nothing_is_as_good_as_the_original(script):
    from common.results import save_json, table

    save_json(Path("x.json"), {"psnr": math.inf, "list": [1.0, math.nan]})
    assert json.loads(Path("x.json").read_text()) == {"psnr": None, "list": [1.0, None]}
    assert table([{"a": "x", "b": 1.0}, {"a": "long", "c": 12345.6}]) == (
        "a          b      c\nx     1.0000\nlong          12346"
    )


def broken(folder: Path) -> Path:
    smooth(0, 40, 40).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    return folder


def single(folder: Path) -> Path:
    smooth(0, 40, 40).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--data", "empty"], "empty holds no pictures"),
        (["--data", "single"], "single holds a single picture"),
        (["--data", "broken"], r"b\.png cannot be read as an image"),
        (["--tokenizer", "nowhere"], "finds no config.json in nowhere"),
        (["--checkpoint", "nowhere.pt"], "there is no file nowhere.pt"),
        (["--checkpoint", "broken/b.png"], "neither a safetensors file nor"),
        (["--size", "36"], "takes no pictures of 36 x 36"),
        (["--inception", "nowhere.pth"], "--inception finds no file nowhere.pth"),
        (["--inception", "broken/b.png"], "--inception cannot use broken/b.png"),
        (["--timm", "no_model"], "knows no model 'no_model'"),
        (["--timm", "test_resnet", "--timm-weights", "nowhere"], "finds no file weights='nowhere'"),
        (["--lpips", "alex", "--lpips-weights", "nowhere"], "nowhere"),
        (["--perturb", "2,3"], "alpha and beta in"),
        (["--perturb", "1,21"], r"delta in 1\.\.20"),
        (["--probe", "nowhere"], "--probe nowhere is no folder"),
        (["--probe", "single"], "--probe single holds one class"),
        (["--probe", "others"], r"lacks 3 of the 3 classes of --data .*: a, b, c"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(script, pictures, tokenizers, arguments, message):
    for name, make in {"empty": lambda p: p, "single": single, "broken": broken}.items():
        Path(name).mkdir()
        make(Path(name))
    for name in ("x", "y"):
        Path("others", name).mkdir(parents=True)
        single(Path("others", name))
    given = {"--data": str(pictures), "--size": "32", "--out": "out"}
    if "--checkpoint" not in arguments:
        given["--tokenizer"] = str(tokenizers / "vq")
    defaults = [word for pair in given.items() for word in pair]
    with pytest.raises(SystemExit, match=message):
        script.main([*defaults, *arguments])
    assert not Path("out").exists()


def test_tokens_of_several_codes_are_not_perturbed(script, pictures, tokenizers):
    arguments = ["--tokenizer", str(tokenizers / "steps"), "--data", str(pictures), "--size", "32"]
    with pytest.raises(SystemExit, match="candidates of a leaf such as VQ, ResidualQuantizer"):
        script.main([*arguments, "--perturb", "1,3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be positive, got 0"),
        (["--preset", "nothing"], "invalid choice: 'nothing'"),
        (["--against", "x"], "--against compares features: give --timm or --inception"),
        (["--against", "x", "--timm", "y", "--partials"], "--against has no tokenizer"),
        (["--perturb", "1"], "argument --perturb: invalid perturbation value: '1'"),
    ],
    ids=" ".join,
)
def test_arguments_that_make_no_sense(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err

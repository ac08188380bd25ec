"""Pictures are drawn from generators: a row a class, by seed; and judged beside shuffled tokens."""

import gzip
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from xq.models import AR, RAR, VAR, LinearDecoder, LinearEncoder, Tokenizer, fit_pca_
from xq.quantizers import VQ, ResidualQuantizer, initialize
from xq.token_store import TokenStore

EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES, SIDE, GAP, ZOOM = 3, 16, 6, 2


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def script() -> ModuleType:
    """`examples/sample.py` as a module."""
    import sample

    return sample


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Tokenizers "grid" and "scales", whose pictures are 16 x 16, and random generators of both."""
    from common.generators import save_generator

    torch.manual_seed(0)
    pyramid = ResidualQuantizer(VQ(4, 9), multiscale=(1, 2))
    for name, quantizer in {"grid": VQ(4, 16), "scales": pyramid}.items():
        encoder, decoder = (make(4, SIDE // 2) for make in (LinearEncoder, LinearDecoder))
        Tokenizer(encoder, quantizer, decoder).save_pretrained(tmp_path / name)
    sizes = {"classes": CLASSES, "depth": 1, "width": 16, "heads": 2}
    grid, scales = (Tokenizer.from_pretrained(tmp_path / n).quantizer for n in ("grid", "scales"))
    for name, model, quantizer in (
        ("ar", AR.of(grid, 2, **sizes), grid),
        ("rar", RAR.of(grid, 2, **sizes), grid),
        ("var", VAR.of(scales, **sizes), scales),
    ):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        save_generator(model, quantizer, tmp_path / name)
    return tmp_path


def arguments(folders: Path, kind: str, *more: str) -> list[str]:
    given = ["--generator", str(folders / kind)]
    tokenizer = folders / ("scales" if kind == "var" else "grid")
    return [*given, "--tokenizer", str(tokenizer), "--out", str(folders / "out" / "a.png"), *more]


def pixels(folders: Path) -> np.ndarray:
    return np.array(Image.open(folders / "out" / "a.png"))


@pytest.mark.parametrize("kind", ["ar", "rar", "var"])
def test_a_row_a_class(script, folders, capsys, kind):
    script.main(arguments(folders, kind, "--count", "4", "--batch", "5", "--guidance", "1.5"))
    assert "12 pictures in " in capsys.readouterr().out
    every = pixels(folders)
    panel = ZOOM * SIDE + GAP
    assert every.shape[0] == GAP + CLASSES * panel
    left = every.shape[1] - 4 * panel
    assert GAP < left < 40

    script.main(arguments(folders, kind, "--count", "4", "--batch", "5", "--guidance", "1.5"))
    np.testing.assert_array_equal(pixels(folders), every)
    script.main(arguments(folders, kind, "--count", "4", "--batch", "5", "--seed", "1"))
    assert (pixels(folders) != every).any()


def test_classes_filters_and_pixels(script, folders):
    """The picture has what the tokenizer makes of the generator's tokens."""
    script.main(arguments(folders, "ar", "--classes", "2,0", "--count", "1", "--top-k", "1"))
    tokenizer = Tokenizer.from_pretrained(folders / "grid")
    model = AR.from_pretrained(folders / "ar")
    with torch.no_grad():
        made = tokenizer.decode(model.generate(torch.tensor([2, 0]), top_k=1)).clamp(-1, 1)
    want = ((made + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    shown = pixels(folders)
    for i in range(2):
        top = GAP + i * (ZOOM * SIDE + GAP)
        drawn = shown[top : top + ZOOM * SIDE : ZOOM, -GAP - ZOOM * SIDE : -GAP : ZOOM]
        np.testing.assert_array_equal(drawn, want[i])


def test_guidance_that_grows_late(script, folders):
    """Of a RAR; `power` reaches it."""
    given = ["--count", "4", "--guidance", "9", "--power"]
    script.main(arguments(folders, "rar", *given, "0.5"))
    early = pixels(folders)
    script.main(arguments(folders, "rar", *given, "99"))
    assert (pixels(folders) != early).any()


def test_what_does_not_fit(script, folders):
    def refused(message: str, *given: str) -> None:
        with pytest.raises(SystemExit, match=message):
            script.main(list(given))

    here = arguments(folders, "ar")
    refused(r"AR has the classes 0\.\.2, .*got labels 1\.\.3", *here, "--classes", "1,3")
    refused("a guidance above 0, got 0", *here, "--guidance", "0")
    refused("top_k to be a positive integer, got 0", *here, "--top-k", "0")
    refused("in a RAR; the generator is of AR", *here, "--power", "2")
    other = [*here[:3], str(folders / "scales"), *here[4:]]
    refused("generates other tokens: codebook_size is 16 there, 9 here", *other)
    refused("is no folder of a generator", "--generator", str(folders), *here[2:])
    refused("nowhere", *here[:3], str(folders / "nowhere"))


def test_bad_arguments(script, capsys):
    for given, message in (
        (["--classes", "1;2"], "expected numbers such as 0,3,7, got 1;2"),
        (["--count", "0"], "--count must be positive, got 0"),
    ):
        with pytest.raises(SystemExit):
            script.main(["--generator", "a", "--tokenizer", "b", *given])
        assert message in capsys.readouterr().err


def test_shuffled_tokens_keep_their_places():
    from judge_samples import shuffled

    torch.manual_seed(0)
    places = torch.arange(6).reshape(3, 2)
    tokens = 100 * places + torch.arange(50)[:, None, None]
    found = shuffled(tokens)
    assert found.shape == tokens.shape
    assert torch.equal(found.sort(0).values, tokens)
    rows = found - 100 * places
    assert not (rows[:, 0] == rows[:, 1]).all()


def stripes(generator: np.random.Generator, label: int) -> np.ndarray:
    """Horizontal, vertical or no stripes, and noise."""
    lines = 200 * (np.arange(28) // 4 % 2)
    pattern = {0: lines[:, None], 1: lines[None, :], 2: np.array(100)}[label]
    noise = generator.integers(0, 50, (28, 28))
    return (np.broadcast_to(pattern, (28, 28)) + noise).astype(np.uint8)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as those of Fashion-MNIST, of 48 and 30 pictures."""
    import common.samples

    random, folder = np.random.default_rng(0), tmp_path / "idx"
    folder.mkdir()
    for part, count in (("train", 48), ("t10k", 30)):
        labels = np.arange(count) % CLASSES
        images = np.stack([stripes(random, label) for label in labels])
        for name, code, values in (
            ("images-idx3", 3, images),
            ("labels-idx1", 1, labels.astype(np.uint8)),
        ):
            head = bytes((0, 0, 8, code)) + np.array(values.shape, ">u4").tobytes()
            path = folder / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(head + values.tobytes()))
    monkeypatch.setattr(common.samples, "FASHION_MNIST", folder)
    return folder


def test_pictures_of_idx_files(fashion):
    from common.samples import find_samples, picture

    random = np.random.default_rng(0)
    samples = find_samples("fashion-mnist")
    assert len(samples) == 48
    assert len(find_samples("fashion-mnist-test")) == 30
    drawn = [stripes(random, i % CLASSES) for i in range(48)]
    for i, (image, label) in enumerate(samples.read(range(2, 9))):
        found = picture(image, 32)
        assert label == (2 + i) % CLASSES
        assert found.shape == (3, 32, 32)
        for channel in found.numpy():
            np.testing.assert_array_equal(channel[2:-2, 2:-2], drawn[2 + i])
        assert found.sum() == 3 * int(drawn[2 + i].sum())


def test_broken_idx_files(fashion):
    from common.samples import find_samples

    labels = fashion / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for data, message in (
        (gzip.compress(gzip.decompress(whole)[:-1]), "is damaged, or no IDX file of bytes with 1"),
        (gzip.compress(b"\0"), "is damaged, or no IDX file"),
        (b"no gzip", "cannot be read"),
        ((fashion / "t10k-labels-idx1-ubyte.gz").read_bytes(), "48 pictures and 30 labels"),
    ):
        labels.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            find_samples("fashion-mnist")
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        find_samples("fashion-mnist")


@pytest.mark.parametrize("name", ["vq", "bsq", "msvqp2", "msbqp2"])
def test_a_small_tokenizer(fashion, tmp_path, monkeypatch, capsys, name):
    import train_small_tokenizer as trainer

    monkeypatch.setattr(trainer, "LOG_EVERY", 1)
    given = ["--quantizer", name, "--steps", "2", "--batch", "4", "--out", str(tmp_path / "t")]
    numbers = trainer.main(given)
    # principal components are of use at once
    assert numbers["held-out PSNR"] > (12 if name == "msvqp2" else 3)
    assert "48 pictures" in capsys.readouterr().out
    tokenizer = Tokenizer.from_pretrained(tmp_path / "t" / "tokenizer")
    tokens = tokenizer.encode(torch.zeros(2, 3, 32, 32))
    assert tokens.shape[1:] == {"vq": (8, 8), "bsq": (8, 8)}.get(name, (30, 2))
    assert (tmp_path / "t" / "reconstructions.png").is_file()


def test_judged(fashion, tmp_path, capsys):
    """Real tokens are nearer to real pictures than shuffled ones."""
    import judge_samples
    from common.data import to_float
    from common.generators import save_generator
    from common.samples import find_samples, picture

    torch.manual_seed(0)
    encoder, decoder = LinearEncoder(8, 8), LinearDecoder(8, 8)
    samples = find_samples("fashion-mnist")
    found = list(samples.read(range(48)))
    images = to_float(torch.stack([picture(image, 32) for image, _ in found]))
    fit_pca_(encoder, decoder, images)
    quantizer = VQ(8, 32)
    with torch.no_grad():
        initialize(quantizer, encoder(images))
    tokenizer = Tokenizer(encoder, quantizer, decoder).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with TokenStore.create(tmp_path / "tokens", quantizer, (4, 4), length=48) as store:
        store.append(tokenizer.encode(images), [label for _, label in found])
    model = AR.of(quantizer, 4, classes=CLASSES, depth=1, width=16, heads=2)
    save_generator(model, quantizer, tmp_path / "generator")

    given = ["--generator", str(tmp_path / "generator"), "--tokens", str(tmp_path / "tokens")]
    given += ["--tokenizer", str(tmp_path / "tokenizer"), "--count", "40", "--steps", "30"]
    numbers = judge_samples.main(given)
    said = capsys.readouterr().out
    assert "40 pictures, against 30 held out" in said
    assert list(numbers) == ["real", "real, as tokens", "sampled", "tokens shuffled"]
    assert numbers["real"]["like_their_class"] > 0.9
    for measure in ("frechet", "pixels"):
        assert numbers["real"][measure] < numbers["tokens shuffled"][measure]
        assert numbers["real, as tokens"][measure] < numbers["tokens shuffled"][measure]

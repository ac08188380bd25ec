"""The demo: every quantizer trains, and what the script writes can be read again."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from xq.models import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
QUANTIZERS = ["vq", "rq", "pq", "lfq", "bsq", "msvr10p2", "msbr10p2"]
QUICK = ["--batch", "4", "--threads", "1", "--no-bf16"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples/demo.py` as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    monkeypatch.setattr(demo, "EVALUATIONS", 4)
    monkeypatch.setattr(demo, "LOG_EVERY", 1)
    return demo


def draw(path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> Path:
    """A smooth picture in lively colours."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 7, 4 if mode == "RGBA" else 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse, mode="RGBA" if mode == "RGBA" else None).resize(
        (width, height), Image.Resampling.BICUBIC
    ).convert(mode).save(path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four pictures and a text; the last by name is 150 x 70 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder / "a.png", 130, 96, 0)
    draw(folder / "b" / "deep.jpg", 96, 130, 1)
    draw(folder / "c.png", 100, 100, 2, "L")
    draw(folder / "z.png", 150, 70, 3)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("name", QUANTIZERS)
def test_trains_and_reads_back(script, pictures, tmp_path, capsys, name):
    steps = 16
    arguments = ["--data", str(pictures), "--quantizer", name, "--steps", str(steps), *QUICK]
    numbers = script.main([*arguments, "--out", str(tmp_path)])

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == numbers["steps"] == steps
    held_out = {r["step"]: r["held_out_psnr"] for r in records if "held_out_psnr" in r}
    assert list(held_out) == [0, 4, 8, 12, 16]
    assert held_out[16] > held_out[0] + 0.05
    # codes that start at the data leave less to learn than one batch differs from another
    if name not in ("vq", "rq", "pq"):
        assert np.mean(losses[-6:]) < np.mean(losses[:2])

    multiscale = name.startswith("ms")
    written = {"curves.png", "metrics.jsonl", "picture.png", "report.json", "tokenizer"}
    written |= {"tokens.npz", *(f"grid_{share:03d}.png" for share in (0, 25, 50, 75, 100))}
    written |= {"partials.png"} if multiscale or name == "rq" else set()
    assert {path.name for path in tmp_path.iterdir()} == written
    assert json.loads((tmp_path / "report.json").read_text()) == numbers

    # of 150 x 70 pixels, two tiles of 64 x 64 are coded
    classes = [script.SmallEncoder, script.SmallDecoder]
    saved = Tokenizer.from_pretrained(tmp_path / "tokenizer", classes=classes)
    if multiscale:
        saved = saved.with_scales(tuple((h, 2 * w) for h, w in saved.quantizer.grids))
    with np.load(tmp_path / "tokens.npz") as file:
        tokens = file["indices"]
    assert tokens.dtype == np.uint16
    assert numbers["bits"] == tokens.size * np.log2(saved.quantizer.codebook_size)
    with torch.no_grad():
        decoded = script.to_bytes(saved.decode(torch.from_numpy(tokens)))[0]
    shown = np.array(Image.open(tmp_path / "picture.png"))
    assert shown.shape[1:] == (128, 3)
    np.testing.assert_array_equal(decoded.permute(1, 2, 0).numpy(), shown[-64:])

    said = capsys.readouterr().out
    assert "to the same pixels" in said
    assert str(tmp_path) in said
    assert "8 x 8 means, bicubic" in said


def test_swapping_the_quantizer_changes_the_tokens_alone(script):
    from common.quantizers import RECIPES

    assert list(script.QUANTIZERS) == QUANTIZERS == list(RECIPES)
    shapes = {name: script.QUANTIZERS[name]().code_shape for name in QUANTIZERS}
    assert shapes == {
        "vq": (),
        "rq": (4,),
        "pq": (4,),
        "lfq": (),
        "bsq": (),
        "msvr10p2": (2,),
        "msbr10p2": (2,),
    }


def test_starts_from_the_command_line(pictures, tmp_path):
    command = [sys.executable, "-W", "error", str(EXAMPLES / "demo.py")]
    command += ["--data", str(pictures), "--seconds", "2", "--batch", "2", "--bf16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "msbr10p2" / "partials.png").is_file()


def test_demo_photographs_and_their_baselines(script):
    from common.baselines import baselines

    train, held_out = script.find_pictures("demo")
    assert [path.stem for path in held_out] == ["chelsea"]
    assert len(train) == 5
    assert all(path.is_file() for path in train)
    tiles = script.to_float(script.tiles([script.read(held_out[0])]))
    assert tiles.shape == (28, 3, 64, 64)
    values = baselines(tiles, tiles, 8)
    assert values["8 x 8 means"] == pytest.approx(25.07, abs=0.01)
    assert values["8 x 8 means, bicubic"] == pytest.approx(26.48, abs=0.01)


def test_a_folder_is_split_by_name(script, tmp_path):
    for i in range(21):
        draw(tmp_path / f"{i:02d}.png", 64, 64, i)
    train, held_out = script.find_pictures(str(tmp_path))
    assert [path.stem for path in held_out] == ["19", "20"]
    assert len(train) == 19
    assert not set(train) & set(held_out)


def test_crops_repeat_with_their_seed(script, pictures):
    files, _ = script.find_pictures(str(pictures))
    first, again, other = (script.Crops(files, seed).batch(8) for seed in (0, 0, 1))
    assert first.shape == (8, 3, 64, 64)
    assert first.min() >= -1
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_folder_beyond_memory_is_read_in_turn(script, pictures, monkeypatch):
    import common.data

    monkeypatch.setattr(common.data, "POOL", 1)
    files, _ = script.find_pictures(str(pictures))
    crops = script.Crops(files, 0)
    seen = {crops.pool[0][0]}
    for _ in range(2):
        crops.batch(1)
        seen.add(crops.pool[0][0])
    assert seen == set(files)


def test_large_and_transparent_pictures(script, tmp_path):
    large = draw(tmp_path / "large.png", 2100, 900, 0)
    assert script.read(large).shape == (3, 225, 525)
    wide = draw(tmp_path / "wide.png", 2100, 150, 0)
    assert script.read(wide).shape == (3, 75, 1050)
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(clear)
    assert (script.read(clear) == 255).all()


def no_folder(folder: Path) -> Path:
    return folder / "nowhere"


def empty(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no picture")
    return folder


def one_picture(folder: Path) -> Path:
    return draw(folder / "a.png", 64, 64, 0).parent


def unreadable(folder: Path) -> Path:
    (folder / "bad.png").write_bytes(b"no picture")
    return one_picture(folder)


def cut_short(folder: Path) -> Path:
    data = draw(folder / "bad.png", 640, 640, 1).read_bytes()
    (folder / "bad.png").write_bytes(data[: len(data) // 2])
    return one_picture(folder)


def too_small(folder: Path) -> Path:
    draw(folder / "bad.png", 640, 63, 1)
    return one_picture(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_folder, "nowhere is no folder"),
        (empty, "holds 0 images; two are needed"),
        (one_picture, "holds 1 images; two are needed"),
        (unreadable, r"bad\.png cannot be read as an image"),
        (cut_short, r"bad\.png cannot be read as an image"),
        (too_small, r"bad\.png is too small: 640 x 63 pixels, and crops are 64 x 64"),
    ],
)
def test_bad_folders(script, tmp_path, make, message):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    with pytest.raises(SystemExit, match=message):
        script.main(["--data", str(make(source)), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantizer", "fsq"], "invalid choice: 'fsq'"),
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--seconds", "-1"], "--seconds must be positive, got -1"),
    ],
)
def test_bad_arguments(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_the_schedule_follows_whichever_ends_first(script, monkeypatch):
    import common.clock

    now = 0.0
    monkeypatch.setattr(common.clock.time, "monotonic", lambda: now)
    clock = script.Clock(steps=10, seconds=100.0)
    assert clock.progress() == 0
    clock.step, now = 1, 20.0
    assert clock.progress() == 0.2
    clock.step = 5
    assert clock.progress() == 0.5
    now = 1000.0
    assert clock.progress() == 1
    rates = [script.learning_rate(1.0, step, 0.5, warm_up=4) for step in range(5)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert script.learning_rate(1.0, 100, 1.0) == pytest.approx(0)


@pytest.mark.parametrize("quick", [False, True])
def test_the_faster_precision_is_taken(script, monkeypatch, quick):
    import common.speed

    now, slow = 0.0, not quick

    def step(bf16: bool) -> None:
        nonlocal now
        now += 5 if bf16 == slow else 1

    monkeypatch.setattr(common.speed.time, "perf_counter", lambda: now)
    before = torch.get_num_threads()
    try:
        speed = script.Speed(step, threads=1, bf16=None)
        assert (speed.bf16, speed.threads, torch.get_num_threads()) == (quick, 1, 1)
        slow = quick
        speed.check(1.5)
        assert speed.bf16 is quick
        speed.check(5.0)
        assert speed.bf16 is not quick
        assert script.Speed(step, threads=1, bf16=slow).bf16 is slow
    finally:
        torch.set_num_threads(before)


def test_threads_are_tried_unless_told(script):
    before = torch.get_num_threads()
    try:
        speed = script.Speed(lambda bf16: None, threads=None, bf16=False)
        assert (1, False) in speed.ways
        assert speed.threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

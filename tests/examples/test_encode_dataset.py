"""Pictures become tokens: of any source, by several processes, and after a kill."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from xq.models import LinearDecoder, LinearEncoder, Tokenizer
from xq.quantizers import BSQ, VQ, ProductQuantizer, ResidualQuantizer
from xq.token_store import TokenStore

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "encode_dataset.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples/encode_dataset.py` as a module, alone."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    import encode_dataset

    return encode_dataset


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of them: "grid" with 2 x 2 tokens of 16 x 16 pixels, "scales" with a pyramid."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizers")
    pyramid = ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, 2)), P=2)
    for name, quantizer in {"grid": ResidualQuantizer(VQ(4, 300), 3), "scales": pyramid}.items():
        dim = quantizer.dim
        Tokenizer(LinearEncoder(dim, 8), quantizer, LinearDecoder(dim, 8)).save_pretrained(
            folder / name
        )
    return folder


def image(seed: int, width: int = 20, height: int = 30) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven pictures, the first seven labelled 0."""
    for i in range(11):
        path = tmp_path / "pictures" / ("cats" if i < 7 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(i).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same pictures and labels in three shards, one of them without any."""
    (tmp_path / "shards").mkdir()
    for k, rows in enumerate((range(5), range(0), range(5, 11))):
        with tarfile.open(tmp_path / "shards" / f"{k:03d}.tar", "w") as shard:
            for i in rows:
                data = io.BytesIO()
                image(i).save(data, "png")
                for kind, content in (("cls", b"%d" % (i >= 7)), ("png", data.getvalue())):
                    member = tarfile.TarInfo(f"some.where/{i:05d}.{kind}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
            shard.addfile(tarfile.TarInfo("about.json"))
    return tmp_path / "shards"


def arguments(tokenizer: Path, data: Path, out: Path, *more: str) -> list[str]:
    common = ["--tokenizer", str(tokenizer), "--data", str(data), "--out", str(out)]
    return [*common, "--size", "16", "--batch", "3", "--threads", "2", *more]


def rows_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize(("name", "shape"), [("grid", (2, 2, 3)), ("scales", (5, 2))])
def test_a_folder_to_tokens_and_back(script, tokenizers, folder, tmp_path, capsys, name, shape):
    given = arguments(tokenizers / name, folder, tmp_path / "a.tokens")
    script.main(given)
    said = capsys.readouterr()
    assert "11 pictures; TokenStore(" in said.out
    assert "part 1 of 1: 11 pictures in " in said.out
    assert " a second" in said.out
    assert "11/11" in said.err

    model = Tokenizer.from_pretrained(tokenizers / name)
    store = TokenStore(tmp_path / "a.tokens", model.quantizer)
    assert store.token_shape == shape
    assert store[:][1].tolist() == [0] * 7 + [1] * 4
    for i in range(11):
        # the middle of 20 x 30 pixels, at 16 x 16
        middle = image(i).resize((16, 24), Image.Resampling.LANCZOS).crop((0, 4, 16, 20))
        pixels = torch.from_numpy(np.array(middle)).permute(2, 0, 1)[None].float() / 127.5 - 1
        assert torch.equal(store[i][0], model.encode(pixels)[0])

    script.main([*given, "--decode"])
    said = capsys.readouterr().out
    assert "rows 0, 1, 2, 4, 5, 7, 8, 10: " in said
    assert " dB; drawn in " in said
    shown = np.array(Image.open(tmp_path / "a.tokens.png"))
    side, gap = 32, 6
    assert shown.shape == (2 * (side + gap) + gap, 8 * (side + gap) + gap, 3)
    with torch.no_grad():
        made = script.to_float(torch.zeros(1, dtype=torch.uint8)) + model.decode(store[10:][0]) + 1
    last = shown[gap + side + gap : -gap : 2, -gap - side : -gap : 2]
    want = (made[0].clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(last, want)


def test_shards_give_the_rows_of_the_folder(script, tokenizers, folder, shards, tmp_path):
    pytest.importorskip("webdataset")
    for name, source in (("a", folder), ("b", shards)):
        script.main(arguments(tokenizers / "grid", source, tmp_path / name))
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    script.main(arguments(tokenizers / "grid", shards, tmp_path / "b", "--decode"))
    assert (tmp_path / "b.png").is_file()
    samples = script.find_samples(str(shards / "002.tar"))
    assert len(samples) == 6
    assert [label for _, label in samples.read(range(1, 4))] == [0, 1, 1]


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_parts_of_any_number_give_the_same_rows(
    script, tokenizers, source, request, tmp_path, monkeypatch
):
    if source == "shards":
        pytest.importorskip("webdataset")
    data = request.getfixturevalue(source)
    script.main(arguments(tokenizers / "grid", data, tmp_path / "one"))
    whole = TokenStore(tmp_path / "one")[:]
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        script.main(arguments(tokenizers / "grid", data, tmp_path / "three"))
    for one, three in zip(whole, TokenStore(tmp_path / "three")[:], strict=True):
        assert torch.equal(one, three)


def test_goes_on_after_an_end(script, tokenizers, folder, tmp_path, monkeypatch, capsys):
    given = arguments(tokenizers / "grid", folder, tmp_path / "whole")
    script.main(given)
    append, calls = TokenStore.append, []

    def ends(store, *rows):
        calls.append(append(store, *rows))
        if len(calls) == 2:
            raise KeyboardInterrupt

    again = arguments(tokenizers / "grid", folder, tmp_path / "ended")
    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, "append", ends)
        with pytest.raises(SystemExit, match="stopped; the same command goes on"):
            script.main(again)
    assert len(TokenStore(tmp_path / "ended")) == 6
    capsys.readouterr()
    script.main(again)
    assert "6 of 11 rows" in (said := capsys.readouterr().out)
    assert "part 1 of 1: 5 pictures" in said
    script.main(again)
    assert "0 pictures in 0.0 s, it was complete" in capsys.readouterr().out
    assert rows_of(tmp_path / "ended") == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_killed_and_run_again(script, tokenizers, tmp_path):
    for i in range(60):
        (tmp_path / "in").mkdir(exist_ok=True)
        image(i).save(tmp_path / "in" / f"{i:02d}.png")

    def given(name: str) -> list[str]:
        # one by one, so that it takes a while
        return arguments(tokenizers / "grid", tmp_path / "in", tmp_path / name, "--batch", "1")

    command = [sys.executable, str(SCRIPT), *given("killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if list(tmp_path.glob("killed/*.json")) and len(TokenStore(tmp_path / "killed")) >= 5:
                break
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    before = len(TokenStore(tmp_path / "killed"))
    assert 5 <= before < 60
    script.main(given("killed"))
    script.main(given("whole"))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_of_torchrun(tokenizers, folder, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*run, str(SCRIPT), *arguments(tokenizers / "scales", folder, tmp_path / "two")]
    env = {name: os.environ[name] for name in os.environ if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "11 pictures, part 1 of 2" in done.stdout
    assert "part 2 of 2: 6 pictures in " in done.stdout
    model = Tokenizer.from_pretrained(tokenizers / "scales")
    store = TokenStore(tmp_path / "two", model.quantizer)
    assert store[:][1].tolist() == [0] * 7 + [1] * 4


def test_a_store_of_another_tokenizer(script, tokenizers, folder, tmp_path):
    script.main(arguments(tokenizers / "grid", folder, tmp_path / "a"))
    other = arguments(tokenizers / "scales", folder, tmp_path / "a")
    with pytest.raises(SystemExit, match=r"is another store: token_shape is \[2, 2, 3\] there"):
        script.main(other)
    with pytest.raises(SystemExit, match="holds tokens of another quantizer: codebook_size is 300"):
        script.main([*other, "--decode"])


def test_what_is_missing(script, tokenizers, folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"nowhere is no folder; examples/demo.py"):
        script.main(arguments(tmp_path / "nowhere", folder, out))
    with pytest.raises(SystemExit, match=r"finds no config\.json in"):
        script.main(arguments(folder, folder, out))
    with pytest.raises(SystemExit, match='nowhere: is no folder; --data takes "demo", a folder'):
        script.main(arguments(tokenizers / "grid", tmp_path / "nowhere", out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty: holds neither pictures nor \.tar shards"):
        script.main(arguments(tokenizers / "grid", tmp_path / "empty", out))
    assert not out.exists()
    with pytest.raises(SystemExit, match=r"out is no token store"):
        script.main(arguments(tokenizers / "grid", folder, out, "--decode"))


def test_shards_that_cannot_be_read(script, tokenizers, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    given = arguments(tokenizers / "grid", tmp_path / "0.tar", tmp_path / "out")
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with pytest.raises(SystemExit, match=r"0\.tar: holds no jpg, jpeg, png, webp in its shards"):
        script.main(given)
    (tmp_path / "0.tar").write_bytes(b"no shard")
    with pytest.raises(SystemExit, match=r"0\.tar cannot be read as a shard"):
        script.main(given)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"holds shards, .*: pip install webdataset"):
        script.main(given)
    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_named(script, tokenizers, folder, tmp_path):
    given = arguments(tokenizers / "grid", folder, tmp_path / "out")
    broken = folder / "dogs" / "08.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    with pytest.raises(SystemExit, match=r"08\.png cannot be read as an image"):
        script.main(given)
    assert len(TokenStore(tmp_path / "out")) == 6
    broken.write_bytes(whole)
    script.main(given)
    assert len(TokenStore(tmp_path / "out")) == 11


def test_bad_arguments(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--batch", "0"])
    assert "--batch must be positive, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(64, 48), (16, 16), (5, 40), (7, 3)])
def test_pictures_of_all_sizes(script, size):
    assert script.picture(image(0, *size), 16).shape == (3, 16, 16)


def test_transparent_pictures_lie_on_white(script):
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert (script.picture(clear, 16) == 255).all()

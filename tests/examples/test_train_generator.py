"""Generators learn from token stores: of any tokenizer, after a kill, on several processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from xq.models import AR, RAR, VAR, LinearDecoder, LinearEncoder, Tokenizer
from xq.quantizers import BSQ, VQ, ProductQuantizer, ResidualQuantizer
from xq.token_store import TokenStore

accelerate = pytest.importorskip("accelerate", reason="the examples extra")

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "train_generator.py"
CLASSES, ROWS, HELD_OUT = 3, 100, 5


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`examples/train_generator.py` as a module, alone."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    import train_generator

    return train_generator


def codes_of_a_class(quantizer, shape: tuple[int, ...]) -> torch.Tensor:
    """Tokens that follow from the class, so that they can be learned."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(quantizer.codebook_size, (CLASSES, *shape), generator=generator)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers "grid" and "scales", and for each a store NAME.tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generator")
    pyramid = ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, 2)), P=2)
    quantizers = {"grid": ProductQuantizer(VQ(2, 16), P=2), "scales": pyramid}
    for name, quantizer in quantizers.items():
        encoder, decoder = (make(quantizer.dim, 8) for make in (LinearEncoder, LinearDecoder))
        Tokenizer(encoder, quantizer, decoder).save_pretrained(folder / name)
        grid = None if quantizer.scales else (2, 2)
        path = folder / f"{name}.tokens"
        with TokenStore.create(path, quantizer, grid, length=ROWS) as store:
            labels = torch.arange(ROWS) % CLASSES
            store.append(codes_of_a_class(quantizer, store.token_shape)[labels], labels)
    return folder


def arguments(stores: Path, name: str, kind: str, out: Path, *more: str) -> list[str]:
    given = ["--tokens", str(stores / f"{name}.tokens"), "--tokenizer", str(stores / name)]
    sizes = ["--depth", "2", "--width", "32", "--heads", "2", "--batch", "12", "--warmup", "5"]
    return [*given, "--model", kind, "--out", str(out), *sizes, "--steps", "20", *more]


def records(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("grid", "ar"), ("scales", "ar"), ("grid", "rar"), ("scales", "var"), ("scales", "var-bits")],
)
def test_learns_what_follows_from_the_class(script, stores, tmp_path, capsys, name, kind):
    given = arguments(stores, name, kind, tmp_path, "--steps", "90", "--lr", "0.01", "--ema", "0.9")
    loss = script.main(given)
    said = capsys.readouterr().out
    assert f"{ROWS - HELD_OUT} rows of tokens" in said
    assert f"{HELD_OUT} held out" in said

    quantizer = Tokenizer.from_pretrained(stores / name).quantizer
    even = math.log(2 if kind == "var-bits" else quantizer.codebook_size)
    found = records(tmp_path)
    losses = {r["step"]: r["loss"] for r in found if "loss" in r}
    held_out = {r["step"]: r["held_out_loss"] for r in found if "held_out_loss" in r}
    assert list(losses) == list(range(10, 91, 10))
    assert list(held_out) == list(range(9, 91, 9))
    assert losses[90] < 0.5 * even
    assert held_out[90] == loss < 0.5 * held_out[9]

    model = {"ar": AR, "rar": RAR}.get(kind, VAR).from_pretrained(tmp_path / "generator")
    labels = torch.arange(CLASSES)
    made = model.generate(*([quantizer] if isinstance(model, VAR) else []), labels, top_k=1)
    want = codes_of_a_class(quantizer, TokenStore(stores / f"{name}.tokens").token_shape)
    assert (made == want).float().mean() > 0.9


def test_random_orders_become_raster(script, stores, tmp_path, monkeypatch):
    """As the paper has it: random up to half of the steps, none from three quarters on."""
    seen, draw = [], RAR.orders

    def watched(model, *given):
        seen.append(draw(model, *given))
        return seen[-1]

    monkeypatch.setattr(RAR, "orders", watched)
    script.main(arguments(stores, "grid", "rar", tmp_path))
    raster = [(orders == torch.arange(4)).all(1).float().mean().item() for orders in seen]
    assert len(raster) == 20
    assert max(raster[:10]) < 0.5
    assert 0.2 < sum(raster[11:15]) / 4 < 0.9
    assert raster[15:] == [1.0] * 5


def test_the_average_is_what_is_saved(script, stores, tmp_path):
    """It lags behind the weights that the checkpoint has beside it."""
    script.main(arguments(stores, "grid", "ar", tmp_path, "--ema", "0.99"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved = load_file(tmp_path / "generator" / "model.safetensors")
    for key, value in saved.items():
        assert torch.equal(value, state["average"][key])
    assert not torch.equal(saved["head.weight"], state["model"]["head.weight"])


def test_only_matrices_decay(script, stores, tmp_path, monkeypatch):
    seen, make = [], script.make_optimizer

    def remembered(model, *options):
        seen.append((model, make(model, *options)))
        return seen[-1][1]

    monkeypatch.setattr(script, "make_optimizer", remembered)
    for kind in ("ar", "var"):
        script.main(arguments(stores, "scales", kind, tmp_path / kind, "--steps", "1"))
    for model, optimizer in seen:
        decaying, others = optimizer.param_groups
        assert (decaying["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
        assert decaying["betas"] == (0.9, 0.95)
        linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
        assert {id(p) for p in decaying["params"]} == linear
        assert len(linear) + len(others["params"]) == len(list(model.parameters()))


def test_goes_on_as_if_nothing_had_happened(script, stores, tmp_path, monkeypatch, capsys):
    """With dropout and dropped classes, which are drawn alike."""
    more = ["--save-every", "4", "--dropout", "0.2", "--class-drop", "0.5"]
    script.main(arguments(stores, "grid", "ar", tmp_path / "whole", *more))
    given = arguments(stores, "grid", "ar", tmp_path / "ended", *more)
    learn = script.Training.learn

    def ends(run):
        if run.step == 13:
            raise KeyboardInterrupt
        return learn(run)

    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "learn", ends)
        with pytest.raises(KeyboardInterrupt):
            script.main(given)
    # a line that is cut short, as a kill leaves it
    with (tmp_path / "ended" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')
    capsys.readouterr()
    script.main(given)
    assert "goes on at step 12" in capsys.readouterr().out
    assert_alike(tmp_path)


def assert_alike(folder: Path) -> None:
    """What "whole" and "ended" hold."""
    metrics = [(folder / name / "metrics.jsonl").read_text() for name in ("whole", "ended")]
    assert metrics[0] == metrics[1]
    weights = [(folder / name / "generator" / "model.safetensors") for name in ("whole", "ended")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_killed_and_run_again(script, stores, tmp_path):
    more = ["--save-every", "1", "--steps", "60"]
    given = arguments(stores, "scales", "var", tmp_path / "ended", *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *given], **quiet)
    deadline, checkpoint = time.monotonic() + 120, tmp_path / "ended" / "checkpoint.pt"
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if checkpoint.exists():
                break
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "ended" / "generator").exists()
    for out in ("ended", "whole"):
        given = arguments(stores, "scales", "var", tmp_path / out, *more)
        subprocess.run([sys.executable, str(SCRIPT), *given], check=True, timeout=240, **quiet)
    assert_alike(tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("name", "kind"), [("grid", "ar"), ("grid", "rar"), ("scales", "var")])
def test_two_processes_learn_the_same(script, stores, tmp_path, name, kind):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*run, str(SCRIPT), *arguments(stores, name, kind, tmp_path / "two")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    script.main(arguments(stores, name, kind, tmp_path / "one"))
    for two, one in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_on_bfloat16(script, stores, tmp_path, capsys):
    loss = script.main(arguments(stores, "scales", "var", tmp_path, "--bf16"))
    assert "bfloat16" in capsys.readouterr().out
    assert math.isfinite(loss)


def test_rows_without_labels_are_of_no_class(script, stores, tmp_path, capsys):
    quantizer = Tokenizer.from_pretrained(stores / "grid").quantizer
    with TokenStore.create(tmp_path / "plain", quantizer, (2, 2), length=20) as store:
        store.append(torch.randint(16, (20, 2, 2, 2)))
    given = arguments(stores, "grid", "ar", tmp_path / "out", "--steps", "2")
    given[1] = str(tmp_path / "plain")
    script.main(given)
    assert AR.from_pretrained(tmp_path / "out" / "generator").classes == 1


def test_what_does_not_fit(script, stores, tmp_path, monkeypatch):
    def refused(message: str, name: str, kind: str, *more: str, tokens: Path | None = None) -> None:
        given = arguments(stores, name, kind, tmp_path / "out", *more)
        given[1] = str(tokens or given[1])
        with pytest.raises(SystemExit, match=message):
            script.main(given)
        assert not (tmp_path / "out").exists()

    other = "holds tokens of another quantizer: codebook_size is 16 there, 8 here"
    refused(other, "scales", "ar", tokens=stores / "grid.tokens")
    refused("nowhere is no token store", "grid", "ar", tokens=tmp_path / "nowhere")
    few = "labels go up to 2, so 2 classes are too few, 3 the least"
    refused(few, "grid", "ar", "--classes", "2")
    refused("a batch has 96 rows, and there are 95 to train on", "grid", "ar", "--batch", "96")
    refused("VAR needs a quantizer whose steps are scales", "grid", "var")
    refused("VAR needs a quantizer whose steps are scales", "grid", "var-bits")

    quantizer = Tokenizer.from_pretrained(stores / "grid").quantizer
    TokenStore.create(tmp_path / "empty", quantizer, (2, 2), length=5).close()
    empty = r"the store has no rows; examples/encode_dataset\.py"
    refused(empty, "grid", "ar", tokens=tmp_path / "empty")
    with TokenStore.create(tmp_path / "few", quantizer, (2, 2), length=5) as store:
        store.append(torch.zeros(5, 2, 2, 2, dtype=torch.long))
    refused("5 rows are too few; 11 are the least", "grid", "ar", tokens=tmp_path / "few")


def test_a_checkpoint_of_other_settings(script, stores, tmp_path):
    script.main(arguments(stores, "grid", "ar", tmp_path, "--steps", "2"))
    other = arguments(stores, "grid", "ar", tmp_path, "--steps", "2", "--lr", "0.5")
    with pytest.raises(SystemExit, match=r"another training: lr 0\.001 there, 0\.5 here; give"):
        script.main(other)


def test_bad_arguments(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--tokens", "a", "--tokenizer", "b", "--save-every", "0"])
    assert "--save-every must be positive, got 0" in capsys.readouterr().err

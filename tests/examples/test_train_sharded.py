"""Weights, gradients and optimizer shared out among processes: the training stays the same."""

# fixtures are imported, and parameters of the same names
# ruff: noqa: F401, F811

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_tokenizer import (
    EXAMPLES,
    as_option,
    records,
    script,
    state,
    tiny,
    train,
    vit,
    weights,
)

needs_sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="FSDP2 of torch 2.6 asks the CPU for events, which it does not have there",
)

STEPS, HALF = 4, 2
PATCHES = {"image_size": 32, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
# of transformers, with the running means, convolutions and discriminator of the configuration
OPTIONS = [
    as_option("model.tokenizer.encoder", {"class": "PatchEncoder", "dim": 8, **PATCHES}),
    as_option("model.tokenizer.decoder", {"class": "PatchDecoder", "dim": 8, **PATCHES}),
    *("--data.batch 8", "--data.accumulate 2", f"--steps {STEPS}", f"--save.every {HALF}"),
    *(f"--eval.every {HALF}", "--eval.pictures 3", "--optimizer.clip 0.01"),
]
SHARDED = "--run.fsdp true"
# where codes move alone, and only as they start again
REVIVED = [
    as_option("model.tokenizer.quantizer", {
        "class": "VQ", "dim": 8, "codebook_size": 16,
        "codebook": {"class": "GradientCodebook", "revive": 0.5},
    }),
    *("--optimizer.lr 0.0", "--optimizer.min_lr 0.0", "--save.every 1", "--discriminator.kind "),
]  # fmt: skip


def work(rank: int, join: Callable[[], None], config: Path, folder: Path) -> list[Any]:
    """A training of two processes, and one that goes on from the middle of it; `held` in each."""
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    warnings.simplefilter("ignore")
    join()
    sys.path.insert(0, str(EXAMPLES))
    import train_tokenizer
    from accelerate import PartialState

    # the second training is one of the same processes
    processes: Any = PartialState
    processes.destroy_process_group = lambda self: None
    found, before = [], train_tokenizer.train

    def train(run: Any, journal: Any) -> Any:
        numbers = before(run, journal)
        found.append(held(run))
        return numbers

    train_tokenizer.train = train
    for name, options in (("whole", []), ("resumed", []), ("revived", REVIVED)):
        if rank == 0 and name == "resumed":
            as_if_stopped(folder / "whole", folder / name)
        torch.distributed.barrier()
        words = [w for option in [*OPTIONS, SHARDED, *options] for w in option.split(" ", 1)]
        train_tokenizer.main(["--config", str(config), "--out", str(folder / name), *words])
    return found


def held(run: Any) -> dict[str, Any]:
    """Numbers that a process has of weights, optimizer and average; modules shared out."""
    weights = list(run.learner.parameters())
    moments = [v for each in run.optimizers[0].state.values() for v in each.values() if v.ndim]
    names = [name for name, _ in run.tokenizer.named_parameters()]
    averages = [run.average.means()[name] for name in names]
    return {
        "own": [sum(x.to_local().numel() for x in xs) for xs in (weights, moments, averages)],
        "all": sum(x.numel() for x in weights),
        "modules": [n for n, m in run.learner.named_modules() if hasattr(m, "unshard")],
    }


def as_if_stopped(whole: Path, folder: Path) -> None:
    """The run as it was in its middle."""
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / f"step-{STEPS:08d}.pt").unlink()


@pytest.fixture(scope="module")
def processes(on_processes, tiny, tmp_path_factory) -> tuple[Path, list[Any]]:
    """Folders "whole", "resumed" and "revived", and what each process held."""
    folder = tmp_path_factory.mktemp("two")
    return folder, on_processes(work, tiny, folder, world_size=2)


@pytest.fixture
def two(processes) -> Path:
    return processes[0]


def assert_alike(found: dict[str, Any], want: dict[str, Any], first: int = 0) -> None:
    """Losses, norms of gradients and held-out numbers."""
    assert len(found["losses"]) == len(want["losses"]) == STEPS
    for one, other in zip(found["losses"][first:], want["losses"][first:], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for one, other in zip(found["held_out"], want["held_out"], strict=True):
        for name in ("psnr", "distance", "perplexity"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
        assert one["used"] == other["used"]


@needs_sharding
@pytest.mark.distributed
def test_two_processes_are_one_without(train, two):
    alone = train(*OPTIONS)
    found = records(two / "whole")
    assert_alike(found, vars(alone))
    assert found["losses"][-1]["adversarial"] != 0
    # clipped
    assert found["losses"][-1]["gradient"] > 0.01
    # in form and in values
    for one, other in zip(tensors(state(two / "whole")), tensors(state(alone.out)), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1], other[1], rtol=1e-3, atol=2e-5)
    saved = [folder / "tokenizer" / "config.json" for folder in (two / "whole", alone.out)]
    assert saved[0].read_text() == saved[1].read_text()


def tensors(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """All of a nested state, by where they are."""
    if isinstance(value, dict):
        return [x for key in value if key != "config" for x in tensors(value[key], f"{name}.{key}")]
    if isinstance(value, list):
        return [x for i, each in enumerate(value) for x in tensors(each, f"{name}.{i}")]
    return [(name, torch.tensor(0.0) if value is None else torch.as_tensor(value))]


@needs_sharding
@pytest.mark.distributed
def test_each_process_has_a_half(processes):
    for process in processes[1]:
        for found in process[:2]:
            weights, moments, averages = (n / found["all"] for n in found["own"])
            assert weights == pytest.approx(0.5, abs=0.02)
            assert moments == 2 * weights
            assert averages == weights
            blocks = [f"tokenizer.{part}coder.transformer.blocks.{i}" for part in ("en", "de")
                      for i in range(2)]  # fmt: skip
            assert found["modules"] == ["", *blocks]


@needs_sharding
@pytest.mark.distributed
def test_they_go_on_as_if_unbroken(two):
    whole, resumed = (records(two / name) for name in ("whole", "resumed"))
    assert resumed["losses"] == whole["losses"]
    assert resumed["held_out"] == whole["held_out"]
    pairs = zip(*(tensors(state(two / name)) for name in ("whole", "resumed")), strict=True)
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)


@needs_sharding
@pytest.mark.distributed
def test_dead_codes_start_again(two):
    first, *_, last = sorted((two / "revived" / "checkpoints").iterdir())
    before, after = (torch.load(path)["tokenizer"] for path in (first, last))
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert "quantizer.codebook.weight" in changed
    assert all("codebook" in key for key in changed)


@needs_sharding
@pytest.mark.distributed
@pytest.mark.parametrize("options", [[], [SHARDED]], ids=["unshared", "shared"])
def test_one_process_goes_on_from_two(train, two, tmp_path, options):
    as_if_stopped(two / "whole", tmp_path / "out")
    assert_alike(vars(train(*OPTIONS, *options)), records(two / "whole"))


@needs_sharding
def test_parts_that_do_not_learn(train, weights):
    leaf = {"class": "VQ", "dim": 8, "codebook_size": 16}
    options = [*vit(leaf), f"--model.weights {weights / 'vit.pth'}", "--steps 3", "--save.every 2"]
    options += ["--model.encoder lora", "--model.decoder frozen", "--model.lora_rank 2"]
    options += ["--discriminator.adaptive false"]
    plain, shared = train(*options, out="plain"), train(*options, SHARDED, out="shared")
    for one, other in zip(shared.losses, plain.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for one, other in zip(tensors(state(shared.out)), tensors(state(plain.out)), strict=True):
        assert one[0] == other[0]


@needs_sharding
@pytest.mark.compile
# dynamo looks at its inputs, which are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled(train):
    torch._dynamo.reset()
    compiled = train("--model.compile aot_eager", "--steps 3", SHARDED)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    plain = train("--steps 3", out="plain")
    for one, other in zip(compiled.losses, plain.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_what_cannot_be(train, monkeypatch):
    monkeypatch.setattr(torch.cpu, "Stream", object)
    with pytest.raises(SystemExit, match="on GPUs alone; take a newer torch, or leave it out"):
        train(SHARDED)

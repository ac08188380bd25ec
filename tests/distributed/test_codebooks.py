"""Codebooks that start, and start again, on several processes: alike, and as good as on one."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.test_sync import CountReductions
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from xq.distributed import broadcast_, gather_rows
from xq.metrics import CodebookUsage
from xq.quantizers import (
    LFQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    GradientCodebook,
    Masked,
    ProductQuantizer,
    ResidualQuantizer,
    initialize,
    revive_in,
)

pytestmark = pytest.mark.distributed

STEPS = 4
EMA = partial(EMACodebook, decay=0.9)
TREES: dict[str, Callable[[], Any]] = {
    "leaf": lambda: VQ(8, 40, codebook=EMA),
    "product-of-residuals": lambda: ProductQuantizer(
        ResidualQuantizer(VQ(4, 40, codebook=EMA), 2), P=2
    ),
    "residual-shared": lambda: ResidualQuantizer(VQ(8, 40, codebook=EMA), 3, shared=True),
    "gradient": lambda: VQ(8, 40, codebook=partial(GradientCodebook, revive=0.02)),
    "wrapped": lambda: ChannelFirst(VQ(8, 40, codebook=EMA)),
}
# the share of a batch's samples that each process has
SPLITS = {2: {"uneven": (200, 1000), "one-empty": (0, 1200)}, 3: {"uneven": (600, 0, 600)}}


def data(count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [1 + torch.randn(1200, 8, generator=generator) for _ in range(count)]


def shaped(name: str, x: Tensor) -> Tensor:
    return x[:, :, None] if name == "wrapped" else x


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def error(name: str, quantizer: nn.Module) -> float:
    x = shaped(name, torch.cat(data()))
    quantizer.eval()
    with torch.no_grad():
        found = (quantizer(x).z - x).square().mean().item()
    quantizer.train()
    return found


def learn(name: str, quantizer: nn.Module, parts: list[Tensor], start: bool) -> dict[str, Any]:
    """Sets the codes or leaves them to revival, and trains; what came of it and what it took."""
    if start:
        initialize(quantizer, shaped(name, torch.cat(parts)))
    out = {"start": state(quantizer), "start error": error(name, quantizer), "calls": []}
    for part in parts * 5:
        with CountReductions() as count:
            quantizer(shaped(name, part))
        out["calls"].append(count.calls)
    # the codes follow their statistics as the next step starts
    with CountReductions():
        quantizer(shaped(name, parts[0]))
    return {**out, "end": state(quantizer), "end error": error(name, quantizer)}


def work(rank: int, join: Callable[[], None], world: int) -> dict[Any, Any]:
    torch.manual_seed(0)
    # built before there is a group; another seed on each process
    built = {name: tree() for name, tree in TREES.items()}
    join()
    torch.manual_seed(rank)
    out: dict[Any, Any] = {}
    for split, sizes in SPLITS[world].items():
        parts = [x.split(sizes)[rank] for x in data()]
        # each nest once, and what holds the most with every split
        whole = world == 2 and split == "uneven"
        names = TREES if whole else ("leaf", "residual-shared", "gradient")
        for name in names:
            quantizer = built[name]
            # without an optimizer gradients teach nothing
            for start in (True,) if name == "gradient" else (True, False):
                quantizer = copy.deepcopy(quantizer)
                torch.manual_seed(rank)
                out[name, split, start] = learn(name, quantizer, parts, start)
    sizes = next(iter(SPLITS[world].values()))
    rows = torch.arange(sum(sizes)).float()[:, None].split(sizes)[rank]
    out["all rows"] = gather_rows(rows, 10**6)
    out["some rows"] = gather_rows(rows, 60)
    mine = torch.full((2,), float(rank))
    broadcast_([mine])
    out["broadcast"] = mine
    out["masked"] = masked(rank)
    out["pairs"] = in_pairs(rank, world)
    out["checkpointed"] = checkpointed(rank)
    return out


def masked(rank: int) -> dict[str, Any]:
    """All is padding on the first process."""
    torch.manual_seed(7)
    quantizer = Masked(VQ(8, 40, codebook=EMA))
    x = data(1)[0][:24].reshape(4, 6, 8)
    for _ in range(3):
        quantizer(x, mask=torch.full((4, 6), rank > 0))
    return state(quantizer)


def in_pairs(rank: int, world: int) -> dict[str, Tensor]:
    """With a group of its own, each process learns alone; and its copies do."""
    groups = [dist.new_group([r]) for r in range(world)]
    torch.manual_seed(0)
    leaf = VQ(4, 6, codebook=partial(EMACodebook, process_group=groups[rank]))
    residual = ResidualQuantizer(leaf, 2)
    entropy = LFQ(4, across_processes=False)
    usage = CodebookUsage(6, process_group=groups[rank])
    x = data(1)[0][rank * 50 : rank * 50 + 50, :4]
    with CountReductions() as count:
        indices = residual(x).indices
        entropy(x.requires_grad_()).losses.regularizer.backward()
        usage.update(indices)
        used = usage.compute().used
    out = state(residual)
    # the one reduction is among one process
    return {**out, "calls": torch.tensor(count.calls), "used": used, "indices": indices}


def checkpointed(rank: int) -> dict[str, Tensor]:
    """Learns once, whether or not the backward pass computes the forward again."""
    out = {}
    for again in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), VQ(8, 40, codebook=EMA))
        for x in data(3):
            part = x.chunk(3)[rank]
            if again:
                z = checkpoint(lambda x, model=model: model(x).z, part, use_reentrant=False)
            else:
                z = model(part).z
            z.square().sum().backward()
        out.update({f"{again} {key}": tensor for key, tensor in state(model).items()})
    return out


@pytest.fixture(scope="module", params=SPLITS)
def processes(request, on_processes) -> list[dict[Any, Any]]:
    """What each process found."""
    return on_processes(work, request.param, world_size=request.param)


def cases(processes: list[dict[Any, Any]]) -> list[tuple[str, str, bool]]:
    return [key for key in processes[0] if isinstance(key, tuple)]


def test_codes_are_alike_bit_for_bit(processes):
    for case in cases(processes):
        for process in processes[1:]:
            for moment in ("start", "end"):
                for key, tensor in processes[0][case][moment].items():
                    assert torch.equal(tensor, process[case][moment][key]), (case, moment, key)


def test_as_good_as_on_one_process(processes):
    for name, split, start in cases(processes):
        runs = [learn(name, TREES[name](), shuffled(seed), start) for seed in range(2)]
        got = processes[0][name, split, start]
        # on one process already, runs with a codebook that steps share differ by 4 %
        most = 1.04 if name == "residual-shared" else 1.02
        for moment in ("start error", "end error") if start else ("end error",):
            want = sum(run[moment] for run in runs) / len(runs)
            assert got[moment] <= most * want, (name, split, start, moment)
        # and it learned
        assert got["end error"] < 0.6 * error(name, TREES[name]())


def shuffled(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [x[torch.randperm(len(x), generator=generator)] for x in data()]


def test_one_reduction_a_step(processes):
    for case in cases(processes):
        for process in processes:
            assert process[case]["calls"] == [1] * (5 * STEPS), case


def test_rows_come_from_all(processes):
    for process in processes:
        rows = process["all rows"][:, 0]
        assert torch.equal(rows.sort().values, torch.arange(1200.0))
        some = process["some rows"][:, 0]
        assert 60 <= len(some) <= 62
        assert len(some.unique()) == len(some)
        # each sixth of them gives a sixth, as it has as many
        assert (torch.histc(some, 6, 0, 1200) >= 9).all()
        assert torch.equal(process["some rows"], processes[0]["some rows"])


def test_broadcast_is_the_first_ones(processes):
    assert all(process["broadcast"].tolist() == [0.0, 0.0] for process in processes)


def test_a_process_with_nothing_but_padding_learns_from_the_others(processes):
    torch.manual_seed(7)
    alone = Masked(VQ(8, 40, codebook=EMA))
    before = state(alone)
    for process in processes:
        for key, tensor in process["masked"].items():
            assert torch.equal(tensor, processes[0]["masked"][key])
    assert not torch.equal(
        before["quantizer.codebook.count"], process["masked"]["quantizer.codebook.count"]
    )


def test_a_group_of_its_own(processes):
    results = [process["pairs"] for process in processes]
    for rank, result in enumerate(results):
        torch.manual_seed(0)
        alone = ResidualQuantizer(VQ(4, 6, codebook=EMACodebook), 2)
        alone(data(1)[0][rank * 50 : rank * 50 + 50, :4])
        for key, tensor in state(alone).items():
            assert torch.equal(tensor, result[key])
    first, second = (result["steps.0.codebook.total"] for result in results[:2])
    assert not torch.equal(first, second)


def test_checkpointing_learns_once(processes):
    for process in processes:
        found = process["checkpointed"]
        for key in (key[6:] for key in found if key.startswith("False ")):
            torch.testing.assert_close(found[f"True {key}"], found[f"False {key}"])


def test_processes_that_share_a_group_by_name_cannot_be_pickled():
    import pickle

    from xq.distributed import SharedGroup

    assert pickle.loads(pickle.dumps(SharedGroup())).group is None
    with pytest.raises(TypeError, match=r"process_group of its own cannot be pickled: save its"):
        pickle.dumps(SharedGroup("group"))


def model_of(factory: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), VQ(8, 24, codebook=factory), Decoder()
    )


class Decoder(nn.Module):
    """From what a quantizer returns back to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, quantized: Any) -> tuple[Tensor, Tensor]:
        return self.layer(quantized.z), quantized.losses.total()


FACTORIES = {
    "ema": partial(EMACodebook, decay=0.8, revive=0.0),
    "gradient": GradientCodebook,
    "ema revived": EMA,
    "gradient revived": partial(GradientCodebook, revive=0.02),
}


def fit(model: nn.Module, parts: list[Tensor], rows: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if any(isinstance(m, GradientCodebook) and m.revives for m in model.modules()):
        revive_in(optimizer, model)
    losses = []
    for x in parts:
        image, extra = model(x)
        # the mean over all rows, wherever they are
        loss = (image - x).square().sum() / (8 * rows) + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# FSDP2 of torch 2.6 asks the CPU for events, which it does not have there
SHARDS = hasattr(torch.cpu.Stream, "record_event")
WRAPPERS = [
    "ddp",
    pytest.param(
        "fsdp", marks=pytest.mark.skipif(not SHARDS, reason="torch 2.6 has FSDP2 on GPUs alone")
    ),
]


def work_wrapped(rank: int, join: Callable[[], None]) -> dict[str, Any]:
    join()
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    out: dict[str, Any] = {}
    for name, factory in FACTORIES.items():
        parts = [x.chunk(2)[rank] - 1 for x in data() * 6]
        for how in ("ddp", "fsdp") if SHARDS else ("ddp",):
            model = model_of(factory)
            if how == "ddp":
                model = DistributedDataParallel(model)
            else:
                fully_shard(model)
                assert any(isinstance(p, DTensor) for p in model.parameters())
            losses = fit(model, parts, 600)
            full = {
                key.removeprefix("module."): t.full_tensor() if isinstance(t, DTensor) else t
                for key, t in model.state_dict().items()
            }
            out[f"{name} {how}"] = {"losses": losses, "state": full}
    return out


@pytest.fixture(scope="module")
def wrapped(on_processes) -> list[dict[str, Any]]:
    """A model in the two wrappers for data parallelism, trained on two processes."""
    return on_processes(work_wrapped, world_size=2)


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("name", FACTORIES)
def test_wrapped_models_train_as_one(wrapped, name, how):
    alone = model_of(FACTORIES[name])
    want = fit(alone, [x - 1 for x in data() * 6], 1200)
    first, second = (process[f"{name} {how}"] for process in wrapped)
    for key, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][key]), key
    got = (torch.tensor(first["losses"]) + torch.tensor(second["losses"])) / 2
    assert got.isfinite().all()
    assert first["state"]["3.codebook.weight"].shape == (24, 8)
    # revived codes start at other rows than on one process
    close = len(want) if "revived" not in name else 1
    torch.testing.assert_close(got[:close], torch.tensor(want[:close]), rtol=1e-3, atol=1e-4)
    moved = first["state"]["3.codebook.weight"] != model_of(FACTORIES[name])[3].codebook.weight
    assert "revived" not in name or moved.any(-1).all()

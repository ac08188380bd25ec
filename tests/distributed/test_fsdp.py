"""Tokenizers whose weights are shared out (FSDP2), as the guide does it: the same as one process.

On the CPU; torch's own is made for GPUs, and this is all of it that can be tried without one.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_docs import blocks
from torch import Tensor, nn

from xq.losses import adaptive_weight
from xq.models import CNNDecoder, CNNEncoder, PatchDecoder, PatchEncoder, Tokenizer
from xq.quantizers import VQ, EMACodebook, ProductQuantizer, Pyramid, Refine, ResidualQuantizer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"),
        reason="FSDP2 of torch 2.6 asks the CPU for events, which it does not have there",
    ),
]

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "training.md"
STEPS, SIDE = 3, 16
PATCHES: dict[str, Any] = {"image_size": SIDE, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
CONVOLUTIONS: dict[str, Any] = {"channels": 8, "multipliers": (1,), "blocks": 1, "patch": 4}


def recipe() -> SimpleNamespace:
    """What the guide's block defines."""
    namespace: dict[str, Any] = {}
    for _, code in blocks(GUIDE.read_text()):
        exec(code, namespace)
    return SimpleNamespace(**namespace)


def transformers() -> Tokenizer:
    """With two branches of three scales, running means and learned convolutions between them."""
    pyramid = Pyramid([1, 2, 4], [Refine(4), Refine(4)])
    leaf = VQ(4, 16, codebook=partial(EMACodebook, decay=0.9, revive=0.0))
    quantizer = ProductQuantizer(ResidualQuantizer(leaf, multiscale=pyramid), P=2)
    encoder = PatchEncoder(8, checkpointing=True, **PATCHES)
    return Tokenizer(encoder, quantizer, PatchDecoder(8, **PATCHES))


def convolutions() -> Tokenizer:
    """With codes that learn by gradient."""
    return Tokenizer(
        CNNEncoder(4, z_channels=8, **CONVOLUTIONS),
        VQ(4, 16),
        CNNDecoder(4, z_channels=8, **CONVOLUTIONS),
    )


MODELS = {"transformers": transformers, "convolutions": convolutions}


def made(name: str) -> Tokenizer:
    torch.manual_seed(0)
    return MODELS[name]()


def blocks_of(tokenizer: Any) -> list[nn.Module]:
    """Those of transformers."""
    parts = (getattr(part, "transformer", None) for part in (tokenizer.encoder, tokenizer.decoder))
    return [block for part in parts if part for block in part.blocks]


def batches() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.rand(8, 3, SIDE, SIDE, generator=random) * 2 - 1 for _ in range(STEPS + 1)]


def optimizer_of(tokenizer: nn.Module) -> torch.optim.Optimizer:
    # what is before a norm has no gradient but rounding, which a small epsilon would magnify
    return torch.optim.AdamW(tokenizer.parameters(), lr=1e-2, eps=1e-3)


def fit(tokenizer: Any, optimizer: Any, images: list[Tensor]) -> list[list[float]]:
    """Trains with clipping and an adaptive weight; loss, weight and norm of each step."""
    found = []
    for x in images:
        image, (_, _, losses) = tokenizer(x)
        error, other = (image - x).square().mean(), image.abs().mean()
        weight = adaptive_weight(error, other, tokenizer.decoder.last_layer)
        loss = error + losses.total() + 0.1 * weight * other
        optimizer.zero_grad()
        loss.backward()
        norm: Any = nn.utils.clip_grad_norm_(tokenizer.parameters(), 0.1)
        optimizer.step()
        norm = getattr(norm, "full_tensor", lambda norm=norm: norm)()
        found.append([loss.item(), weight.item(), norm.item()])
    return found


def coded(tokenizer: Any) -> list[Tensor]:
    """Tokens of images, and an image from tokens, of a tokenizer that has learned."""
    # what one call has gathered would do for the next one
    share = getattr(tokenizer, "reshard", lambda: None)
    tokenizer.eval()
    share()
    indices = tokenizer.encode(batches()[0])
    share()
    image = tokenizer.decode(indices).detach()
    tokenizer.train()
    return [indices, image]


def through_a_file(state: Any) -> Any:
    """As a checkpoint holds it; in memory buffers would go on changing."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def work(rank: int, join: Callable[[], None]) -> dict[str, Any]:
    join()
    return {name: learn(rank, name) for name in MODELS}


def learn(rank: int, name: str) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.tensor import DTensor

    tokenizer, guide = made(name), recipe()
    guide.share_out(tokenizer, blocks_of(tokenizer))
    assert all(isinstance(p, DTensor) for p in tokenizer.parameters())
    optimizer = optimizer_of(tokenizer)
    parts = [x.chunk(2)[rank] for x in batches()]
    out: dict[str, Any] = {"steps": fit(tokenizer, optimizer, parts[:STEPS])}
    out["coded"], out["state"] = coded(tokenizer), through_a_file(guide.whole(tokenizer))
    whole = states.StateDictOptions(full_state_dict=True)
    kept = through_a_file(states.get_state_dict(tokenizer, optimizer, options=whole))
    again = made(name)
    guide.share_out(again, blocks_of(again))
    after = optimizer_of(again)
    states.set_state_dict(
        again, after, model_state_dict=kept[0], optim_state_dict=kept[1], options=whole
    )
    out["unbroken"] = [*fit(tokenizer, optimizer, parts[STEPS:]), guide.whole(tokenizer)]
    out["again"] = [*fit(again, after, parts[STEPS:]), guide.whole(again)]
    return out


@pytest.fixture(scope="module")
def processes(on_processes) -> list[dict[str, Any]]:
    """What came of each model on two processes."""
    return on_processes(work, world_size=2)


@pytest.mark.parametrize("name", MODELS)
def test_they_learn_and_code_as_one_process_with_the_joint_batch(processes, name):
    alone = made(name)
    want = torch.tensor(fit(alone, optimizer_of(alone), batches()[:STEPS]))
    # losses are of each process's half, weights and norms of the whole
    steps = torch.tensor([process[name]["steps"] for process in processes])
    torch.testing.assert_close(steps.mean(0), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(*steps[..., 1:])
    indices, image = coded(alone)
    for process in processes:
        found = process[name]["coded"]
        assert torch.equal(found[0], indices)
        torch.testing.assert_close(found[1], image, rtol=1e-5, atol=1e-5)
    first, second = (process[name]["state"] for process in processes)
    assert first.keys() == alone.state_dict().keys()
    started = made(name).state_dict()
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(first[key], started[key]) for key in first if "codebook" in key)


@pytest.mark.parametrize("name", MODELS)
def test_they_go_on_from_their_whole_state(processes, name):
    for process in processes:
        found = process[name]
        (steps, state), (again, state_again) = found["unbroken"], found["again"]
        assert steps == again
        assert all(torch.equal(state[key], state_again[key]) for key in state)

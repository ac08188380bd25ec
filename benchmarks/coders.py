"""Ways to train a code for vectors: the library's own learning rules, faiss, vqp."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.cases import XQ, Red
from benchmarks.gates import Nearest
from benchmarks.peers import VQP, needs, vqp
from xq.quantizers import (
    VQ,
    EMACodebook,
    ProductQuantizer,
    Quantizer,
    ResidualQuantizer,
    beam_encode,
    initialize,
)

FAISS = "faiss"
WIDTH = 8
BEAM = f", beam {WIDTH}"
# how many vectors of a batch k-means sees for each code, and never fewer than this
_SEEN, _FEWEST = 16, 1 << 13
# of running means: small at first, so that codes forget where they started
_DECAY, _LAST_DECAY, _REACHED = 0.9, 0.99, 0.8
# dead codes start again until then
_REVIVES = 0.9
# of vqp, the threshold as a share of the fair count
_VQP_DECAY, _VQP_DEAD = 0.95, 0.1
# of Adam, down to zero
_RATE = 1e-2
# what the gate looks at
_CHECKED = 512


class Coder(NamedTuple):
    """A trained code.

    Attributes:
        name: Of the contender.
        code: Vectors to indices `(n, parts)` and to what these decode to.
        codes: How many codes each part has.
        is_slow: Whether to spare it the training vectors.
    """

    name: str
    code: Callable[[Tensor], tuple[Int[Tensor, "n parts"], Float[Tensor, "n dim"]]]
    codes: int
    is_slow: bool = False


class Plan(NamedTuple):
    """How all contenders that learn by batches are trained.

    Attributes:
        batch: Vectors a step.
        epochs: Times that each vector is seen.
        revive: See `EMACodebook`.
    """

    batch: int
    epochs: int
    revive: float = 0.02

    def steps(self, x: Float[Tensor, "n dim"], seed: int) -> Any:
        """How far training is, from 0 to 1, and the batch."""
        generator = torch.Generator().manual_seed(seed)
        each = len(x) // self.batch
        for epoch in range(self.epochs):
            order = torch.randperm(len(x), generator=generator)
            for i, rows in enumerate(order.split(self.batch)[:each]):
                yield (epoch * each + i) / (self.epochs * each), x[rows]


Trainer = Callable[[Tensor, int], list[Coder]]


def averaged(dim: int, codebook_size: int) -> VQ:
    """A VQ whose codes are running means."""
    return VQ(dim, codebook_size, codebook=EMACodebook)


def train_(quantizer: Quantizer, x: Float[Tensor, "n dim"], plan: Plan, seed: int) -> None:
    """The recipe: k-means++ start, means that forget less and less, dead codes start again."""
    books = [m for m in quantizer.modules() if isinstance(m, EMACodebook)]
    some = max(_SEEN * max(book.codebook_size for book in books), _FEWEST)
    initialize(quantizer, x[:some], seed=seed)
    quantizer.train()
    for done, batch in plan.steps(x, seed):
        part = min(done / _REACHED, 1.0)
        for book in books:
            # 1 - decay goes down geometrically
            book.decay = 1 - (1 - _DECAY) ** (1 - part) * (1 - _LAST_DECAY) ** part
            book.revive = plan.revive if done < _REVIVES else 0.0
        quantizer(batch)
    quantizer.eval()


def ours(make: Callable[[], Quantizer], plan: Plan) -> Trainer:
    """Trains what `make` makes; a residual is coded greedily and by beam search."""

    def trained(x: Tensor, seed: int) -> list[Coder]:
        quantizer = make()
        train_(quantizer, x, plan, seed)
        codes = quantizer.codebook_size
        coders = [Coder(XQ, partial(_coded, quantizer), codes)]
        if isinstance(quantizer, ResidualQuantizer):
            search = partial(_coded, quantizer, width=WIDTH)
            coders.append(Coder(XQ + BEAM, search, codes, is_slow=True))
        return coders

    return trained


@torch.no_grad()
def _coded(quantizer: Quantizer, x: Tensor, width: int = 1) -> tuple[Tensor, Tensor]:
    indices = quantizer.encode(x) if width == 1 else beam_encode(quantizer, x, width)
    z = quantizer.decode(indices)
    check_coded(quantizer, x, indices, z, width)
    return indices.reshape(len(x), -1), z


def check_coded(quantizer: Any, x: Tensor, indices: Tensor, z: Tensor, width: int) -> None:
    """The gate, on some vectors: greedy codes are the nearest, a search finds none that are worse.

    Raises:
        Red: If that is not so.
    """
    x, indices, z = x[:_CHECKED], indices[:_CHECKED], z[:_CHECKED]
    if width > 1:
        greedy = (quantizer.decode(quantizer.encode(x)) - x).square().sum(-1)
        worse = (z - x).square().sum(-1) > greedy * (1 + 1e-5) + 1e-9
        if worse.any():
            raise Red(f"{XQ}{BEAM}: {int(worse.sum())} vectors are worse off than by encode")
        return
    _check_greedy(quantizer, x, indices)
    again = quantizer(x)[0]
    if not torch.equal(again, z):
        raise Red(f"{XQ}: decode differs from what forward gives")


def _check_greedy(quantizer: Any, x: Tensor, indices: Tensor) -> None:
    if isinstance(quantizer, VQ):
        Nearest(x, quantizer.codebook.codes()).check(XQ, indices)
    elif isinstance(quantizer, ProductQuantizer):
        for p, (branch, part) in enumerate(
            zip(quantizer.branches, quantizer.split(x), strict=True)
        ):
            _check_greedy(branch, part, indices[:, p])
    elif isinstance(quantizer, ResidualQuantizer):
        for k, step in enumerate(quantizer.steps):
            _check_greedy(step, x, indices[:, k])
            x = x - quantizer.dequantize_step(indices[:, k], k)


def faiss_kmeans(codebook_size: int) -> Trainer:
    """`faiss.Kmeans` with its defaults: 25 rounds on 256 vectors a code."""
    faiss = _faiss()

    def trained(x: Tensor, seed: int) -> list[Coder]:
        kmeans = faiss.Kmeans(x.shape[1], codebook_size, niter=25, seed=1 + seed)
        kmeans.train(x.numpy())
        centroids = torch.from_numpy(kmeans.centroids)

        def code(x: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.from_numpy(kmeans.index.search(x.numpy(), 1)[1])
            return found, centroids[found[:, 0]]

        return [Coder(FAISS, code, codebook_size)]

    return trained


def faiss_codes(kind: str, parts: int, *, beam: bool = False) -> Trainer:
    """`faiss.ProductQuantizer` or `ResidualQuantizer`, of 8 bits a part.

    Args:
        kind: The class.
        parts: Of an index.
        beam: Whether a residual searches, in training too.
    """
    faiss = _faiss()

    def trained(x: Tensor, seed: int) -> list[Coder]:
        quantizer = getattr(faiss, kind)(x.shape[1], parts, 8)
        quantizer.cp.seed = 1 + seed
        if kind == "ResidualQuantizer":
            quantizer.max_beam_size = WIDTH if beam else 1
        quantizer.train(x.numpy())

        def code(x: Tensor) -> tuple[Tensor, Tensor]:
            # 8 bits a part, so a byte each
            codes = quantizer.compute_codes(x.numpy())
            return torch.from_numpy(codes).long(), torch.from_numpy(quantizer.decode(codes))

        return [Coder(FAISS + (BEAM if beam else ""), code, 256, is_slow=beam)]

    return trained


def _faiss() -> Any:
    needs("faiss", "faiss-cpu")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def vqp_averaged(name: str, plan: Plan, **sizes: Any) -> Trainer:
    """A class of vector-quantize-pytorch with averaged codes, in the same batches.

    With its own k-means on the first batch, and the decay and threshold that it does best with.
    """
    make = getattr(vqp(), name)
    options = {
        "decay": _VQP_DECAY,
        "threshold_ema_dead_code": _VQP_DEAD * plan.batch / sizes["codebook_size"],
        "kmeans_init": True,
        "rotation_trick": False,
    }

    def trained(x: Tensor, seed: int) -> list[Coder]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = make(dim=x.shape[1], **sizes, **options).train()
            with torch.no_grad():
                for _, batch in plan.steps(x, seed):
                    module(batch[None])
        return [Coder(VQP, partial(_vqp_coded, module.eval()), sizes["codebook_size"])]

    return trained


@torch.no_grad()
def _vqp_coded(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z, indices, *_ = module(x[None])
    # the groups of a GroupedResidualVQ come first
    if indices.ndim == 4:
        indices = indices.movedim(0, -1)
    return indices.reshape(len(x), -1), z[0]


def behind_linear(name: str, make: Callable[[], Any], plan: Plan, **weights: float) -> Trainer:
    """A quantizer without a codebook between two linear maps, all trained for the squared error.

    Args:
        name: Of the contender.
        make: Makes the quantizer, ours or vqp's, for as many channels as `make().dim`.
        plan: The batches.
        **weights: Of our losses.
    """

    def trained(x: Tensor, seed: int) -> list[Coder]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _Linear(make(), x)
            _descend(model, x, plan, seed, weights)
        model.eval()
        codes = int(model.quantizer.codebook_size)

        @torch.no_grad()
        def code(x: Tensor) -> tuple[Tensor, Tensor]:
            z, indices, _ = model(x)
            return indices.reshape(len(x), -1), z

        return [Coder(name, code, codes)]

    return trained


class _Linear(nn.Module):
    """Principal components, each of variance one; a quantizer; and back."""

    def __init__(self, quantizer: Any, x: Float[Tensor, "n dim"]) -> None:
        super().__init__()
        self.quantizer, dim = quantizer, quantizer.dim
        self.encoder, self.decoder = nn.Linear(x.shape[1], dim), nn.Linear(dim, x.shape[1])
        values, vectors = torch.linalg.eigh(x.T.double() @ x.double() / len(x))
        # in ascending order
        deviation, components = values[-dim:].sqrt(), vectors[:, -dim:]
        with torch.no_grad():
            self.encoder.weight.copy_((components / deviation).T)
            self.decoder.weight.copy_(components * deviation)
            self.encoder.bias.zero_()
            self.decoder.bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        u = self.encoder(x)
        if isinstance(self.quantizer, Quantizer):
            z, indices, losses = self.quantizer(u)
        else:
            z, indices, *rest = self.quantizer(u[None])
            z, indices, losses = z[0], indices[0], sum(rest)
        return self.decoder(z), indices, losses


def _descend(model: _Linear, x: Tensor, plan: Plan, seed: int, weights: dict[str, float]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    variance = x.var().item()
    for done, batch in plan.steps(x, seed):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - done)
        decoded, _, losses = model(batch)
        extra = losses.total(**weights) if hasattr(losses, "total") else losses
        loss = F.mse_loss(decoded, batch) / variance + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

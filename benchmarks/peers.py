"""Other people's ways to do the same, each behind one function."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Skip
from benchmarks.memory import room
from benchmarks.words import memory

VQP = "vqp"  # vector-quantize-pytorch; the tables have no room for the whole name


def needs(module: str, package: str) -> None:
    """Skips a contender whose package is missing."""
    if find_spec(module) is None:
        raise Skip(f"not installed (pip install {package})")


def fits(size: float, device: str) -> None:
    """Skips a contender that would need more bytes than there is room for."""
    if size > room(device):
        raise Skip(f"it would take about {memory(size)}")


def vqp() -> Any:
    """The module `vector_quantize_pytorch`."""
    needs("vector_quantize_pytorch", "vector-quantize-pytorch")
    import vector_quantize_pytorch

    return vector_quantize_pytorch


def addmm_argmin(x: Tensor, codes: Tensor) -> Tensor:
    """All squared distances in one matrix, as VAR, LlamaGen and XQ-GAN compute them."""
    d = x.square().sum(1, keepdim=True) + codes.square().sum(1)
    d.addmm_(x, codes.T, alpha=-2, beta=1)
    return d.argmin(1)


def addmm_topk(x: Tensor, codes: Tensor, k: int) -> Tensor:
    """The same, for the k nearest."""
    d = x.square().sum(1, keepdim=True) + codes.square().sum(1)
    d.addmm_(x, codes.T, alpha=-2, beta=1)
    return d.topk(k, largest=False).indices


def cosine_argmax(x: Tensor, codes: Tensor) -> Tensor:
    """All cosines in one matrix, as XQ-GAN computes them."""
    return (F.normalize(x, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(1)


def faiss_knn(x: Tensor, codes: Tensor, metric: str, k: int) -> Callable[[], Tensor]:
    """`faiss.knn` called directly, with as many threads as torch has."""
    if x.is_cuda:
        raise Skip("faiss-cpu runs on the CPU")
    needs("faiss", "faiss-cpu")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def run() -> Tensor:
        if metric == "cosine":
            unit, unit_codes = F.normalize(x, dim=-1).numpy(), F.normalize(codes, dim=-1).numpy()
            _, found = faiss.knn(unit, unit_codes, k, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            _, found = faiss.knn(x.numpy(), codes.numpy(), k)
        return torch.from_numpy(found)

    return run


def vqp_lookup(x: Tensor, codes: Tensor, metric: str) -> Callable[[], Tensor]:
    """The indices of `VectorQuantize` in evaluation."""
    module = vqp().VectorQuantize(
        codes.shape[1], len(codes), use_cosine_sim=metric == "cosine", rotation_trick=False
    )
    # distances beside a one-hot matrix in integers and one in floats
    fits(len(x) * len(codes) * (4 + 8 + 4) + x.nbytes, x.device.type)
    module = module.to(x.device).eval()
    module.codebook = F.normalize(codes, dim=-1) if metric == "cosine" else codes

    @torch.no_grad()
    def run() -> Tensor:
        return module(x[None])[1][0]

    return run


def flash_kmeans(x: Tensor, codes: Tensor) -> Callable[[], Tensor]:
    """The assignment step of flash-kmeans, whose products are in TF32."""
    needs("flash_kmeans", "flash-kmeans")
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    def run() -> Tensor:
        norms = x.square().sum(1)
        return euclid_assign_triton(x[None], codes[None], norms[None])[0].long()

    return run


def softmax_entropy(x: Tensor, codes: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Per-token and batch entropy of the soft assignment to all codes, one softmax over them."""
    logits = 2 / temperature * x @ codes.T
    p = logits.softmax(-1)
    per_token = -(p * logits.log_softmax(-1)).sum(-1).mean()
    mean = p.mean(0)
    # a code that no token nears has probability zero
    batch = -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
    return per_token, batch

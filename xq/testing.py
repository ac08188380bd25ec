"""The contract of every quantizer, as a function: hold your own leaf to it."""

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xq.config import build, describe
from xq.quantizers import Quantizer, straight_through
from xq.quantizers.estimators import passes_through


def check_quantizer(
    quantizer: Quantizer,
    x: Float[Tensor, "..."],
    *,
    classes: Iterable[type | Callable[..., Any]] = (),
) -> None:
    """Checks all that composites, models and token stores rely on.

    Shapes and ranges, decoding bit for bit, prefixes, gradients, losses, purity of `encode`,
    state dicts, copies, precision. The quantizer itself is left as it was.

    Args:
        quantizer: Any leaf or tree.
        x: A float32 batch that fits it, of two samples or more.
        classes: Classes and functions of one's own that its `config()` names.

    Raises:
        AssertionError: Naming the promise that is broken.

    Examples:
        >>> check_quantizer(FSQ([4, 3]), torch.randn(3, 5, 2))
    """
    for training in (False, True):
        q = copy.deepcopy(quantizer).train(training)
        _check_output(q, x)
        # what training draws at random, it draws where gradients are
        with torch.set_grad_enabled(not (training and q.noisy)):
            _check_decode(q, x)
            _check_depth(q, x)
        _check_purity(q, x)
        _check_precision(q, x)
    _check_gradients(copy.deepcopy(quantizer).train(), x)
    _check_empty(copy.deepcopy(quantizer).train(), x)
    _check_copies(copy.deepcopy(quantizer).eval(), x)
    _check_config(copy.deepcopy(quantizer).eval(), x, classes)


def _check_output(q: Quantizer, x: Tensor) -> None:
    z, indices, losses = q(x)
    _claim(z.shape == x.shape and z.dtype == x.dtype, "z has the shape and dtype of the input")
    _claim(indices.dtype == torch.int64, "indices are int64")
    tokens = (len(x), q.num_tokens) if q.scales else x.shape[:-1]
    _claim(indices.shape == (*tokens, *q.code_shape), "indices: token shape, then code_shape")
    _claim(bool((indices >= 0).all()), "indices are not negative")
    _claim(bool((indices < q.codebook_size).all()), "indices are below codebook_size")
    for name, loss in losses._asdict().items():
        _claim(loss.shape == () and bool(loss.isfinite()), f"{name} is a finite scalar")
        _claim(loss.item() >= -1e-5, f"{name} is not negative, but for rounding")


def _check_decode(q: Quantizer, x: Tensor) -> None:
    z, indices, _ = q(x)
    _claim(torch.equal(q.encode(x), indices), "encode gives the indices of forward")
    _claim(torch.equal(q.decode(indices), z), "decode gives the z of forward, bit for bit")
    with torch.no_grad():
        chosen = q.choose(q.bound(x))
    _claim(torch.equal(chosen.z, z), "choose gives the z of quantize")
    narrow = (torch.uint8, torch.int16, torch.int32)
    for dtype in (d for d in narrow if q.codebook_size <= torch.iinfo(d).max):
        _claim(torch.equal(q.decode(indices.to(dtype)), z), f"decode takes {dtype} indices")
    partials = list(q.partials(indices))
    _claim(len(partials) == q.depth, "partials has one entry a step")
    _claim(torch.equal(partials[-1], z), "the last partial is the whole")
    for k, partial in enumerate(partials, 1):
        _claim(torch.equal(q.decode(_leading(q, indices, k)), partial), "decode takes prefixes")


def _leading(q: Quantizer, indices: Tensor, k: int) -> Tensor:
    """The indices of the first k steps or scales."""
    if q.step_axis is None:
        return indices
    if q.step_axis == -1:
        return indices[:, : sum(h * w for h, w in q.grids[:k])]
    axis = indices.ndim - len(q.code_shape) + q.step_axis
    return indices.narrow(axis, 0, k)


def _check_depth(q: Quantizer, x: Tensor) -> None:
    _, indices, _ = q(x)
    partials = list(q.partials(indices))
    with torch.no_grad():
        for d, partial in enumerate(partials, 1):
            _claim(torch.equal(q(x, depth=d).z, partial), "depth=d gives the d-th partial")
        depth = 1 + torch.arange(len(x)) % q.depth
        z = q(x, depth=depth).z
    each = torch.stack([partials[int(d) - 1][i] for i, d in enumerate(depth)])
    _claim(torch.equal(z, each), "depth may differ from sample to sample")


def _check_purity(q: Quantizer, x: Tensor) -> None:
    before = _tensors(q)
    q.encode(x)
    with torch.no_grad():
        q(x)
    q.decode(q.encode(x))
    _claim(_same(before, _tensors(q)), "encode, decode and no_grad passes change nothing")


def _check_precision(q: Quantizer, x: Tensor) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        rounded = x.to(dtype)
        want = q.encode(rounded.float())
        _claim(torch.equal(q.encode(rounded), want), f"{dtype} inputs give float32's indices")
        cast = copy.deepcopy(q).to(dtype)
        _claim(torch.equal(cast.encode(rounded), want), f"{dtype} modules give float32's indices")
        _claim(q(rounded).z.dtype == dtype, f"z of a {dtype} input is {dtype}")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = q.encode(x)
    _claim(torch.equal(got, q.encode(x)), "autocast does not change the indices")


def _check_gradients(q: Quantizer, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    z, _, losses = q(x)
    (got,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    _claim(bool(got.isfinite().all()), "the gradient of z is finite")
    if _straight_through(q.estimators):
        (want,) = torch.autograd.grad(q.bound(x).sum(), x)
        _claim(torch.allclose(got, want), "the gradient of z is that of bound, once")
    u = q.bound(x).detach().requires_grad_()
    inner = q.quantize(u).z
    if inner.requires_grad and not passes_through(q.estimators):
        (leak,) = torch.autograd.grad(inner.sum(), u, allow_unused=True)
        none = leak is None or not leak.any()
        _claim(none, "quantize gives its input no gradient through z; estimate does, at the root")
    (z.sum() + losses.total()).backward()
    for name, parameter in q.named_parameters():
        grad = parameter.grad
        _claim(grad is not None, f"{name} receives a gradient")
        _claim(bool(grad.isfinite().all()), f"the gradient of {name} is finite")  # pyright: ignore
    with torch.no_grad():
        silent = copy.deepcopy(q)(x)
    for name in () if q.noisy else ("commitment", "codebook"):
        pair = getattr(silent.losses, name), getattr(losses, name)
        _claim(torch.allclose(*pair), f"{name} has one value, with gradients and without")


def _straight_through(estimators: Any) -> bool:
    if isinstance(estimators, list):
        return all(map(_straight_through, estimators))
    return estimators is straight_through


def _check_empty(q: Quantizer, x: Tensor) -> None:
    before = _tensors(q)
    empty = x[:0].clone().requires_grad_()
    z, indices, losses = q(empty)
    _claim(z.shape == empty.shape and len(indices) == 0, "an empty batch gives empty results")
    _claim(losses.total().item() == 0, "an empty batch has no loss")
    (z.sum() + losses.total()).backward()
    reached = all(parameter.grad is not None for parameter in q.parameters())
    _claim(reached, "an empty batch reaches every parameter")
    _claim(_same(before, _tensors(q)), "an empty batch teaches nothing")


def _check_copies(q: Quantizer, x: Tensor) -> None:
    want = q(x)
    for name, twin in (("deepcopy", copy.deepcopy(q)), ("pickle", pickle.loads(pickle.dumps(q)))):
        _claim(torch.equal(twin(x).z, want.z), f"{name} gives an equal quantizer")
    state = q.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = copy.deepcopy(q)
    for tensor in loaded.state_dict().values():
        tensor.zero_()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    _claim(torch.equal(loaded(x).z, want.z), "its state dict holds all that it needs")


def _check_config(q: Quantizer, x: Tensor, classes: Iterable[type | Callable[..., Any]]) -> None:
    leaves = [part for part in q.modules() if isinstance(part, Quantizer)]
    if any(type(part).config is Quantizer.config for part in leaves):
        return
    text = json.dumps(describe(q))
    with torch.device("meta"):
        twin = build(json.loads(text), [type(q), *classes])
    _claim(json.dumps(describe(twin)) == text, "config() rebuilds it")
    twin.load_state_dict(q.state_dict(), assign=True)
    _claim(torch.equal(twin.eval()(x).z, q(x).z), "built on meta and loaded, it is the same")
    twin.train()(x.clone().requires_grad_())


def _tensors(q: Quantizer) -> list[Tensor]:
    tensors: list[Any] = [*q.parameters(), *q.buffers()]
    return [t.detach().clone() for t in tensors]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _claim(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(f"broken promise: {promise}")

"""What the ablation compares: quantizers, numbers of codes, and what is added to the training."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import log2
from typing import Any

from examples.common.quantizers import EMA, RECIPES, Recipe
from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ProductQuantizer,
    Pyramid,
    Quantizer,
    Refine,
    ResidualQuantizer,
)

# channels of all branches together, where a code is a vector
DIM = 24
# of a grid of 8 x 8: 130 tokens, about as many as two codes a place
SCALES = (1, 2, 3, 4, 6, 8)
_REFINEMENTS = 4
SMALL, LARGE = 4096, 16384


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        name: As the tables show it; those that differ in their seed share it.
        family: Which kind of quantizer it is.
        make: The quantizer.
        recipe: Key of `RECIPES`.
        codes: Codes of a codebook.
        variant_of: The case that it differs from by one thing, or none.
        dropout: Whether quantizer dropout takes part.
        alignment: Whether the last branch is aligned to what a frozen network sees.
        discriminator: Whether a PatchGAN judges in the last third.
        times: How many times as many steps as the others.
        seed: Of weights, crops and draws.
    """

    name: str
    family: str
    make: Callable[[], Quantizer]
    recipe: str
    codes: int = SMALL
    variant_of: str = ""
    dropout: bool = False
    alignment: bool = False
    discriminator: bool = False
    times: int = 1
    seed: int = 0

    @property
    def training(self) -> Recipe:
        """How the example trains this kind."""
        return RECIPES[self.recipe]

    def described(self) -> dict[str, Any]:
        """All that its numbers depend on, but for what all cases share, as JSON."""
        told = asdict(self)
        del told["make"]
        return told | {"recipe": asdict(self.training), "quantizer": self.make().config()}


def vq(codes: int = SMALL, branches: int = 1) -> Case:
    """A code a place, or one of each branch."""
    leaf = partial(VQ, DIM // branches, codes, codebook=EMA)
    if branches == 1:
        return _of_size("VQ", "VQ", leaf, "vq", codes)
    name = f"PQ P={branches}"
    return _of_size(name, "PQ", lambda: ProductQuantizer(leaf(), P=branches), "pq", codes)


def rq(depth: int) -> Case:
    """Several codes a place, which add up."""
    make = partial(VQ, DIM, SMALL, codebook=EMA)
    return Case(f"RQ {depth}", "RQ", lambda: ResidualQuantizer(make(), depth), "rq")


def msvq(codes: int = SMALL, branches: int = 1) -> Case:
    """Codes at six scales."""
    leaf = partial(VQ, DIM // branches, codes, codebook=EMA)
    name = _branched("MSVQ", branches)
    return _of_size(name, "MSVQ", lambda: _scaled(leaf(), branches), "msvr10p2", codes)


def msbsq(codes: int = SMALL, branches: int = 1, shrink: float = 1.0) -> Case:
    """Signs on a sphere, at six scales, those of scale k times `shrink**k`."""
    bits, name = round(log2(codes)), _branched("MSBSQ", branches)

    def make() -> Quantizer:
        return _scaled(BSQ(bits, regularize=False), branches, shrink)

    case = _of_size(name, "MSBSQ", make, "msbr10p2", codes)
    if shrink == 1:
        return case
    return replace(case, name=f"{case.name}, shrink {shrink:g}", variant_of=case.name)


def lfq() -> Case:
    """Signs."""
    return Case("LFQ", "LFQ", lambda: LFQ(12, bound="tanh"), "lfq")


def bsq() -> Case:
    """Signs on a sphere."""
    return Case("BSQ", "BSQ", lambda: BSQ(12, regularize=False), "bsq")


def cases(quick: bool) -> list[Case]:
    """All, the most telling first; what a short run leaves out are repetitions."""
    if quick:
        return [vq(16), varied(msvq(16, 2), dropout=True)]
    kinds = [vq(), rq(2), vq(branches=2), msvq(), msbsq(), lfq(), bsq(), vq(branches=4)]
    seeds = [again(vq(), 1), again(msvq(), 1)]
    added = [varied(msvq(), dropout=True), varied(msvq(), discriminator=True)]
    added += [varied(vq(branches=2), alignment=True)]
    large = [vq(LARGE), msvq(LARGE), vq(LARGE, 2), msbsq(LARGE)]
    shrinks = [msbsq(shrink=shrink) for shrink in (0.8, 0.9, 0.7)]
    bits = [msvq(branches=2), msbsq(branches=2), rq(4)]
    longer = [longer_trained(case, 4) for case in (msbsq(), msvq())]
    last = [again(msbsq(), 1), again(vq(branches=2), 1), again(msvq(), 2), again(vq(), 2)]
    return [*kinds, *seeds, *added, *large, *shrinks, *bits, *longer, *last]


def varied(case: Case, **added: Any) -> Case:
    """The same with something added to its training."""
    name = f"{case.name}, {' and '.join(added)}"
    return replace(case, name=name, variant_of=case.name, **added)


def longer_trained(case: Case, times: int) -> Case:
    """The same with more steps, the learning rate stretched over them."""
    return replace(case, name=f"{case.name}, {times} x steps", variant_of=case.name, times=times)


def again(case: Case, seed: int) -> Case:
    """The same from another seed."""
    return replace(case, seed=seed)


def _scaled(leaf: Quantizer, branches: int, shrink: float = 1.0) -> Quantizer:
    scales = Pyramid(SCALES, [Refine(leaf.dim) for _ in range(_REFINEMENTS)])
    residual = ResidualQuantizer(leaf, multiscale=scales, shrink=shrink)
    return residual if branches == 1 else ProductQuantizer(residual, P=branches)


def _branched(name: str, branches: int) -> str:
    return name if branches == 1 else f"{name} P={branches}"


def _of_size(
    name: str, family: str, make: Callable[[], Quantizer], recipe: str, codes: int
) -> Case:
    case = Case(name, family, make, recipe, codes)
    if codes != LARGE:
        return case
    return replace(case, name=f"{name}, K={codes}", variant_of=name)

"""What a next-scale generator predicts of a token: its codes, or each of their bits."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from xq.models.conditions import MOST_CODES
from xq.quantizers import BSQ, LFQ, Quantizer
from xq.quantizers.bits import indices_to_signs, signs_to_indices


class CodesHead:
    """One softmax over all values of an index.

    Args:
        codebook_size: How many values an index can take.
        code_shape: The shape of one token's indices.

    Raises:
        ValueError: If there are too many values.
    """

    def __init__(self, codebook_size: int, code_shape: Sequence[int]) -> None:
        if codebook_size > MOST_CODES:
            raise ValueError(
                f"VAR would need a softmax over {codebook_size} codes; head='bits' predicts each "
                "bit of an LFQ or BSQ index by itself"
            )
        self.outcomes = (*code_shape, codebook_size)

    def check(self, quantizer: nn.Module) -> None:
        """Any quantizer will do."""

    def targets(self, tokens: Int[Tensor, "b t *code"]) -> Int[Tensor, "b t *places"]:
        """Which outcome is the right one."""
        return tokens

    def tokens(self, drawn: Int[Tensor, "b t *places"]) -> Int[Tensor, "b t *code"]:
        """The tokens that outcomes stand for."""
        return drawn


class BitsHead:
    """A softmax over two signs for each bit, the lowest first (Han et al. 2025, Infinity, 3.3).

    Of an index of d bits it needs 2d outputs instead of 2^d. Bits are independent of each other,
    given the scales before.

    Args:
        codebook_size: How many values an index can take.
        code_shape: The shape of one token's indices.

    Raises:
        ValueError: If the number of values is no power of 2.
    """

    def __init__(self, codebook_size: int, code_shape: Sequence[int]) -> None:
        self.bits = codebook_size.bit_length() - 1
        if not self.bits or codebook_size != 2**self.bits:
            raise ValueError(
                "VAR with head='bits' needs a codebook_size that is a power of 2, got "
                f"{codebook_size}; head='codes' takes any"
            )
        self.outcomes = (*code_shape, self.bits, 2)

    def check(self, quantizer: nn.Module) -> None:
        """Refuses indices whose bits mean nothing.

        Raises:
            ValueError: If they are not those of LFQ or BSQ.
        """
        leaves = [part for part in quantizer.modules() if _is_leaf(part)]
        if other := next((leaf for leaf in leaves if not isinstance(leaf, LFQ | BSQ)), None):
            raise ValueError(
                "VAR with head='bits' needs the signs of LFQ or BSQ, the bits of a "
                f"{type(other).__name__} index mean nothing by themselves; head='codes' takes any "
                "quantizer"
            )

    def targets(self, tokens: Int[Tensor, "b t *code"]) -> Int[Tensor, "b t *places"]:
        """Which outcome is the right one."""
        return indices_to_signs(tokens, self.bits).long()

    def tokens(self, drawn: Int[Tensor, "b t *places"]) -> Int[Tensor, "b t *code"]:
        """The tokens that outcomes stand for."""
        return signs_to_indices(drawn > 0)


def make_head(head: str, codebook_size: int, code_shape: Sequence[int]) -> CodesHead | BitsHead:
    """The head of that name.

    Raises:
        ValueError: If there is none, or it does not fit.
    """
    kinds: dict[str, Any] = {"codes": CodesHead, "bits": BitsHead}
    if head not in kinds:
        raise ValueError(f"VAR has the heads {', '.join(kinds)}, got {head!r}")
    return kinds[head](codebook_size, code_shape)


def _is_leaf(part: nn.Module) -> bool:
    parts = [each for each in part.modules() if isinstance(each, Quantizer)]
    return parts == [part]

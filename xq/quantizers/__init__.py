"""Quantizers: leaves, composites and wrappers, and what they are made of."""

from xq.quantizers.base import (
    Losses as Losses,
    Quantized as Quantized,
    Quantizer as Quantizer,
    fit as fit,
)
from xq.quantizers.binary import BSQ as BSQ, LFQ as LFQ
from xq.quantizers.bits import (
    indices_to_signs as indices_to_signs,
    signs_to_indices as signs_to_indices,
)
from xq.quantizers.codebook import (
    Codebook as Codebook,
    GradientCodebook as GradientCodebook,
    accumulating as accumulating,
)
from xq.quantizers.depth import DepthDropout as DepthDropout
from xq.quantizers.ema import EMACodebook as EMACodebook
from xq.quantizers.entropy import (
    CodeEntropy as CodeEntropy,
    entropy_in_bits as entropy_in_bits,
    sign_entropy as sign_entropy,
)
from xq.quantizers.estimators import (
    rotation_trick as rotation_trick,
    straight_through as straight_through,
)
from xq.quantizers.grids import Pyramid as Pyramid, Refine as Refine
from xq.quantizers.layout import ChannelFirst as ChannelFirst
from xq.quantizers.lookup import nearest as nearest
from xq.quantizers.product import ProductQuantizer as ProductQuantizer
from xq.quantizers.projected import Projected as Projected
from xq.quantizers.residual import ResidualQuantizer as ResidualQuantizer
from xq.quantizers.vq import VQ as VQ
from xq.quantizers.wrapper import Wrapper as Wrapper

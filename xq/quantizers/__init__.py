"""Quantizers: leaves, composites and wrappers, and what they are made of."""

from xq.quantizers.base import (
    Losses as Losses,
    Quantized as Quantized,
    Quantizer as Quantizer,
    fit as fit,
)
from xq.quantizers.beam import beam_encode as beam_encode
from xq.quantizers.binary import BSQ as BSQ, LFQ as LFQ
from xq.quantizers.bits import (
    indices_to_signs as indices_to_signs,
    signs_to_indices as signs_to_indices,
)
from xq.quantizers.codebook import (
    Codebook as Codebook,
    accumulating as accumulating,
)
from xq.quantizers.depth import DepthDropout as DepthDropout
from xq.quantizers.diveq import DiVeQ as DiVeQ
from xq.quantizers.ema import EMACodebook as EMACodebook
from xq.quantizers.entropy import (
    CodeEntropy as CodeEntropy,
    entropy_in_bits as entropy_in_bits,
    sign_entropy as sign_entropy,
)
from xq.quantizers.estimators import (
    passthrough as passthrough,
    rotation_trick as rotation_trick,
    straight_through as straight_through,
)
from xq.quantizers.fsq import FSQ as FSQ
from xq.quantizers.gradient_codebook import (
    GradientCodebook as GradientCodebook,
    revive_in as revive_in,
)
from xq.quantizers.grids import Pyramid as Pyramid, Refine as Refine
from xq.quantizers.gumbel import GumbelVQ as GumbelVQ
from xq.quantizers.ibq import IBQ as IBQ
from xq.quantizers.initialize import initialize as initialize
from xq.quantizers.layout import ChannelFirst as ChannelFirst
from xq.quantizers.lookup import nearest as nearest
from xq.quantizers.masked import Masked as Masked
from xq.quantizers.orthogonality import orthogonality as orthogonality
from xq.quantizers.pack import pack as pack, unpack as unpack
from xq.quantizers.perturb import Perturbed as Perturbed, robust_schedule as robust_schedule
from xq.quantizers.product import ProductQuantizer as ProductQuantizer
from xq.quantizers.projected import Projected as Projected
from xq.quantizers.random_projection import (
    RandomProjectionQuantizer as RandomProjectionQuantizer,
)
from xq.quantizers.residual import ResidualQuantizer as ResidualQuantizer
from xq.quantizers.resizing import add_codes as add_codes, keep_codes as keep_codes
from xq.quantizers.sampling import CodeSampling as CodeSampling
from xq.quantizers.sim_codebook import SimCodebook as SimCodebook
from xq.quantizers.vq import VQ as VQ
from xq.quantizers.wrapper import Wrapper as Wrapper

"""xq: the parts of image tokenizers, as plain PyTorch modules."""

from xq.metrics import CodebookUsage as CodebookUsage
from xq.models import Tokenizer as Tokenizer
from xq.quantizers import (
    BSQ as BSQ,
    FSQ as FSQ,
    LFQ as LFQ,
    VQ as VQ,
    ChannelFirst as ChannelFirst,
    DepthDropout as DepthDropout,
    EMACodebook as EMACodebook,
    ProductQuantizer as ProductQuantizer,
    Projected as Projected,
    Pyramid as Pyramid,
    Quantizer as Quantizer,
    Refine as Refine,
    ResidualQuantizer as ResidualQuantizer,
)
from xq.token_store import TokenStore as TokenStore

__version__ = "0.1.0"

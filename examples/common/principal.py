"""A tokenizer within a second: principal components of photographs, and k-means."""

import torch

from common.data import find_pictures, read, to_float
from xq.models import LinearDecoder, LinearEncoder, Tokenizer, fit_pca_
from xq.quantizers import VQ, ResidualQuantizer, initialize

_SIDE = 384


@torch.no_grad()
def principal_components(dim: int = 24, patch: int = 8) -> Tokenizer:
    """A linear tokenizer for which nothing is trained but k-means."""
    pictures = [read(path)[:, :_SIDE, :_SIDE] for path in find_pictures("demo")[0]]
    crops = to_float(torch.stack(pictures))
    encoder, decoder = LinearEncoder(dim, patch), LinearDecoder(dim, patch)
    fit_pca_(encoder, decoder, crops)
    quantizer = ResidualQuantizer(VQ(dim, 256), depth=6)
    initialize(quantizer, encoder(crops))
    return Tokenizer(encoder, quantizer, decoder)

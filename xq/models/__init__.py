"""Tokenizers, and the encoders and decoders around their quantizers."""

from xq.models.cnn import CNNDecoder as CNNDecoder, CNNEncoder as CNNEncoder
from xq.models.linear import (
    LinearDecoder as LinearDecoder,
    LinearEncoder as LinearEncoder,
    Sum as Sum,
    fit_pca_ as fit_pca_,
)
from xq.models.next_scale import (
    NextScale as NextScale,
    next_scale_input as next_scale_input,
    teacher_forcing as teacher_forcing,
)
from xq.models.tokenizer import Reconstruction as Reconstruction, Tokenizer as Tokenizer
from xq.models.vit import ViTDecoder as ViTDecoder, ViTEncoder as ViTEncoder

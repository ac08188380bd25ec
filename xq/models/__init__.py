"""Tokenizers, and the encoders and decoders around their quantizers."""

from xq.models.ar import (
    AR as AR,
    ar_b as ar_b,
    ar_l as ar_l,
    ar_xl as ar_xl,
    ar_xxl as ar_xxl,
)
from xq.models.cnn import CNNDecoder as CNNDecoder, CNNEncoder as CNNEncoder
from xq.models.export import (
    export_decoder as export_decoder,
    export_encoder as export_encoder,
    to_onnx as to_onnx,
)
from xq.models.linear import (
    LinearDecoder as LinearDecoder,
    LinearEncoder as LinearEncoder,
    Sum as Sum,
    fit_pca_ as fit_pca_,
)
from xq.models.magvit2 import MAGVIT2Decoder as MAGVIT2Decoder, MAGVIT2Encoder as MAGVIT2Encoder
from xq.models.next_scale import (
    NextScale as NextScale,
    next_scale_input as next_scale_input,
    teacher_forcing as teacher_forcing,
)
from xq.models.plain_vit import PatchDecoder as PatchDecoder, PatchEncoder as PatchEncoder
from xq.models.rar import (
    RAR as RAR,
    random_share as random_share,
    rar_b as rar_b,
    rar_l as rar_l,
)
from xq.models.sampling import growing_guidance as growing_guidance
from xq.models.titok import TiTokDecoder as TiTokDecoder, TiTokEncoder as TiTokEncoder
from xq.models.titok_pixels import MaskGITDecoder as MaskGITDecoder
from xq.models.tokenizer import Reconstruction as Reconstruction, Tokenizer as Tokenizer
from xq.models.tuning import (
    add_lora_ as add_lora_,
    check_optimizer as check_optimizer,
    freeze_ as freeze_,
    load_lora_ as load_lora_,
    lora_state_dict as lora_state_dict,
    merge_lora_ as merge_lora_,
    save_lora as save_lora,
)
from xq.models.var import VAR as VAR
from xq.models.vit import ViTDecoder as ViTDecoder, ViTEncoder as ViTEncoder

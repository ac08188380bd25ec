"""Published tokenizers by name, at full size, with random weights; and a tiny trained one.

`python -m xq.models.presets` prints what they are: parameters, tokens, bits and the published
reconstruction FID.
"""

from xq.models.presets.convolutional import (
    ibq as ibq,
    llamagen_vq8 as llamagen_vq8,
    llamagen_vq16 as llamagen_vq16,
    magvit2_lfq as magvit2_lfq,
    rqgan as rqgan,
    var_vqvae as var_vqvae,
    vqgan as vqgan,
    vqgan_gumbel as vqgan_gumbel,
)
from xq.models.presets.row import Row as Row
from xq.models.presets.trained import tiny as tiny
from xq.models.presets.transformers import (
    bsq_vit as bsq_vit,
    titok as titok,
    vit_vqgan as vit_vqgan,
)
from xq.models.presets.xqgan import (
    msbr10p2 as msbr10p2,
    msvr10p2 as msvr10p2,
    robusttok as robusttok,
    vp2 as vp2,
    vq as vq,
    xqgan_sc as xqgan_sc,
    xqgan_v as xqgan_v,
)

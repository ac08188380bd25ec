"""Losses around a quantizer's own."""

from xq.losses.adaptive_weight import adaptive_weight as adaptive_weight
from xq.losses.adversarial import (
    DiscriminatorLoss as DiscriminatorLoss,
    GeneratorLoss as GeneratorLoss,
    discriminator_loss as discriminator_loss,
    generator_loss as generator_loss,
)
from xq.losses.alignment import FeatureAlignment as FeatureAlignment
from xq.losses.codebook import (
    CodebookLoss as CodebookLoss,
    EntropyLoss as EntropyLoss,
    code_entropy as code_entropy,
    codebook_loss as codebook_loss,
    entropy_loss as entropy_loss,
)
from xq.losses.composite import (
    Composite as Composite,
    CompositeLoss as CompositeLoss,
    composite as composite,
)
from xq.losses.contrastive import (
    ContrastiveLoss as ContrastiveLoss,
    CosineLoss as CosineLoss,
    contrastive_loss as contrastive_loss,
    cooling_temperature as cooling_temperature,
    cosine_loss as cosine_loss,
)
from xq.losses.diffaug import DiffAug as DiffAug, fading_blur as fading_blur
from xq.losses.discriminators import (
    DINODiscriminator as DINODiscriminator,
    PatchGAN as PatchGAN,
    StyleGANDiscriminator as StyleGANDiscriminator,
)
from xq.losses.lecam import LeCam as LeCam, lecam as lecam
from xq.losses.perceptual import LPIPS as LPIPS, lpips as lpips
from xq.losses.r1 import R1 as R1, r1 as r1
from xq.losses.ramp import ramp as ramp
from xq.losses.reconstruction import L1 as L1, L2 as L2, l1 as l1, l2 as l2
from xq.losses.teachers import (
    CLIPTeacher as CLIPTeacher,
    Features as Features,
    Teacher as Teacher,
    TimmTeacher as TimmTeacher,
)

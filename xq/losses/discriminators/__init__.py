"""Networks that tell generated images from real ones, for adversarial losses."""

from xq.losses.discriminators.dino import DINODiscriminator as DINODiscriminator
from xq.losses.discriminators.patchgan import PatchGAN as PatchGAN
from xq.losses.discriminators.stylegan import StyleGANDiscriminator as StyleGANDiscriminator

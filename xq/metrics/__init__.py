"""What to watch while a tokenizer trains. Metrics consume outputs; they never live in `forward`."""

from xq.metrics.frechet import (
    FeatureMoments as FeatureMoments,
    FrechetDistance as FrechetDistance,
    Gaussian as Gaussian,
    frechet_distance as frechet_distance,
)
from xq.metrics.pictures import psnr as psnr, ssim as ssim
from xq.metrics.usage import (
    CodebookUsage as CodebookUsage,
    HasCodes as HasCodes,
    RunningUtilisation as RunningUtilisation,
    Usage as Usage,
)

"""What users of other libraries meet when a discriminator joins; see docs/complaints.md."""

import io
from itertools import pairwise

import torch
from torch import Tensor, nn

from xq.losses import DiscriminatorLoss, GeneratorLoss, LeCam, PatchGAN, adaptive_weight, l2, ramp


def gradient(loss: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(loss, weight, retain_graph=True)[0]


def test_complaint_23_the_adversarial_term_never_outweighs_the_reconstruction() -> None:
    """Reconstruction breaks when the discriminator starts (taming-transformers#44, #93)."""
    torch.manual_seed(0)
    decoder, discriminator = nn.Conv2d(4, 3, 3, padding=1), PatchGAN(channels=4)
    # a discriminator that has run far away from the generator
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(3)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    image = decoder(torch.randn(2, 4, 32, 32))
    pixels, adversarial = l2(image, images), GeneratorLoss()(discriminator(image))
    own = gradient(pixels, decoder.weight).norm()
    assert gradient(adversarial, decoder.weight).norm() > 2 * own
    shares = []
    for step in range(12):
        weight = ramp(step, start=4, length=4) * adaptive_weight(
            pixels, adversarial, decoder.weight
        )
        shares.append(gradient(weight * adversarial, decoder.weight).norm() / own)
    # it starts late, after its discriminator may have begun, grows, and ends as strong at most
    assert torch.stack(shares[:4]).count_nonzero() == 0
    assert 0 < shares[4] < 0.25
    assert all(a < b for a, b in pairwise(shares[3:9]))
    assert 0.99 < shares[-1] <= 1


def test_complaint_24_a_discriminator_resumes_bit_for_bit() -> None:
    """Checkpoints lack the discriminator (LlamaGen#15) and the running means beside it."""
    torch.manual_seed(0)
    pairs = [torch.randn(2, 4, 3, 32, 32).clamp(-1, 1) for _ in range(4)]

    def build() -> tuple[nn.ModuleList, torch.optim.Optimizer]:
        parts = nn.ModuleList([PatchGAN(channels=4), LeCam(decay=0.5)])
        return parts, torch.optim.AdamW(parts.parameters(), lr=1e-2)

    def train(parts: nn.ModuleList, optimizer: torch.optim.Optimizer, batches: list) -> Tensor:
        discriminator, lecam = parts
        for real, fake in batches:
            logits = discriminator(real), discriminator(fake)
            loss = DiscriminatorLoss()(*logits) + lecam(*logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss

    parts, optimizer = build()
    train(parts, optimizer, pairs[:2])
    file = io.BytesIO()
    torch.save([parts.state_dict(), optimizer.state_dict()], file)
    want = train(parts, optimizer, pairs[2:])
    file.seek(0)
    weights, moments = torch.load(file, weights_only=True)
    twin, second = build()
    twin.load_state_dict(weights)
    second.load_state_dict(moments)
    assert torch.equal(train(twin, second, pairs[2:]), want)
    for key, tensor in parts.state_dict().items():
        assert torch.equal(twin.state_dict()[key], tensor), key

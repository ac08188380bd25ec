"""ONNX files, run by onnxruntime, give what the tokenizer gives."""

from pathlib import Path

import pytest
import torch

from xq.models import CNNDecoder, CNNEncoder, LinearDecoder, LinearEncoder, Tokenizer, to_onnx
from xq.quantizers import LFQ, VQ, ProductQuantizer, ResidualQuantizer

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# the import hook for annotations rules out tracing
pytestmark = pytest.mark.compile

SIZES = {"channels": 4, "multipliers": (1,), "blocks": 1, "z_channels": 4, "patch": 2}
FILES = ["decoder.onnx", "encoder.onnx"]


def convolutional() -> Tokenizer:
    return Tokenizer(CNNEncoder(4, **SIZES), VQ(4, 19, metric="cosine"), CNNDecoder(4, **SIZES))


def linear(quantizer) -> Tokenizer:
    return Tokenizer(LinearEncoder(quantizer.dim, 2), quantizer, LinearDecoder(quantizer.dim, 2))


def scales() -> Tokenizer:
    return linear(ProductQuantizer(ResidualQuantizer(LFQ(3), multiscale=(1, 2)), P=2))


TOKENIZERS = {
    "vq between convolutions": (convolutional, (6, 8)),
    "product of scales of lfq": (scales, (4, 4)),
}


def pictures(b: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(b, 3, *size, generator=torch.Generator().manual_seed(b)) * 2 - 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_batches_of_any_size_go_through_one_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, size = TOKENIZERS[name]
    tokenizer = make()
    to_onnx(tokenizer, tmp_path / "made", pictures(1, size))
    assert tokenizer.training
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == FILES
    tokenizer.eval()
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / "made" / f"{part}.onnx")
        for part in ("encoder", "decoder")
    )
    for b in (1, 3):
        image = pictures(b, size)
        indices = tokenizer.encode(image)
        (got,) = encoder.run(["indices"], {"image": image.numpy()})
        assert torch.equal(torch.from_numpy(got), indices)
        with torch.no_grad():
            want = tokenizer.decode(indices)
        (made,) = decoder.run(["image"], {"indices": indices.numpy()})
        torch.testing.assert_close(torch.from_numpy(made), want, atol=1e-4, rtol=0)
    assert len(indices.unique()) > 2


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    tokenizer, image = linear(LFQ(4)), pictures(1, (4, 4))
    with pytest.raises(RuntimeError, match="no such operator"):
        to_onnx(tokenizer, tmp_path / "new", image)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "encoder.onnx").write_text("of before")
    with pytest.raises(RuntimeError, match="no such operator"):
        to_onnx(tokenizer, tmp_path / "old", image)
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["encoder.onnx"]
    assert (tmp_path / "old" / "encoder.onnx").read_text() == "of before"


def test_without_the_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = 'needs the extra "onnx", and onnx and onnxscript cannot be found: pip install onnx'
    with pytest.raises(ImportError, match=message):
        to_onnx(linear(LFQ(4)), tmp_path / "new", pictures(1, (4, 4)))
    assert not (tmp_path / "new").exists()

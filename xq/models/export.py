"""Tokenizers as programs that run without their classes: `torch.export`, and ONNX files."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.export import ExportedProgram

from xq.models.tokenizer import Tokenizer, eval_mode
from xq.pretrained import PathLike, folder_for
from xq.quantizers.lookup.plain import nearest_plain

_ONNX = ("onnx", "onnxscript", "onnxruntime")


def export_encoder(tokenizer: Tokenizer, image: Shaped[Tensor, "..."]) -> ExportedProgram:
    """The program from images to tokens, `tokenizer.encode` in eval mode, for batches of any size.

    The program calls xq's own operator for the nearest code where there is one, so whoever runs
    it imports `xq.quantizers` first; files for other runtimes are `to_onnx`'s.

    Args:
        tokenizer: On any device; left as it is.
        image: Images whose height, width, dtype and device the program is for.

    Raises:
        ValueError: If the tokenizer does not take such images.
    """
    return _exported(tokenizer, _Encoder(tokenizer), image)


def export_decoder(tokenizer: Tokenizer, image: Shaped[Tensor, "..."]) -> ExportedProgram:
    """The program from tokens to images, `tokenizer.decode` in eval mode, for any batch size.

    Args:
        tokenizer: On any device; left as it is.
        image: Images whose tokens, all of them, the program is for.

    Raises:
        ValueError: If the tokenizer does not take such images.
    """
    with eval_mode(tokenizer):
        indices = tokenizer.encode(image)
    return _exported(tokenizer, _Decoder(tokenizer), indices)


def to_onnx(tokenizer: Tokenizer, folder: PathLike, image: Shaped[Tensor, "..."]) -> None:
    """Writes `encoder.onnx`, "image" to "indices", and `decoder.onnx`, "indices" to "image".

    Both take batches of any size, and consist of standard operators of ONNX alone. Searching a
    codebook there holds a score for each token and code, which takes memory: at 256 tokens and
    16384 codes 16 MiB an image. Indices are those of `encode` except where two codes are equally
    near within rounding; nothing refuses an image with NaN. Weights above 2 GB stand in files of
    their own beside the two, named after them.

    Args:
        tokenizer: Left as it is.
        folder: Made if it is not there; both files are written there, or none.
        image: Images whose height, width and dtype the files are for.

    Raises:
        ImportError: If the extra "onnx" is not installed.
        ValueError: If the tokenizer does not take such images.
    """
    missing = [name for name in _ONNX[:2] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'to_onnx needs the extra "onnx", and {" and ".join(missing)} cannot be found: '
            f"pip install {' '.join(_ONNX)}"
        )
    programs = {
        ("encoder", "image", "indices"): export_encoder(tokenizer, image),
        ("decoder", "indices", "image"): export_decoder(tokenizer, image),
    }
    with folder_for(Path(folder)) as target, tempfile.TemporaryDirectory(dir=target) as staging:
        for (name, given, result), program in programs.items():
            converted: Any = torch.onnx.export(
                program.run_decompositions(_STANDARD),
                dynamo=True,
                input_names=[given],
                output_names=[result],
                verbose=False,
            )
            converted.save(Path(staging, f"{name}.onnx"))
        # should it end between two of these, no program stands beside another's weights or decoder
        for name, *_ in programs:
            (target / f"{name}.onnx").unlink(missing_ok=True)
        for file in sorted(Path(staging).iterdir(), key=lambda file: file.suffix == ".onnx"):
            file.replace(target / file.name)


class _Encoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, image: Tensor) -> Tensor:
        return self.tokenizer.encode(image)


class _Decoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, indices: Tensor) -> Tensor:
        return self.tokenizer.decode(indices)


def _exported(tokenizer: Tokenizer, module: nn.Module, example: Tensor) -> ExportedProgram:
    if not len(example):
        raise ValueError(f"Tokenizer is exported with one image or more, got {len(example)}")
    # a batch of one would be taken for a constant
    example = example[:1].expand(2, *example.shape[1:]).contiguous()
    batch = torch.export.Dim.DYNAMIC
    with eval_mode(tokenizer), torch.no_grad():
        return torch.export.export(module.eval(), (example,), dynamic_shapes=({0: batch},))


def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of two in the middle, as torch takes it."""
    values, places = x.sort(dim)
    middle = (x.shape[dim] - 1) // 2
    values, places = values.narrow(dim, middle, 1), places.narrow(dim, middle, 1)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def _shifted(x: Tensor, bits: Tensor) -> Tensor:
    return x * 2**bits


def _hard(u: Tensor, codes: Tensor, hard: Tensor) -> Tensor:
    return hard.clone()


# operators that ONNX does not have, in terms of some that it has
_STANDARD: dict[Any, Any] = {
    torch.ops.xq.nearest.default: nearest_plain,
    torch.ops.xq.propagated.default: _hard,
    torch.ops.aten.median.dim: _median,
    torch.ops.aten.__lshift__.Tensor: _shifted,
}

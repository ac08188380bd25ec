"""Tokenizer: encoder, quantizer, decoder."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xq.config import build, describe
from xq.quantizers import Quantized, Quantizer, Wrapper
from xq.quantizers.base import Depth, ScalesLike
from xq.quantizers.sharing import sharing

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Reconstruction(NamedTuple):
    """An image back from its tokens, and what the quantizer said."""

    image: Float[Tensor, "b c h w"]
    quantized: Quantized


class Tokenizer(nn.Module):
    """Images to tokens and back.

    Args:
        encoder: Maps images to vectors of `quantizer.dim` channels, channel-last (or whatever
            layout a wrapper around the quantizer takes).
        quantizer: Any quantizer or wrapper.
        decoder: Maps vectors of that layout to images.
    """

    def __init__(
        self, encoder: nn.Module, quantizer: Quantizer | Wrapper, decoder: nn.Module
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder

    def forward(self, image: Float[Tensor, "b c h w"], depth: Depth = None) -> Reconstruction:
        """Reconstructs images.

        Args:
            image: As the encoder takes them, usually in [-1, 1].
            depth: See `Quantizer.forward`.
        """
        quantized = self.quantizer(self.encoder(image), depth)
        return Reconstruction(self.decoder(quantized.z), quantized)

    @torch.no_grad()
    def encode(self, image: Float[Tensor, "b c h w"]) -> Int[Tensor, "..."]:
        """The tokens of images."""
        return self.quantizer.encode(self.encoder(image))

    def decode(self, indices: Shaped[Tensor, "..."]) -> Float[Tensor, "b c h w"]:
        """Images from tokens; leading steps or scales alone give a coarser one."""
        return self.decoder(self._as_decoder(self.quantizer.decode(indices)))

    def partials(self, indices: Shaped[Tensor, "..."]) -> Iterator[Float[Tensor, "b c h w"]]:
        """Images after each step or scale, coarse to fine."""
        for z in self.quantizer.partials(indices):
            yield self.decoder(self._as_decoder(z))

    def _as_decoder(self, z: Tensor) -> Tensor:
        # quantizers decode in float32, the decoder may be narrower
        weight = next((p for p in self.decoder.parameters() if p.is_floating_point()), z)
        return z.to(weight.dtype)

    def with_scales(self, scales: ScalesLike) -> "Tokenizer":
        """The same modules, shared, with the quantizer at another resolution."""
        return sharing(self, quantizer=self.quantizer.with_scales(scales))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON."""
        return describe(
            {"encoder": self.encoder, "quantizer": self.quantizer, "decoder": self.decoder}
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors`; each file appears whole or not at all.

        Raises:
            TypeError: If a part has no `config()`; nothing is written then.
        """
        text = json.dumps(describe(self), indent=2) + "\n"
        with _folder(Path(folder)) as target, tempfile.TemporaryDirectory(dir=target) as staging:
            weights, config = Path(staging, _WEIGHTS), Path(staging, _CONFIG)
            save_file(_owned(self), weights, metadata={"format": "pt"})
            config.write_text(text)
            weights.replace(target / _WEIGHTS)
            config.replace(target / _CONFIG)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        classes: Iterable[type | Callable[..., Any]] = (),
    ) -> "Tokenizer":
        """Reads a folder that `save_pretrained` wrote; the tokenizer is in eval mode.

        Nothing in the files is executed.

        Args:
            folder: Holds `config.json` and `model.safetensors`.
            classes: Classes and functions of one's own that the configuration names.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, or the two do not fit each other.
        """
        config, weights = Path(folder, _CONFIG), Path(folder, _WEIGHTS)
        for path in (config, weights):
            if not path.is_file():
                raise FileNotFoundError(
                    f"Tokenizer.from_pretrained finds no {path.name} in {Path(folder)}; "
                    "it reads what save_pretrained wrote"
                )
        model = _build(cls, config, classes)
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights} is damaged or no safetensors file: {error}") from error
        _load(model, state, weights)
        return model.eval()


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """Makes the folder, and takes it away again if nothing came of it."""
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        yield target
    except BaseException:
        if not existed and not any(target.iterdir()):
            target.rmdir()
        raise


def _build(
    cls: type[Tokenizer], path: Path, classes: Iterable[type | Callable[..., Any]]
) -> Tokenizer:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON file: {error}") from error
    if not isinstance(config, dict) or "class" not in config:
        raise ValueError(f'{path} describes no xq model: it has no "class"')
    model = build(config, [cls, *classes])
    if not isinstance(model, cls):
        raise ValueError(f"{path} describes a {type(model).__name__}, not a {cls.__name__}")
    return model


def _owned(model: nn.Module) -> dict[str, Tensor]:
    """The state, each tensor once: shared modules appear under their first name."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), name)
    return {name: state[name].detach().contiguous() for name in names.values()}


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    want = _owned(model)
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its config.json: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
        )
    for name, tensor in want.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{path} has {name} of shape {tuple(state[name].shape)}, "
                f"its config.json wants {tuple(tensor.shape)}"
            )
        # half precision is fine, but no float of an integer nor the reverse
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise ValueError(
                f"{path} has {name} of {state[name].dtype}, its config.json wants {tensor.dtype}"
            )
    # checked above; the further names of shared tensors are not in the file
    model.load_state_dict(state, strict=False)

"""Files of weights of other projects on the command line.

python -m xq.models.checkpoints inspect FILE
python -m xq.models.checkpoints convert FILE OUT_DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xq.models.checkpoints.load import Found, formats, inspect_checkpoint, load_checkpoint
from xq.models.tokenizer import Tokenizer
from xq.pretrained import Pretrained
from xq.quantizers import Quantizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 if it worked, otherwise 2 after one line on standard error."""
    options = _parse(arguments)
    try:
        if options.command == "convert":
            _convert(options)
        else:
            _say(_facts(inspect_checkpoint(options.file, **_which(options))))
    except (ValueError, OSError, TypeError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _convert(options: argparse.Namespace) -> None:
    target = Path(options.out)
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder")
    if (target / "config.json").exists():
        raise ValueError(f"{target} holds a model already; name another folder or remove it")
    found = inspect_checkpoint(options.file, **_which(options))
    module = load_checkpoint(options.file, **_which(options))
    if not isinstance(module, Pretrained):
        raise ValueError(
            f"{found.title} is no tokenizer or quantizer, so no folder can hold it; "
            "load_checkpoint reads it"
        )
    module.save_pretrained(target)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    _say(
        [
            *_facts(found),
            ("written", f"{target} ({size:.1f} MB)"),
            ("read it", f"{_reader(module)}.from_pretrained({str(target)!r})"),
            ("parameters", f"{parameters / 1e6:.2f} M"),
        ]
    )


def _reader(module: Pretrained) -> str:
    if isinstance(module, Tokenizer | Quantizer):
        return f"xq.{'Tokenizer' if isinstance(module, Tokenizer) else 'Quantizer'}"
    return f"xq.quantizers.{type(module).__name__}"


def _facts(found: Found) -> list[tuple[str, str]]:
    return [
        ("file of", f"{found.title} (format {found.format})"),
        ("weights", f"{found.weights}, of {', '.join(found.sets)}"),
        ("tensors", f"{found.tensors} with {found.numbers / 1e6:.2f} M numbers"),
    ]


def _say(lines: Sequence[tuple[str, str]]) -> None:
    for name, value in lines:
        sys.stdout.write(f"{name:<12}{value}\n")


def _which(options: argparse.Namespace) -> dict[str, Any]:
    return {"format": options.format, "weights": options.weights, "prefix": options.prefix}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m xq.models.checkpoints",
        description="Files of weights of other projects, read without executing what is in them.",
        epilog=f"formats: {', '.join(formats())}",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what a file holds")
    convert = commands.add_parser("convert", help="writes a folder that from_pretrained reads")
    for command in (inspect, convert):
        command.add_argument("file", help="safetensors, or what torch.save wrote")
        command.add_argument("--weights", help="model, ema or discriminator; by default ema")
        command.add_argument("--format", help="its kind, if it is not to be told from the file")
        command.add_argument("--prefix", default="", help="read only what is below it: quantizer.")
    convert.add_argument("out", help="the folder to write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

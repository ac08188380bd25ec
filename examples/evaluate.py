"""Measures a tokenizer, or compares two folders of pictures: numbers as JSON, a table, a picture.

python examples/evaluate.py                                           xq's own, a photograph
python examples/evaluate.py --tokenizer DIR --data DIR --partials     each scale or step
python examples/evaluate.py --checkpoint FILE --data DIR --timm NAME --timm-weights FILE
python examples/evaluate.py --data DIR --inception FILE               rFID, IS, KID and the like
python examples/evaluate.py --data SAMPLES --against DIR --inception FILE     gFID and the like
torchrun --nproc_per_node 4 examples/evaluate.py ...                  the same numbers, sooner
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import code_counts, probe
from common.code_counts import CodeCounts
from common.data import to_float
from common.extremes import Extremes
from common.parts import coloured
from common.perturb import PerturbedTokens, perturbation
from common.probe import FolderProbes
from common.results import save_json, table
from common.rows import CROP_NOTE, Batch, batches, find_rows
from common.samples import Samples
from common.scores import PAIRED_NOTES, Reference, Scores, load_networks
from common.tokenizers import PRESETS, image_channels, load_tokenizer, native_side
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from xq.distributed import rank, world_size
from xq.images import to_uint8
from xq.models import Tokenizer
from xq.quantizers import Quantizer, Wrapper

SIDE = 256  # of pictures, where the tokenizer takes any


def main(
    arguments: Sequence[str] | None = None, classes: Sequence[type | Callable[..., Any]] = ()
) -> dict[str, Any]:
    """Measures, writes and prints; returns what the JSON holds.

    Args:
        arguments: Of the command line.
        classes: Your own, of which the tokenizer in `--tokenizer` is made.
    """
    args = _parse(arguments)
    device = join_processes()
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.against:
                results, extremes = compare_folders(args, Path(folder), device), None
            else:
                results, extremes = measure_tokenizer(args, classes, Path(folder), device)
        results["seconds"] = round(time.perf_counter() - start, 1)
        if rank() == 0:
            report(results, extremes, Path(args.out))
        return results
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@torch.no_grad()
def measure_tokenizer(
    args: argparse.Namespace, classes: Sequence[Any], folder: Path, device: torch.device
) -> tuple[dict[str, Any], Extremes]:
    """One pass over the pictures, after one over those of `--probe`."""
    torch.manual_seed(0)
    tokenizer, name = load_tokenizer(args.tokenizer, args.checkpoint, args.preset, classes)
    tokenizer = tokenizer.to(device)
    side = args.size or native_side(tokenizer) or SIDE
    samples = found_rows(args.data, side)
    reading: Any = (side, args.batch, args.threads, image_channels(tokenizer))
    blank = first_tokens(tokenizer, side, device)
    parts = parts_of(tokenizer.quantizer, blank, args.partials)
    perturbed = [PerturbedTokens(tokenizer, alpha, delta) for alpha, delta in args.perturb]
    names = parts + [{"reconstruction": each.name, **_size(parts[-1])} for each in perturbed]
    reference = Reference(load_networks(args, device), len(samples), folder, "rfid", device)
    scores = [Scores(str(k), reference, len(samples)) for k in range(len(names))]
    probes = FolderProbes(tokenizer, args.probe, args.data, side, device) if args.probe else None
    if probes:
        for batch in shown(batches(probes.samples, *reading), probes.samples):
            if batch.rows:
                probes.fit(*encoded(tokenizer, batch.pixels.to(device)), batch.labels)
        probes.solve()
    counts, extremes = CodeCounts(tokenizer, device), Extremes()
    for batch in shown(batches(samples, *reading), samples):
        pixels = batch.pixels.to(device)
        z, indices = encoded(tokenizer, pixels) if batch.rows else (pixels, blank[:0])
        counts.update(indices, as_batch=batch.whole or len(samples) < args.batch)
        reference.update(pixels)
        if probes and batch.rows:
            probes.score(z, indices, batch.labels)
        made = reconstructions(tokenizer, z, indices, len(parts), perturbed, batch.rows)
        for k, score in enumerate(scores):
            # where it has no part of the batch, a process only meets the others
            bytes_made = to_uint8(coloured(next(made)).clamp(-1, 1)) if batch.rows else pixels
            values = score.compare(bytes_made, pixels)
            score.update(bytes_made, batch.rows)
            if k == len(parts) - 1:
                extremes.add(batch.rows, values["psnr"], pixels, bytes_made)
    extremes.gather()
    grey = "; grey" if image_channels(tokenizer) == 1 else ""
    notes = {"pictures": CROP_NOTE + grey, **PAIRED_NOTES, **reference.notes(len(samples))}
    notes["usage"] = f"{code_counts.NOTE}; batches of {args.batch}"
    results = {
        "tokenizer": name,
        **about(args, samples, side),
        "preprocessing": notes | ({"probe": probe.NOTE} if probes else {}),
        "scores": [name | score.compute() for name, score in zip(names, scores, strict=True)],
        "usage": counts.compute(),
    }
    return results | ({"probe": probes.accuracy()} if probes else {}), extremes


@torch.no_grad()
def compare_folders(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Pictures of one folder, such as samples of a generator, against those of another."""
    side = args.size or SIDE
    made, real = found_rows(args.data, side), found_rows(args.against, side)
    reference = Reference(load_networks(args, device), len(real), folder, "gfid", device)
    scores = Scores("made", reference, len(made))
    for batch in shown(batches(real, side, args.batch, args.threads), real):
        reference.update(batch.pixels.to(device))
    for batch in shown(batches(made, side, args.batch, args.threads), made):
        scores.update(batch.pixels.to(device), batch.rows)
    notes = {"pictures": f"of both folders: {CROP_NOTE}", **reference.notes(len(made))}
    against = {"against": args.against, "pictures_against": len(real)}
    results = {**about(args, made, side), **against, "preprocessing": notes}
    return {**results, "scores": [scores.compute()]}


def first_tokens(tokenizer: Tokenizer, side: int, device: torch.device) -> Int[Tensor, "1 ..."]:
    """Those of a plain picture, which shows whether it takes pictures of this size."""
    try:
        shape = 1, image_channels(tokenizer), side, side
        return tokenizer.encode(torch.zeros(shape, device=device))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the tokenizer takes no pictures of {side} x {side}: {error}; --size sets it"
        ) from error


def encoded(tokenizer: Tokenizer, pixels: UInt8[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor]:
    """What the encoder makes of pictures, and the tokens."""
    weight = next(tokenizer.encoder.parameters())
    # of grey pictures all channels are alike
    images = to_float(pixels)[:, : image_channels(tokenizer)]
    z = tokenizer.encoder(images.to(weight.dtype))
    return z, tokenizer.quantizer.encode(z)


def reconstructions(
    tokenizer: Tokenizer,
    z: Tensor,
    indices: Tensor,
    parts: int,
    perturbed: Sequence[PerturbedTokens],
    rows: range,
) -> Iterator[Float[Tensor, "b 3 h w"]]:
    """A batch after each part of its tokens, and from perturbed tokens; one at a time."""
    if parts > 1:
        yield from tokenizer.partials(indices)
    else:
        yield tokenizer.decode(indices)
    for each in perturbed:
        yield each.reconstruct(z, rows)


def parts_of(
    quantizer: Quantizer | Wrapper, indices: Int[Tensor, "1 ..."], partials: bool
) -> list[dict[str, Any]]:
    """The leading parts of the tokens that are decoded, and how large they are."""
    if not partials or quantizer.depth == 1:
        names, sizes = ["all tokens"], [1]
    elif quantizer.scales:
        sizes = [h * w for h, w in quantizer.grids]
        names = [f"scales to {h} x {w}" for h, w in quantizer.grids]
    else:
        sizes = [1] * quantizer.depth
        names = [f"steps to {k + 1}" for k in range(quantizer.depth)]
    total, width = indices.numel(), math.log2(quantizer.codebook_size)
    ends = [total * end // sum(sizes) for end in itertools.accumulate(sizes)]
    return [
        {"reconstruction": name, "indices": end, "bits": round(end * width, 1)}
        for name, end in zip(names, ends, strict=True)
    ]


def found_rows(source: str, side: int) -> Samples:
    """The pictures of a folder or of the demo, two at least."""
    samples = find_rows(source, side)
    if len(samples) < 2:
        raise ValueError(f"{source} holds a single picture; distances between sets need two")
    return samples


def join_processes() -> torch.device:
    """Joins those of torchrun, if it started this one; the device to work on."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def shown(found: Iterator[Batch], samples: Samples) -> Iterator[Batch]:
    """Batches with a bar, which the first process draws."""
    with tqdm(total=len(samples), disable=rank() > 0, unit="picture") as bar:
        for batch in found:
            yield batch
            bar.update(min(len(batch.rows) * world_size(), bar.total - bar.n))


def about(args: argparse.Namespace, samples: Samples, side: int) -> dict[str, Any]:
    """What was measured on."""
    return {"data": args.data, "pictures": len(samples), "size": side}


def report(results: dict[str, Any], extremes: Extremes | None, out: Path) -> None:
    """Writes the files and prints the tables."""
    name = results.get("tokenizer", f"{results['data']} against {results.get('against')}")
    side, count = results["size"], results["pictures"]
    title = f"{name}; {count} pictures of {results['data']} at {side} x {side}"
    save_json(out / "evaluation.json", results)
    print(f"{title}\n\n{table(results['scores'])}\n")
    if extremes:
        extremes.save(out / "best_and_worst.png", title)
        print(f"{table(results['usage'])}\n")
    if "probe" in results:
        print(f"{table([{'probe': k, 'accuracy': v} for k, v in results['probe'].items()])}\n")
    for metric, note in results["preprocessing"].items():
        print(textwrap.fill(f"{metric}: {note}", 100, subsequent_indent="  "))
    print(f"{results['seconds']} s; written to {out}")


def _size(part: dict[str, Any]) -> dict[str, Any]:
    return {name: part[name] for name in ("indices", "bits")}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", help="folder from save_pretrained")
    which.add_argument("--checkpoint", help="file of another project")
    which.add_argument("--preset", choices=PRESETS, help="an architecture, with random weights")
    which.add_argument("--against", help="compare the pictures of --data with this folder's")
    add("--data", default="demo", help='folder of pictures, or "demo"')
    add("--size", type=int, help="side of the crops; by default the tokenizer's, or 256")
    add("--partials", action="store_true", help="measure after each scale or step")
    add("--perturb", nargs="+", default=[], type=perturbation, help="ALPHA,DELTA: wrong tokens too")
    add("--probe", help="folder with a folder a class, to learn the classes of --data from")
    add("--lpips", choices=["alex", "vgg", "squeeze"], help="the network of LPIPS")
    add("--lpips-weights", help="its weights as torchvision has them; downloaded by default")
    add("--lpips-heads", help="its linear heads; by default those of the package lpips")
    add("--timm", help="a network of timm for a Frechet distance")
    add("--timm-weights", help="its weights; downloaded by default")
    add("--inception", metavar="FILE", help='weights of torch-fidelity, or "download"')
    add("--batch", type=int, default=32, help="pictures at a time, over all processes")
    add("--threads", type=int, default=4, help="that read pictures, in each process")
    add("--out", default="runs/evaluation", help="folder for the results")
    args = parser.parse_args(arguments)
    for name in ("size", "batch", "threads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    if args.against and not (args.timm or args.inception):
        parser.error("--against compares features: give --timm or --inception")
    if args.against and (args.partials or args.perturb or args.probe or args.lpips):
        parser.error("--against has no tokenizer: no --partials, --perturb, --probe, --lpips")
    return args


if __name__ == "__main__":
    main()

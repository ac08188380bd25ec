"""PNG files of what a tokenizer does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.data import to_bytes, to_image

matplotlib.use("Agg")

GAP = 6
INK, QUIET = (32, 33, 36), (112, 117, 122)


def save_grid(
    path: Path, images: Float[Tensor, "n 3 h w"], made: Float[Tensor, "n 3 h w"], zoom: int = 2
) -> None:
    """Images in a row, their reconstructions below."""
    n, _, h, w = images.shape
    w, h = w * zoom, h * zoom
    sheet = Image.new("RGB", (n * (w + GAP) + GAP, 2 * (h + GAP) + GAP), "white")
    for row, batch in enumerate((images, made)):
        for i, image in enumerate(batch):
            panel = to_image(to_bytes(image)).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(panel, (GAP + i * (w + GAP), GAP + row * (h + GAP)))
    sheet.save(path)


def save_rows(
    path: Path,
    rows: Float[Tensor, "rows columns 3 h w"],
    labels: Sequence[str],
    zoom: int = 2,
) -> None:
    """Images in rows, each with its label before it.

    Args:
        path: The PNG file; its folder is made.
        rows: The images.
        labels: One a row.
        zoom: Times that a pixel is repeated.
    """
    height, width = (side * zoom for side in rows.shape[3:])
    font = ImageFont.load_default(15)
    left = GAP + max(round(font.getlength(label)) for label in labels) + GAP
    size = (left + rows.shape[1] * (width + GAP), GAP + rows.shape[0] * (height + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (images, label) in enumerate(zip(rows, labels, strict=True)):
        y = GAP + i * (height + GAP)
        draw.text((left - GAP, y + height / 2), label, QUIET, font, anchor="rm")
        for j, image in enumerate(images):
            panel = to_image(to_bytes(image)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(panel, (left + j * (width + GAP), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def save_stack(path: Path, *images: Float[Tensor, "3 h w"]) -> None:
    """Pictures below each other, pixel by pixel."""
    panels = [to_image(to_bytes(image)) for image in images]
    w, h = panels[0].size
    sheet = Image.new("RGB", (w, len(panels) * (h + GAP) - GAP), "white")
    for row, panel in enumerate(panels):
        sheet.paste(panel, (0, row * (h + GAP)))
    sheet.save(path)


def save_strip(
    path: Path,
    original: Float[Tensor, "3 h w"],
    partials: Sequence[Float[Tensor, "3 h w"]],
    labels: Sequence[tuple[str, str]],
    note: str,
    side: int = 116,
) -> None:
    """Reconstructions coarse to fine in two rows, then the original, and a line of text.

    Args:
        path: The PNG file.
        original: The picture, square.
        partials: Reconstructions of it.
        labels: Two lines for each of them, and for the original at the end.
        note: What the labels say.
        side: Of a panel, in pixels.
    """
    columns = -(-len(partials) // 2)
    text = 44
    cell = (side + GAP, side + text)
    big = side * 2 + text
    sheet = Image.new("RGB", (columns * cell[0] + 2 * GAP + big + GAP, big + 2 * text), "white")
    for i, (image, label) in enumerate(zip(partials, labels, strict=False)):
        x, y = GAP + i % columns * cell[0], GAP + i // columns * cell[1]
        _panel(sheet, image, label, (x, y), side)
    _panel(sheet, original, labels[-1], (2 * GAP + columns * cell[0], GAP), big)
    write = ImageDraw.Draw(sheet).text
    write((GAP, big + 2 * text - 24), note, QUIET, ImageFont.load_default(13))
    sheet.save(path, optimize=True)


def save_progress(
    path: Path, image: Float[Tensor, "1 3 h w"], made: Sequence[Float[Tensor, "1 3 h w"]]
) -> None:
    """A picture beside its reconstruction, and below what there was after each scale or step.

    Args:
        path: The PNG file; its folder is made.
        image: The picture.
        made: Reconstructions of it, the best at the end; of a single one there is no row below.
    """
    first, *parts = [to_image(to_bytes(part[0].clamp(-1, 1))) for part in (image, *made)]
    (w, h), steps = first.size, parts if len(parts) > 1 else []
    width = 2 * w + 3 * GAP
    small_w = (width - GAP) // max(len(steps), 1) - GAP
    small_h = max(h * small_w // w, 1)
    below = small_h + GAP if steps else 0
    sheet = Image.new("RGB", (width, h + 2 * GAP + below), "white")
    for i, picture in enumerate((first, parts[-1])):
        sheet.paste(picture, (GAP + i * (w + GAP), GAP))
    for i, picture in enumerate(steps):
        resized = picture.resize((small_w, small_h), Image.Resampling.LANCZOS)
        sheet.paste(resized, (GAP + i * (small_w + GAP), h + 2 * GAP))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_curves(path: Path, records: Sequence[dict[str, Any]], baselines: dict[str, float]) -> None:
    """Loss, PSNR and the usage of codes over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    loss, quality, usage = figure.subplots(1, 3)
    train = [r for r in records if "loss" in r]
    loss.plot([r["step"] for r in train], [r["loss"] for r in train], lw=1)
    loss.set(title="loss", yscale="log", xlabel="step")

    held_out = [r for r in records if "held_out_psnr" in r]
    quality.plot([r["step"] for r in train], [r["psnr"] for r in train], lw=1, label="training")
    quality.plot(
        [r["step"] for r in held_out], [r["held_out_psnr"] for r in held_out], label="held out"
    )
    for (name, value), style in zip(baselines.items(), (":", "-.", "--"), strict=False):
        quality.axhline(value, color="0.6", ls=style, lw=1, label=name)
    quality.set(title="PSNR (dB)", xlabel="step")
    quality.legend(fontsize=7, loc="lower right")

    used = [r for r in held_out if r["used"]]
    colors = matplotlib.colormaps["viridis"]
    for i, name in enumerate(used[-1]["used"] if used else ()):
        color = colors(i / max(len(used[-1]["used"]) - 1, 1))
        steps, shares = [r["step"] for r in used], [r["used"][name] for r in used]
        usage.plot(steps, shares, label=name, color=color)
    usage.set(title="share of the codes used since the last point", xlabel="step", ylim=(0, 1.02))
    if used:
        usage.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def _panel(
    sheet: Image.Image,
    image: Float[Tensor, "3 h w"],
    label: tuple[str, str],
    place: tuple[int, int],
    side: int,
) -> None:
    panel = to_image(to_bytes(image)).resize((side, side), Image.Resampling.LANCZOS)
    sheet.paste(panel, place)
    draw = ImageDraw.Draw(sheet)
    middle, below = place[0] + side / 2, place[1] + side
    for text, y, size, ink in ((label[0], 4, 15, INK), (label[1], 22, 12, QUIET)):
        draw.text((middle, below + y), text, ink, ImageFont.load_default(size), anchor="ma")

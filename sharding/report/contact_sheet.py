"""Contact sheets: pictures in a grid with texts below, and frames of a clip side by side."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from sharding.media.frames import MediaError
from sharding.media.picture import decode_picture

GAP, FRAME_GAP, LINE, TITLE = 8, 2, 15, 34  # pixels
INK, MUTED, PAPER, MISSING = "#1c1d21", "#6c6f78", "#ffffff", "#e1e1e4"
QUALITY = 80  # of JPEG


@dataclass(frozen=True)
class Cell:
    """Pictures side by side (None: not readable); below them a grey label, and a text or the name of a file.

    A text is cut at its end, a name where the names of the sheet are alike.
    """

    pictures: Sequence[Image.Image | None]
    label: str = ""
    text: str = ""
    name: str = ""


def contact_sheet(
    cells: Sequence[Cell], columns: int, side: int, lines: int = 2, title: str = "", note: str = ""
) -> Image.Image:
    """The cells in rows of `columns`, each picture in a square of `side` pixels, with `lines` of text.

    title: a heading; note: at its right.
    """
    frames = max((len(cell.pictures) for cell in cells), default=1)
    columns = max(1, min(columns, len(cells)))
    with_label = any(cell.label for cell in cells)
    width, height = frames * (side + FRAME_GAP) - FRAME_GAP + GAP, side + (lines + with_label) * LINE + 2 * GAP
    head = TITLE if title else 0
    size = (columns * width + GAP, max(1, -(-len(cells) // columns)) * height + GAP + head)
    sheet = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    if title:
        pen.text((GAP, GAP), title, INK, ImageFont.load_default(20))
        pen.text((size[0] - GAP, GAP + 6), note, MUTED, font, anchor="ra")
    names = short_names([cell.name for cell in cells], lambda name: font.getlength(name) <= width - GAP)
    for number, cell in enumerate(cells):
        left, top = GAP + number % columns * width, GAP + head + number // columns * height
        for column, picture in enumerate(cell.pictures):
            sheet.paste(square(picture, side), (left + column * (side + FRAME_GAP), top))
        below = [names[number], *_fit_text(cell.text, font, width - GAP, lines)]
        texts = [(cell.label, MUTED), *((line, INK) for line in below)]
        for line, (text, color) in enumerate((text, color) for text, color in texts if text):
            pen.text((left, top + side + 2 + LINE * line), text, color, font)
    return sheet


def read_picture(data: bytes | None) -> Image.Image | None:
    """A decoded frame; None where there is none or it cannot be decoded."""
    try:
        return None if data is None else Image.fromarray(decode_picture(data).pixels)
    except MediaError:
        return None


def square(picture: Image.Image | None, side: int) -> Image.Image:
    """A picture fitted into a square, the rest filled with its own colours, blurred and dark."""
    if picture is None:
        tile = Image.new("RGB", (side, side), MISSING)
        ImageDraw.Draw(tile).text((side // 2, side // 2), "not readable", INK, ImageFont.load_default(12), "mm")
        return tile
    fitted = ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
    if fitted.size == (side, side):
        return fitted
    blurred = picture.resize((6, 6), Image.Resampling.BOX).resize((side, side), Image.Resampling.BICUBIC)
    tile = ImageEnhance.Brightness(blurred).enhance(0.6)
    tile.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return tile


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for column, picture in enumerate(pictures):
        row.paste(picture, (column * width, 0))
    return row


def jpeg(picture: Image.Image) -> bytes:
    """JPEG bytes of a picture."""
    output = io.BytesIO()
    picture.save(output, "JPEG", quality=QUALITY)
    return output.getvalue()


def _fit_text(text: str, font: Any, width: int, lines: int) -> list[str]:
    """A text in up to `lines` lines of `width` pixels, cut where it is longer."""
    found: list[str] = []
    for letters in range(max(8, int(1.2 * width * len(text) / max(1, font.getlength(text)))), 7, -1):
        found = textwrap.wrap(text, letters, max_lines=lines, placeholder=" …")
        if all(font.getlength(line) <= width for line in found):
            break
    return found


def short_names(names: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Names cut until they fit, in the first way that keeps different ones different."""
    differ = next((i for i, letters in enumerate(zip(*names)) if len(set(letters)) > 1), 0)
    cuts: list[Callable[[str, int], str]] = [
        lambda name, kept: f"…{name[-kept:]}",
        lambda name, kept: f"{'…' if differ else ''}{name[differ : differ + kept]}…",
        lambda name, kept: f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}",
    ]
    shortened = list(names)
    for cut in cuts:
        shortened = [name if fits(name) else _longest(name, cut, fits) for name in names]
        if len(set(shortened)) == len(set(names)):
            break
    return shortened


def _longest(name: str, cut: Callable[[str, int], str], fits: Callable[[str], bool]) -> str:
    return next((text for kept in range(len(name) - 1, 0, -1) if fits(text := cut(name, kept))), "…")

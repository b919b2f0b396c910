"""Contact sheets: pictures in rows and columns, with labels that can be read."""

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

LABEL_PX = 16
TITLE_PX = 22
LABEL_LINES = 6
MIN_CELL_PX = 176
MAX_ROW_LABEL_PX = 230
MAX_SHEET_PX = 64_000_000
"""Width × height; larger sheets are drawn with smaller pictures."""
GAP_PX = 6
MARGIN_PX = 18
PAPER, INK = "white", "#1c1c1e"
_GLYPHS = frozenset("«°±·»‘’“”‹›")
"""What Pillow's font draws beyond ASCII; anything else would be a box."""
_SPELLINGS = str.maketrans("−–—×", "---x")

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _Block(NamedTuple):
    """A wrapped label and how much room it takes, px."""

    lines: tuple[str, ...]
    width: int
    height: int


def draw_contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str | None = None,
) -> Image.Image:
    """Draw pictures as a labelled grid, RGB. Small pictures are enlarged by whole numbers, pixel by pixel.

    Labels are wrapped, and cut with an ellipsis where there is no room; characters beyond ASCII lose their
    accents or become question marks. Pictures may differ in size: each is fitted into a cell.

    Raises:
        ValueError: no pictures, or not a label for each row and each column.
    """
    _check(rows, row_labels, column_labels)
    label_font, title_font = _font(LABEL_PX), _font(TITLE_PX)
    cell_width, cell_height = _cell([picture for row in rows for picture in row], len(rows), len(rows[0]))
    beside = [_wrap(label, label_font, MAX_ROW_LABEL_PX, _lines_within(cell_height)) for label in row_labels]
    above = [_wrap(label, label_font, cell_width, LABEL_LINES) for label in column_labels]
    left = MARGIN_PX + _room([block.width for block in beside], 2 * GAP_PX)
    width = left + len(column_labels) * (cell_width + GAP_PX) - GAP_PX + MARGIN_PX
    heading = _wrap(title or "", title_font, width - 2 * MARGIN_PX, LABEL_LINES)
    top = MARGIN_PX + _room([heading.height], 2 * GAP_PX) + _room([block.height for block in above], GAP_PX)
    height = top + len(rows) * (cell_height + GAP_PX) - GAP_PX + MARGIN_PX

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, title_font, MARGIN_PX, MARGIN_PX)
    for column, block in enumerate(above):
        centre = left + column * (cell_width + GAP_PX) + (cell_width - block.width) // 2
        _write(draw, block, label_font, centre, top - GAP_PX - block.height, centred=True)
    for index, (row, block) in enumerate(zip(rows, beside, strict=True)):
        y = top + index * (cell_height + GAP_PX)
        _write(draw, block, label_font, MARGIN_PX, y + (cell_height - block.height) // 2)
        for column, picture in enumerate(row):
            _place(sheet, picture, left + column * (cell_width + GAP_PX), y, cell_width, cell_height)
    return sheet


def _check(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> None:
    if not rows or not column_labels:
        raise ValueError("a contact sheet needs a picture; found none")
    if len(rows) != len(row_labels):
        raise ValueError(f"found {len(row_labels)} labels for {len(rows)} rows; give each row one")
    for index, row in enumerate(rows):
        if len(row) != len(column_labels):
            raise ValueError(
                f"row {index} has {len(row)} pictures and there are {len(column_labels)} column labels; "
                "give each row as many pictures as there are columns"
            )


def _cell(pictures: list[Image.Image], num_rows: int, num_columns: int) -> tuple[int, int]:
    """Return the width and height of a picture's place, px."""
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    zoom = math.ceil(MIN_CELL_PX / max(width, height))
    width, height = width * zoom, height * zoom
    shrink = min(1.0, math.sqrt(MAX_SHEET_PX / (width * height * num_rows * num_columns)))
    return max(1, int(width * shrink)), max(1, int(height * shrink))


def _place(sheet: Image.Image, picture: Image.Image, x: int, y: int, width: int, height: int) -> None:
    scale = min(width / picture.width, height / picture.height)
    if scale >= 1:
        size = picture.width * int(scale), picture.height * int(scale)
        fitted = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    else:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sheet.paste(fitted, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))


def _wrap(text: str, font: _Font, max_width: int, max_lines: int) -> _Block:
    lines: list[str] = []
    for word in _drawable(text).split():
        for piece in _pieces(word, font, max_width):
            if lines and font.getlength(f"{lines[-1]} {piece}") <= max_width:
                lines[-1] = f"{lines[-1]} {piece}"
            else:
                lines.append(piece)
        if len(lines) > max_lines:
            break
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], _cut(lines[max_lines - 1], font, max_width)]
    width = math.ceil(max((font.getlength(line) for line in lines), default=0))
    return _Block(tuple(lines), width, len(lines) * _line_px(font))


def _drawable(text: str) -> str:
    """Return text in characters that the font has: accents are dropped, other scripts marked."""
    plain = unicodedata.normalize("NFKD", text.translate(_SPELLINGS))
    spelled = (c for c in plain if not unicodedata.combining(c))
    return "".join(" " if not c.isprintable() else c if c.isascii() or c in _GLYPHS else "?" for c in spelled)


def _pieces(word: str, font: _Font, max_width: int) -> list[str]:
    """Return a word in as many pieces as it takes to fit."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > max_width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _cut(line: str, font: _Font, max_width: int) -> str:
    while line and font.getlength(f"{line}…") > max_width:
        line = line[:-1]
    return f"{line.rstrip()}…"


def _write(
    draw: ImageDraw.ImageDraw, block: _Block, font: _Font, x: int, y: int, *, centred: bool = False
) -> None:
    for index, line in enumerate(block.lines):
        indent = (block.width - math.ceil(font.getlength(line))) // 2 if centred else 0
        draw.text((x + indent, y + index * _line_px(font)), line, fill=INK, font=font)


def _font(size: int) -> _Font:
    return ImageFont.load_default(size=size)


def _line_px(font: _Font) -> int:
    size = font.size if isinstance(font, ImageFont.FreeTypeFont) else LABEL_PX
    return math.ceil(size * 1.3)


def _lines_within(height: int) -> int:
    return max(1, min(LABEL_LINES, height // math.ceil(LABEL_PX * 1.3)))


def _room(sizes: list[int], gap: int) -> int:
    return max(sizes) + gap if any(sizes) else 0

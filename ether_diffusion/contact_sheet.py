"""Contact sheets: pictures in rows and columns, with labels that can be read."""

import math
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LABEL_PX, TITLE_PX = 16, 22
LABEL_LINES = 6
MIN_CELL_PX = 176
MAX_ROW_LABEL_PX = 230
MAX_SHEET_PX = 64_000_000
"""Width × height; larger sheets are drawn with smaller pictures."""
GAP_PX, MARGIN_PX = 6, 18
PAPER, INK = "white", "#1c1c1e"
_GLYPHS = frozenset("«°±·»‘’“”‹›")
"""What Pillow's font draws beyond ASCII; anything else would be a box."""
_SPELLINGS = str.maketrans("−–—×", "---x")


def draw_contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str | None = None,
) -> Image.Image:
    """Draw pictures as a labelled grid, RGB. Small pictures are enlarged by whole numbers, pixel by pixel.

    Labels are wrapped, and cut with an ellipsis where there is no room; characters beyond ASCII lose their
    accents or become question marks. Pictures may differ in size: each is fitted into a cell. There is a
    label for each row, and one for each of its pictures.
    """
    cell_width, cell_height = _cell([picture for row in rows for picture in row], len(rows) * len(rows[0]))
    lines_beside = max(1, min(LABEL_LINES, cell_height // math.ceil(LABEL_PX * 1.3)))
    beside = [_Label(label, LABEL_PX, MAX_ROW_LABEL_PX, lines_beside) for label in row_labels]
    above = [_Label(label, LABEL_PX, cell_width) for label in column_labels]
    left = MARGIN_PX + _room([label.width for label in beside], 2 * GAP_PX)
    width = left + len(column_labels) * (cell_width + GAP_PX) - GAP_PX + MARGIN_PX
    heading = _Label(title or "", TITLE_PX, width - 2 * MARGIN_PX)
    top = MARGIN_PX + _room([heading.height], 2 * GAP_PX) + _room([label.height for label in above], GAP_PX)

    sheet = Image.new("RGB", (width, top + len(rows) * (cell_height + GAP_PX) - GAP_PX + MARGIN_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    heading.write(draw, MARGIN_PX, MARGIN_PX)
    for column, label in enumerate(above):
        centre = left + column * (cell_width + GAP_PX) + (cell_width - label.width) // 2
        label.write(draw, centre, top - GAP_PX - label.height, centred=True)
    for index, (row, label) in enumerate(zip(rows, beside, strict=True)):
        y = top + index * (cell_height + GAP_PX)
        label.write(draw, MARGIN_PX, y + (cell_height - label.height) // 2)
        for column, picture in enumerate(row):
            fitted = _fitted(picture.convert("RGB"), cell_width, cell_height)
            x = left + column * (cell_width + GAP_PX) + (cell_width - fitted.width) // 2
            sheet.paste(fitted, (x, y + (cell_height - fitted.height) // 2))
    return sheet


def _cell(pictures: list[Image.Image], number: int) -> tuple[int, int]:
    """Return the width and height of a picture's place, px."""
    sides = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    zoom = math.ceil(MIN_CELL_PX / max(sides))
    shrink = min(1.0, math.sqrt(MAX_SHEET_PX / (sides[0] * sides[1] * zoom * zoom * number)))
    return max(1, int(sides[0] * zoom * shrink)), max(1, int(sides[1] * zoom * shrink))


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / picture.width, height / picture.height)
    zoom, resampling = (
        int(scale) or scale,
        Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS,
    )
    return picture.resize([max(1, round(zoom * side)) for side in picture.size], resampling)


class _Label:
    """A wrapped label and how much room it takes, px."""

    def __init__(self, text: str, size: int, max_width: int, max_lines: int = LABEL_LINES) -> None:
        self.font, self.line_px = ImageFont.load_default(size=size), math.ceil(size * 1.3)
        self.lines: list[str] = []
        for word in _drawable(text).split():
            for piece in self._pieces(word, max_width):
                if self.lines and self.font.getlength(f"{self.lines[-1]} {piece}") <= max_width:
                    self.lines[-1] += f" {piece}"
                else:
                    self.lines.append(piece)
            if len(self.lines) > max_lines:
                last = self.lines[max_lines - 1]
                while last and self.font.getlength(f"{last}…") > max_width:
                    last = last[:-1]
                self.lines[max_lines - 1 :] = [f"{last.rstrip()}…"]
                break
        self.width = math.ceil(max((self.font.getlength(line) for line in self.lines), default=0))
        self.height = len(self.lines) * self.line_px

    def _pieces(self, word: str, max_width: int) -> list[str]:
        """Return a word in as many pieces as it takes to fit."""
        pieces = [""]
        for character in word:
            if pieces[-1] and self.font.getlength(pieces[-1] + character) > max_width:
                pieces.append("")
            pieces[-1] += character
        return pieces

    def write(self, draw: ImageDraw.ImageDraw, x: int, y: int, *, centred: bool = False) -> None:
        """Draw it with its upper left corner at a place."""
        for index, line in enumerate(self.lines):
            indent = (self.width - math.ceil(self.font.getlength(line))) // 2 if centred else 0
            draw.text((x + indent, y + index * self.line_px), line, fill=INK, font=self.font)


def _drawable(text: str) -> str:
    """Return text in characters that the font has: accents are dropped, other scripts marked."""
    plain = unicodedata.normalize("NFKD", text.translate(_SPELLINGS))
    spelled = (c for c in plain if not unicodedata.combining(c))
    return "".join(" " if not c.isprintable() else c if c.isascii() or c in _GLYPHS else "?" for c in spelled)


def _room(sizes: list[int], gap: int) -> int:
    return max(sizes) + gap if any(sizes) else 0

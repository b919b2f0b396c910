"""The evaluation of an adapter that follows control images: pairs read, pictures drawn and reported."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ether_diffusion.metrics.control_scores import (
    PALETTE,
    ControlPair,
    ControlYardsticks,
    expected_classes,
    score_control,
)
from ether_diffusion.metrics.report import Report
from ether_diffusion.metrics.samples import MIN_SIDE_PX, Sample, SetAside, sort_samples
from ether_diffusion.metrics.scoring import Scores
from ether_diffusion.strict_json import Json, parse_json
from ether_diffusion.tiny_world.control import CONTROL_COLUMN, PICTURE_COLUMN, TEXT_COLUMN
from ether_diffusion.training.caption_files import decode_text
from ether_diffusion.training.decoding import decode_photo
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.wording import printable

METADATA_NAME = "metadata.jsonl"
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
"""What lies under the transparent parts of photos and of control images, as in training."""
ROWS = ("base", "adapter")
SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class ControlDrawing:
    """How pictures are drawn: one for each pair and seed; a side (px) of None is the photo's."""

    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    batch_size: int = 1
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError("seeds are whole numbers from 0, and there must be one")
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps are from 1 to 1000; found {self.steps}")
        if not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale is from 0 to 100; found {self.guidance_scale}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is from 1; found {self.batch_size}")


def read_control_pairs(folder: Path) -> list[ControlPair]:
    """Read photos, control images and captions that a folder's metadata.jsonl names, as training reads them.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: pairs cannot be used, all of them said, or there are fewer than two.
    """
    file = folder / METADATA_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {printable(file)}; write a line for each pair: "
            f'{{"{PICTURE_COLUMN}": …, "{CONTROL_COLUMN}": …, "{TEXT_COLUMN}": …}}'
        )
    try:
        lines = decode_text(file.read_bytes()).split("\n")
    except UnusableFileError as reason:
        raise ValueError(f"{printable(file)} {reason}") from None
    pairs: list[ControlPair] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                pairs.append(_read_pair(folder, line))
            except (OSError, ValueError) as problem:
                problems.append(f"line {number} {printable(problem, 300)}")
    names = [pair.name for pair in pairs]
    problems += [f"{name} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        shown = "; ".join(problems[:SHOWN_PROBLEMS])
        raise ValueError(f"{printable(file)} has pairs that cannot be used: {shown}{_more(problems)}")
    if len(pairs) < 2:
        raise ValueError(f"found {len(pairs) or 'no'} pair in {printable(file)}; give at least two")
    return pairs


def check_maps(pairs: Sequence[ControlPair], yardsticks: ControlYardsticks) -> None:
    """Refuse control images of a palette with other colours, before anything is drawn.

    Raises:
        ValueError: some have; all are named.
    """
    if yardsticks.finder is None or yardsticks.control_type != PALETTE:
        return
    problems = []
    for pair in pairs:
        try:
            expected_classes(pair, yardsticks)
        except ValueError as problem:
            problems.append(str(problem))
    if problems:
        raise ValueError("; ".join(problems[:SHOWN_PROBLEMS]) + _more(problems))


def draw_pairs(
    pipeline: Any,
    pairs: Sequence[ControlPair],
    drawing: ControlDrawing,
    *,
    adapter: Mapping[str, float],
    control: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Sample]]:
    """Draw every pair on every seed, by the base from the caption alone and by the adapter with the control.

    `adapter` is {} for an encoder by itself. Names say pair and seed.
    """
    places = [(pair, seed) for pair in pairs for seed in drawing.seeds]
    samples: dict[str, list[Sample]] = {row: [] for row in ROWS}
    for row in ROWS:
        for part in _batches(places, drawing.batch_size):
            width, height = part[0][0].photo.size
            further: dict[str, Any] = {}
            if row == "adapter":
                further = {"control_image": [pair.control for pair, _ in part], "control": control}
            images = pipeline(
                [pair.prompt for pair, _ in part],
                seed=[seed for _, seed in part],
                adapters=adapter if row == "adapter" else {},
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance_scale,
                width=drawing.width or width,
                height=drawing.height or height,
                **further,
            ).images
            for (pair, seed), image in zip(part, images, strict=True):
                samples[row].append(Sample(f"{pair.name}_seed{seed}", image, pair.prompt, seed))
            if on_progress is not None:
                on_progress(sum(map(len, samples.values())), len(ROWS) * len(places))
    return samples


def report_control(
    rows: Mapping[str, Sequence[Sample]],
    pairs: Sequence[ControlPair],
    yardsticks: ControlYardsticks,
    settings: Mapping[str, Json],
) -> Report:
    """Score rows of pictures beside the photos themselves, which say what the yardsticks make of the truth.

    Pictures go by their names: that of their pair, and what follows it after "_seed".

    Raises:
        ValueError: none of a row's pictures can be scored.
    """
    by_name = {pair.name: pair for pair in pairs}
    photos = [Sample(pair.name, pair.photo) for pair in pairs]
    scores: dict[str, Scores] = {}
    aside: dict[str, Sequence[SetAside]] = {}
    for row, samples in {"photos": photos, **rows}.items():
        found = sort_samples(samples)
        chosen = [by_name[sample.name.rpartition("_seed")[0] or sample.name] for sample in found.usable]
        scores[row] = score_control([sample.image for sample in found.usable], chosen, yardsticks)
        aside[row] = found.set_aside
    sources: dict[str, str] = {}
    if yardsticks.finder is not None:
        sources["segmenter"] = yardsticks.finder.source
    sources |= {encoder.kind: encoder.source for encoder in yardsticks.encoders}
    return Report(settings, sources, scores, {}, aside, yardsticks.left_out)


def _more(problems: Sequence[str]) -> str:
    rest = len(problems) - SHOWN_PROBLEMS
    return f"; and {rest} more" if rest > 0 else ""


def _read_pair(folder: Path, line: str) -> ControlPair:
    row = parse_json(line.encode(), "it")
    columns = (PICTURE_COLUMN, CONTROL_COLUMN, TEXT_COLUMN)
    values = [row.get(column) for column in columns] if isinstance(row, dict) else []
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    if len(texts) != len(columns):
        raise ValueError(f"lacks one of {', '.join(columns)}")
    photo, control = (
        _read_image(folder, name, colour) for name, colour in zip(texts, (WHITE, BLACK), strict=False)
    )
    if abs(control.width * photo.height - control.height * photo.width) > max(*photo.size, *control.size):
        raise ValueError(
            f"has a control image of {control.width} × {control.height} px for a photo of {photo.width} × "
            f"{photo.height} px; crop one to the other's proportions"
        )
    return ControlPair(Path(texts[0]).stem, photo, control, texts[2], Path(texts[0]).stem)


def _read_image(folder: Path, name: str, background: tuple[int, int, int]) -> Image.Image:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"names {printable(name)}, which is not inside the folder")
    if not (folder / path).is_file():
        raise ValueError(f"names {printable(name)}, which is not there")
    return decode_photo(folder / path, background=background, min_side=MIN_SIDE_PX)[0]


def _batches(
    places: Sequence[tuple[ControlPair, int]], batch_size: int
) -> Iterator[list[tuple[ControlPair, int]]]:
    """Cut into batches of pictures of one size."""
    batch: list[tuple[ControlPair, int]] = []
    for place in places:
        if batch and (len(batch) == batch_size or batch[0][0].photo.size != place[0].photo.size):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch

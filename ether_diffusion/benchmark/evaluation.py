"""What an evaluation is of: photos, pictures and pairs that are read, and pictures that are drawn."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from PIL import Image
from pydantic import ConfigDict, Field

from ether_diffusion.metrics.control_scores import ControlPair
from ether_diffusion.metrics.report import ROWS, DrawnSamples, together
from ether_diffusion.metrics.scores import MIN_SIDE_PX, Sample, SortedSamples, sort_samples, without_faults
from ether_diffusion.pipelines.metadata import MAX_SEED, png_bytes, read_image_metadata
from ether_diffusion.pipelines.opening import EtherPipeline
from ether_diffusion.pipelines.sampling import MAX_PICTURES, Sampling, Settings, draw_pictures
from ether_diffusion.strict_json import StrictModel, Within, checked, read_json
from ether_diffusion.training import decode_photo, find_photos
from ether_diffusion.training.captions import decode_text, json_rows
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.wording import listed, printable

METADATA_NAME = "metadata.jsonl"
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
"""What lies under the transparent parts of photos and of control images, as in training."""


def read_lines(file: Path) -> list[str]:
    """Return the lines of a file of text.

    Raises:
        ValueError: it is no text.
    """
    try:
        return decode_text(file.read_bytes()).split("\n")
    except UnusableFileError as reason:
        raise ValueError(f"{printable(file)} {reason}") from None


def read_photos(folder: Path) -> SortedSamples:
    """Read the real photos of a subject, of any sizes: encoders scale each by itself.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are fewer than two that show something.
    """
    found = find_photos(folder, min_side=MIN_SIDE_PX, without=())
    photos = [Sample(each.name, decode_photo(each.path, min_side=MIN_SIDE_PX)[0]) for each in found.photos]
    result = without_faults(photos, {each.name: each.reason for each in found.refused})
    if len(result.usable) < 2:
        reasons = "".join(
            f"; {printable(name)} {reason}" for name, reason in list(result.set_aside.items())[:5]
        )
        number = f"{len(result.usable)} photo" if result.usable else "no photos"
        raise ValueError(f"found {number} to compare with in {printable(folder)}; give at least two{reasons}")
    return result


def read_generated(folder: Path, captions: Mapping[str, str] | None = None) -> SortedSamples:
    """Read pictures that were generated before.

    Their prompts are `captions` by file name, or else what each PNG of ours says of itself; seeds are always
    from there.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: fewer than two pictures can be scored, or captions and pictures do not fit.
    """
    found = find_photos(folder, min_side=MIN_SIDE_PX)
    names, refused = (
        [each.path.name for each in found.photos],
        {each.name: each.reason for each in found.refused},
    )
    if captions is not None:
        without = [name for name in names if name not in captions]
        if without:
            raise ValueError(f"there is no caption for {listed(without)}; give every picture one")
        unknown = sorted(captions.keys() - {*names, *refused})
        if unknown:
            raise ValueError(
                f"there are captions for {listed(unknown)}, and no such pictures; delete those lines"
            )
    samples = []
    for name, photo in zip(names, found.photos, strict=True):
        image, _ = decode_photo(photo.path, min_side=MIN_SIDE_PX)
        said = read_image_metadata(photo.path) if photo.path.suffix.lower() == ".png" else None
        prompt = captions[name] if captions is not None else said.prompt if said else None
        samples.append(Sample(name, image, prompt, said.seed if said else None))
    result = sort_samples(samples, refused)
    if len(result.usable) < 2:
        raise ValueError(f"found one picture to score in {printable(folder)}; give at least two")
    return result


def read_caption_file(path: Path) -> dict[str, str]:
    """Read prompts by file name from JSON Lines: {"file_name": "0.png", "text": "a photo of a dog"}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else, or two name one file.
    """
    shown = printable(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of captions {shown}")
    captions: dict[str, str] = {}
    for where, name, words in json_rows("\n".join(read_lines(path)), shown):
        if name in captions:
            raise ValueError(f"{where} names {printable(name)} a second time; leave one line")
        captions[name] = words
    return captions


def draw_samples(
    pipeline: EtherPipeline,
    sampling: Sampling,
    num_prompts: int,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> DrawnSamples:
    """Draw what was planned; the first `num_prompts` prompts are the subject's."""
    subject: dict[str, list[Sample]] = {row: [] for row in ROWS}
    other: dict[str, list[Sample]] = {row: [] for row in ROWS}
    for picture in draw_pictures(pipeline, sampling, on_progress=on_progress):
        seed = sampling.seeds[picture.seed]
        sample = Sample(
            f"prompt{picture.prompt + 1}_seed{seed}", picture.image, sampling.prompts[picture.prompt], seed
        )
        (subject if picture.prompt < num_prompts else other)[ROWS[picture.choice]].append(sample)
    return DrawnSamples(subject, other)


def picture_files(rows: Mapping[str, Sequence[Sample]]) -> dict[str, bytes]:
    """Return PNGs with their metadata by row and name: base/prompt1_seed0.png."""
    return {
        f"{row}/{sample.name}.png": png_bytes(sample.image)
        for row, samples in rows.items()
        for sample in samples
    }


@checked(kw_only=True)
class ControlDrawing(Settings):
    """How pictures are drawn: one for each pair and seed; a side (px) of None is the photo's."""

    seeds: tuple[Annotated[int, Within(0, MAX_SEED)], ...]
    batch_size: Annotated[int, Within(1, MAX_PICTURES)] = 1


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
            '{"file_name": …, "conditioning_image_file_name": …, "text": …}'
        )
    pairs: list[ControlPair] = []
    problems: list[str] = []
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            try:
                pairs.append(_read_pair(folder, line))
            except (OSError, ValueError) as problem:
                problems.append(f"line {number} {printable(problem, 300)}")
    names = [pair.name for pair in pairs]
    problems += [f"{name} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise ValueError(f"{printable(file)} has pairs that cannot be used: {together(problems)}")
    if len(pairs) < 2:
        raise ValueError(f"found {len(pairs) or 'no'} pair in {printable(file)}; give at least two")
    return pairs


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
    of_one_size = (list(part) for _, part in itertools.groupby(places, key=lambda place: place[0].photo.size))
    batches = [
        part[start : start + drawing.batch_size]
        for part in of_one_size
        for start in range(0, len(part), drawing.batch_size)
    ]
    for row, batch in itertools.product(ROWS, batches):
        width, height = batch[0][0].photo.size
        further: dict[str, Any] = {"adapters": {}}
        if row == "adapter":
            images_of = [pair.control for pair, _ in batch]
            further = {"adapters": adapter, "control_image": images_of, "control": control}
        images = pipeline(
            [pair.prompt for pair, _ in batch],
            seed=[seed for _, seed in batch],
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            width=drawing.width or width,
            height=drawing.height or height,
            **further,
        ).images
        for (pair, seed), image in zip(batch, images, strict=True):
            samples[row].append(Sample(f"{pair.name}_seed{seed}", image, pair.prompt, seed))
        if on_progress is not None:
            on_progress(sum(map(len, samples.values())), len(ROWS) * len(places))
    return samples


def read_pictures_of(pairs: Sequence[ControlPair], folder: Path) -> list[Sample]:
    """Read pictures that were generated before, named as their pairs, or with _seed and a number behind.

    Raises:
        ValueError: some are of no pair.
    """
    names = {pair.name for pair in pairs}
    stems = {photo.path.stem: photo.path for photo in find_photos(folder, min_side=MIN_SIDE_PX).photos}
    unknown = [stem for stem in stems if (stem.rpartition("_seed")[0] or stem) not in names]
    if unknown:
        raise ValueError(f"{listed(unknown)} are pictures of no pair; name them as the photos are")
    return [Sample(stem, decode_photo(path, min_side=MIN_SIDE_PX)[0]) for stem, path in stems.items()]


class _PairRow(StrictModel):
    """A line of metadata.jsonl, as the `datasets` library writes it; the rest is ignored."""

    model_config = ConfigDict(extra="ignore")

    file_name: Annotated[str, Field(min_length=1)]
    conditioning_image_file_name: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(pattern=r"\S")]


def _read_pair(folder: Path, line: str) -> ControlPair:
    row = read_json(line, _PairRow, "cannot be read")
    photo = _read_image(folder, row.file_name, WHITE)
    control = _read_image(folder, row.conditioning_image_file_name, BLACK)
    if abs(control.width * photo.height - control.height * photo.width) > max(*photo.size, *control.size):
        raise ValueError(
            f"has a control image of {control.width} × {control.height} px for a photo of {photo.width} × "
            f"{photo.height} px; crop one to the other's proportions"
        )
    name = Path(row.file_name).stem
    return ControlPair(name, photo, control, row.text, name)


def _read_image(folder: Path, name: str, background: tuple[int, int, int]) -> Image.Image:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"names {printable(name)}, which is not inside the folder")
    if not (folder / path).is_file():
        raise ValueError(f"names {printable(name)}, which is not there")
    return decode_photo(folder / path, background=background, min_side=MIN_SIDE_PX)[0]

"""What an evaluation is of: photos, pictures and pairs that are read, and pictures that are drawn."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import ConfigDict, Field

from ether_diffusion.control.images import check_shape
from ether_diffusion.metrics.control_scores import ControlPair
from ether_diffusion.metrics.report import ROWS
from ether_diffusion.metrics.scores import MIN_SIDE_PX, Sample, SortedSamples, sort_samples, without_faults
from ether_diffusion.pipelines.metadata import png_bytes, read_image_metadata
from ether_diffusion.pipelines.sampling import MAX_PICTURES, ControlUse, Sampling, draw_pictures
from ether_diffusion.serving.engine import Engine
from ether_diffusion.strict_json import StrictModel, read_json
from ether_diffusion.training import decode_photo, find_photos
from ether_diffusion.training.captions import decode_text, json_rows
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.wording import listed, printable

METADATA_NAME = "metadata.jsonl"
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
"""What lies under the transparent parts of photos and of control images, as in training."""
OnProgress = Callable[[int, int], None]


def read_text(file: Path) -> str:
    """Return a file of text, or raise a ValueError that names it."""
    try:
        return decode_text(file.read_bytes())
    except UnusableFileError as reason:
        raise ValueError(f"{printable(file)} {reason}") from None


def _read_folder(folder: Path, without: tuple[()] | None = None) -> tuple[dict[Path, Sample], dict[str, str]]:
    """Return the pictures of a folder by their files, and by name why others cannot be used."""
    found = find_photos(folder, min_side=MIN_SIDE_PX, without=without)
    pictures = {
        each.path: Sample(each.name, decode_photo(each.path, min_side=MIN_SIDE_PX)[0])
        for each in found.photos
    }
    return pictures, {each.name: each.reason for each in found.refused}


def read_photos(folder: Path) -> SortedSamples:
    """Read two or more real photos of a subject, of any sizes: encoders scale each by itself."""
    photos, refused = _read_folder(folder, without=())
    result = without_faults(photos.values(), refused)
    if len(result.usable) < 2:
        reasons = listed(map(" ".join, result.set_aside.items()), separator="; ")
        found = f"found {len(result.usable) or 'no'} photo to compare with in {printable(folder)}"
        raise ValueError(f"{found}; give at least two{f'; {reasons}' if reasons else ''}")
    return result


def read_generated(folder: Path, captions: Mapping[str, str] | None = None) -> SortedSamples:
    """Read two or more pictures that were generated before.

    Their prompts are `captions` by file name, or else what each PNG of ours says of itself; seeds are always
    from there.
    """
    found, refused = _read_folder(folder)
    names = {sample.name for sample in found.values()}
    if captions is not None and not names <= captions.keys():
        without = listed(sorted(names - captions.keys()))
        raise ValueError(f"there is no caption for {without}; give every picture one")
    unknown = sorted((captions or {}).keys() - names - refused.keys())
    if unknown:
        raise ValueError(f"there are captions for {listed(unknown)}, and no such pictures; delete them")
    samples = []
    for path, sample in found.items():
        said = read_image_metadata(path) if path.suffix.lower() == ".png" else None
        prompt = captions[sample.name] if captions is not None else said.prompt if said else None
        samples.append(Sample(sample.name, sample.image, prompt, said.seed if said else None))
    result = sort_samples(samples, refused)
    if len(result.usable) < 2:
        raise ValueError(f"found one picture to score in {printable(folder)}; give at least two")
    return result


def read_caption_file(path: Path) -> dict[str, str]:
    """Read prompts by file name from JSON Lines: {"file_name": "0.png", "text": "a photo of a dog"}."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of captions {printable(path)}")
    captions: dict[str, str] = {}
    for where, name, words in json_rows(read_text(path), printable(path)):
        if name in captions:
            raise ValueError(f"{where} names {printable(name)} a second time; leave one line")
        captions[name] = words
    return captions


def draw_samples(
    engine: Engine, sampling: Sampling, num_prompts: int, *, on_progress: OnProgress | None = None
) -> tuple[dict[str, list[Sample]], dict[str, list[Sample]]]:
    """Draw what was planned, by ROWS: of the first `num_prompts`, the subject's, and of the others."""
    rows: tuple[dict[str, list[Sample]], ...] = ({row: [] for row in ROWS}, {row: [] for row in ROWS})
    for picture in draw_pictures(engine, sampling, on_progress=on_progress):
        seed, name = sampling.seeds[picture.seed], f"prompt{picture.prompt + 1}_seed"
        sample = Sample(f"{name}{seed}", picture.image, sampling.prompts[picture.prompt], seed)
        rows[picture.prompt >= num_prompts][ROWS[picture.choice]].append(sample)
    return rows[0], rows[1]


def picture_files(rows: Mapping[str, Sequence[Sample]]) -> dict[str, bytes]:
    """Return PNGs with their metadata by row and name: base/prompt1_seed0.png."""
    return {f"{row}/{each.name}.png": png_bytes(each.image) for row, found in rows.items() for each in found}


def draw_pairs(
    engine: Engine,
    pairs: Sequence[ControlPair],
    how: Sampling,
    control: str,
    *,
    on_progress: OnProgress | None = None,
) -> dict[str, list[Sample]]:
    """Draw every pair on every seed, by the base from the caption alone and by the adapter with the control.

    Of `how` come seeds and settings; a side of None is the photo's. Names say pair and seed.
    """
    rows: dict[str, list[Sample]] = {row: [] for row in ROWS}
    for (width, height), same in itertools.groupby(pairs, key=lambda pair: pair.photo.size):
        every, most = list(same), max(1, MAX_PICTURES // (len(ROWS) * len(how.seeds)))
        for part in (every[start : start + most] for start in range(0, len(every), most)):
            sampling = replace(
                how,
                prompts=tuple(pair.prompt for pair in part),
                choices=({}, {control: 1.0}),
                width=how.width or width,
                height=how.height or height,
            )
            images = tuple(pair.control for pair in part)
            use = ControlUse(images[0], control, by_prompt=images)
            for picture in draw_pictures(engine, sampling, control=use):
                pair, seed = part[picture.prompt], how.seeds[picture.seed]
                sample = Sample(f"{pair.name}_seed{seed}", picture.image, pair.prompt, seed)
                rows[ROWS[picture.choice]].append(sample)
            if on_progress is not None:
                on_progress(sum(map(len, rows.values())), len(ROWS) * len(pairs) * len(how.seeds))
    return rows


def read_pictures_of(pairs: Sequence[ControlPair], folder: Path) -> list[Sample]:
    """Read pictures that were generated before, named as their pairs, or with _seed and a number behind."""
    names, found = {pair.name for pair in pairs}, _read_folder(folder)[0].items()
    unknown = [path.stem for path, _ in found if (path.stem.rpartition("_seed")[0] or path.stem) not in names]
    if unknown:
        raise ValueError(f"{listed(unknown)} are pictures of no pair; name them as the photos are")
    return [Sample(path.stem, sample.image) for path, sample in found]


class _PairRow(StrictModel):
    """A line of metadata.jsonl, as the `datasets` library writes it; the rest is ignored."""

    model_config = ConfigDict(extra="ignore")

    file_name: Annotated[str, Field(min_length=1)]
    conditioning_image_file_name: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(pattern=r"\S")]


def read_control_pairs(folder: Path) -> list[ControlPair]:
    """Read photos, control images and captions that a folder's metadata.jsonl names, as training reads them.

    Pairs that cannot be used are all named in one ValueError.
    """
    file, pairs, problems = folder / METADATA_NAME, dict[str, ControlPair](), list[str]()
    if not file.is_file():
        needed = '{"file_name": …, "conditioning_image_file_name": …, "text": …}'
        raise FileNotFoundError(f"there is no {printable(file)}; write a line for each pair: {needed}")
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        try:
            pair = _read_pair(folder, line) if line.strip() else None
        except (OSError, ValueError) as problem:
            problems.append(f"line {number} {printable(problem, 300)}")
            continue
        if pair is not None and pairs.setdefault(pair.name, pair) is not pair:
            problems.append(f"line {number} {pair.name} is named twice")
    if problems:
        raise ValueError(f"{printable(file)} has pairs that cannot be used: {listed(problems, 8, '; ')}")
    if len(pairs) < 2:
        raise ValueError(f"found {len(pairs) or 'no'} pair in {printable(file)}; give at least two")
    return list(pairs.values())


def _read_pair(folder: Path, line: str) -> ControlPair:
    row = read_json(line, _PairRow, "cannot be read")
    images = []
    for name, background in ((row.file_name, WHITE), (row.conditioning_image_file_name, BLACK)):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not (folder / path).is_file():
            raise ValueError(f"names {printable(name)}, which is no file inside the folder")
        images.append(decode_photo(folder / path, background=background, min_side=MIN_SIDE_PX)[0])
    photo, control = images
    check_shape(control, width=photo.width, height=photo.height)
    name = Path(row.file_name).stem
    return ControlPair(name, photo, control, row.text, name)

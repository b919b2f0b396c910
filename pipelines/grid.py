"""A grid of pictures: the labelled sheet, and the manifest that says what stands where."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePosixPath

from PIL import Image, PngImagePlugin

from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.pipelines.metadata import MAX_TEXT_BYTES
from ether_diffusion.pipelines.sampling import Picture, Sampling, describe_choice, file_names

SHEET_NAME, MANIFEST_NAME, PICTURES_FOLDER = "sheet.png", "grid.json", "pictures"
GRID_KEYWORD = "ether_diffusion_grid"
"""Of the text chunk in the sheet that holds the manifest."""
FORMAT_VERSION = 1


def grid_files(sampling: Sampling, pictures: list[Picture]) -> dict[str, bytes]:
    """Return the files of a grid by name: the sheet, the manifest and every picture."""
    named = {
        str(PurePosixPath(PICTURES_FOLDER, name)): p for name, p in file_names(sampling, pictures).items()
    }
    return sheet_files(sampling, named) | {name: picture.png() for name, picture in named.items()}


def sheet_files(sampling: Sampling, pictures: Mapping[str, Picture]) -> dict[str, bytes]:
    """Return the sheet and the manifest of the pictures of a grid, which lie beside them by these names."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "prompts": list(sampling.prompts),
        "seeds": list(sampling.seeds),
        "choices": [dict(choice) for choice in sampling.choices],
        "pictures": [
            {
                "file": name,
                "prompt": p.prompt,
                "seed": p.seed,
                "choice": p.choice,
                "metadata": asdict(p.metadata),
            }
            for name, p in pictures.items()
        ],
    }
    text = json.dumps(manifest, indent=1, allow_nan=False)
    sheet = draw_grid(sampling, list(pictures.values()))
    return {
        SHEET_NAME: _png(sheet, json.dumps(manifest, separators=(",", ":"))),
        MANIFEST_NAME: text.encode(),
    }


def draw_grid(sampling: Sampling, pictures: list[Picture]) -> Image.Image:
    """Draw the sheet: a column per choice, a row per prompt and seed; with one choice a column per seed."""
    images = {(p.prompt, p.seed, p.choice): p.image for p in pictures}
    prompts, seeds, choices = (range(len(x)) for x in (sampling.prompts, sampling.seeds, sampling.choices))
    if len(choices) == 1 and len(seeds) > 1:
        rows = [[images[prompt, seed, 0] for seed in seeds] for prompt in prompts]
        row_labels = [sampling.prompts[prompt] if len(prompts) > 1 else "" for prompt in prompts]
        column_labels = [f"seed {seed}" for seed in sampling.seeds]
    else:
        rows = [[images[prompt, seed, c] for c in choices] for prompt in prompts for seed in seeds]
        row_labels = [_row_label(sampling, prompt, seed) for prompt in prompts for seed in seeds]
        column_labels = [describe_choice(choice) for choice in sampling.choices]
    return draw_contact_sheet(
        rows, row_labels=row_labels, column_labels=column_labels, title=_title(sampling, pictures[0])
    )


def _row_label(sampling: Sampling, prompt: int, seed: int) -> str:
    parts = [sampling.prompts[prompt]] if len(sampling.prompts) > 1 else []
    return " · ".join(parts + ([f"seed {sampling.seeds[seed]}"] if len(sampling.seeds) > 1 else []))


def _title(sampling: Sampling, picture: Picture) -> str:
    said = picture.metadata
    parts = [sampling.prompts[0]] if len(sampling.prompts) == 1 else []
    if len(sampling.choices) == 1 and sampling.choices[0]:
        parts.append(describe_choice(sampling.choices[0]))
    parts += [f"{said.base}", f"{sampling.steps} steps", f"guidance {sampling.guidance_scale:g}"]
    parts.append(said.scheduler.removesuffix("Scheduler"))
    if len(sampling.seeds) == 1:
        parts.append(f"seed {sampling.seeds[0]}")
    return " · ".join(parts)


def _png(sheet: Image.Image, manifest: str) -> bytes:
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if len(manifest) <= MAX_TEXT_BYTES:  # beyond, the file beside the sheet holds it alone
        chunks.add_text(GRID_KEYWORD, manifest)
    sheet.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()

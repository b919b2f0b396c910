"""Does an adapter know its subject? One of Tiny World, learned from six photos, drawn where none was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ether_diffusion.adapters import load_ether
from ether_diffusion.bases import open_base
from ether_diffusion.console import StoppedError
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.concepts import Concept
from ether_diffusion.tiny_world.pictures import RECOGNISED, generate, score_against_truth, to_images
from ether_diffusion.tiny_world.subjects import (
    IDENTIFIER,
    NUM_PHOTOS,
    unseen_prompts,
    unseen_scenes,
    write_photos,
)
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.run import train_dreambooth
from recipes.tiny_world.background_colours import background_accuracy

SETTINGS: Mapping[str, Json] = {"train_batch_size": 6, "max_train_steps": 200, "random_flip": True}
"""What a subject of Tiny World is learned with: about a minute on one core of a CPU."""

COLUMNS = 6


@dataclass(frozen=True)
class SubjectPictures:
    """A subject drawn on backgrounds its photos never had, by the base and with the adapter, on equal seeds.

    Pictures are (b, 3, h, h) in [-1, 1], a row for each of `unseen_prompts`.
    """

    concept: Concept
    base: torch.Tensor
    adapter: torch.Tensor

    def scores(self) -> dict[str, float]:
        """Return shares of the pictures in [0, 1].

        `recognised`: as `score_against_truth` says. `background`: a plain one has its colour.
        """
        scenes, scores = unseen_scenes(self.concept), {}
        for name, pictures in (("base", self.base), ("adapter", self.adapter)):
            scores[f"{name}_recognised"] = score_against_truth(pictures, scenes)[RECOGNISED]
            scores[f"{name}_background"] = background_accuracy(pictures, scenes)
        return scores


def learn_subject(
    concept: Concept,
    folder: Path,
    settings: Mapping[str, Json] | None = None,
    *,
    base: str = ALIAS,
    num_photos: int = NUM_PHOTOS,
) -> Path:
    """Write a subject's first photos at the base's size, train an adapter on them, and return its folder.

    Raises:
        ValueError: the settings cannot be used, or the folder holds another run.
        StoppedError: a signal stopped the training; called again, it goes on.
    """
    photos, adapter = folder / "photos", folder / "adapter"
    write_photos(concept, photos, count=num_photos, size=open_base(base).native_size)
    given: dict[str, Json] = {
        **SETTINGS,
        **(settings or {}),
        "pretrained_model_name_or_path": base,
        "instance_data_dir": str(photos),
        "token": IDENTIFIER,
        "output_dir": str(adapter),
    }
    if code := train_dreambooth(DreamBoothConfig.from_flat(given)):
        raise StoppedError(code, adapter)
    return adapter


def draw_subject(
    concept: Concept, adapter: Path, *, base: str = ALIAS, seed: int = 0, num_steps: int = 20
) -> SubjectPictures:
    """Draw a subject where its photos never showed it, without and with the adapter."""
    pipeline = open_base(base).load_pipeline(dtype=torch.float32)
    prompts = unseen_prompts(concept)
    without, _ = generate(pipeline, prompts, seed=seed, num_steps=num_steps)
    load_ether(pipeline, adapter)
    drawn, _ = generate(pipeline, prompts, seed=seed, num_steps=num_steps)
    return SubjectPictures(concept, without, drawn)


def subject_sheet(pictures: SubjectPictures, photos: Sequence[Image.Image]) -> Image.Image:
    """Return one picture of the photos above, the base and the adapter below."""
    prompts = unseen_prompts(pictures.concept)[:COLUMNS]
    rows = [to_images(rows[:COLUMNS]) for rows in (pictures.base, pictures.adapter)]
    above = draw_contact_sheet(
        [list(photos[:COLUMNS])],
        row_labels=["learned from"],
        column_labels=[f"photo {number}" for number in range(1, COLUMNS + 1)],
    )
    below = draw_contact_sheet(rows, row_labels=["the base draws", "with the adapter"], column_labels=prompts)
    sheet = Image.new("RGB", (max(above.width, below.width), above.height + below.height), "white")
    sheet.paste(above, (sheet.width - above.width, 0))
    sheet.paste(below, (sheet.width - below.width, above.height))
    return sheet

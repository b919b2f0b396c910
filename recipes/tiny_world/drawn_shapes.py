"""Does an adapter follow shapes? Concepts that its training never showed, in outlines that no concept has."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.adapters import load_ether
from ether_diffusion.bases import open_base
from ether_diffusion.console import StoppedError
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.control import control_batch, controlled, load_control
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import SECOND_ALIAS
from ether_diffusion.tiny_world.concepts import Concept, find_concept, with_article
from ether_diffusion.tiny_world.pictures import generate, to_images, to_tensor
from ether_diffusion.tiny_world.subjects import subject_noun
from ether_diffusion.tiny_world.world import COLOURS, Background, Scene
from ether_diffusion.training.config import ControlRunConfig
from ether_diffusion.training.run import train_dreambooth
from recipes.tiny_world.control_pairs import (
    CONTROL_FOLDER,
    ShapeName,
    draw_shape,
    draw_silhouette,
    sample_pairs,
    training_concepts,
    write_pairs,
)

SILHOUETTE = "silhouette"
NUM_PAIRS = 768
SETTINGS: Mapping[str, Json] = {
    "train_batch_size": 16,
    "max_train_steps": 400,
    "control_type": SILHOUETTE,
    "export_lora": False,
}
"""What control of Tiny World is learned with: nine minutes of processor time."""

STANDS_OUT = 0.5
"""A pixel is the object's where a channel differs by this much from the background, of 2 from black to white.

A shadow on white differs by less."""

SNOW, BLUE = Background("scene", "snow"), Background("plain", "blue")


@dataclass(frozen=True)
class DrawnCase:
    """A concept, the shape that it is to have, and the colour of its plain background."""

    concept: Concept
    shape: ShapeName
    colour: str

    @property
    def prompt(self) -> str:
        """What is asked for; of the shape it says nothing."""
        return f"{with_article(self.concept.name)} on {with_article(self.colour)} background"


_CASES: tuple[tuple[str, ShapeName, str], ...] = (
    ("frog", "wide ellipse", "purple"),
    ("bear", "ellipse on the left", "blue"),
    ("strawberry", "disc at the right", "gray"),
    ("pizza", "triangle", "white"),
    ("fish", "star", "white"),
    ("pig", "corner", "green"),
)
CASES = tuple(DrawnCase(find_concept(name), shape, colour) for name, shape, colour in _CASES)
"""The base draws these concepts; control's training has none of them, nor any of these shapes."""


@dataclass(frozen=True)
class ControlPictures:
    """What the base and an adapter that follows shapes drew of `CASES`, on equal seeds: (b, 3, h, h)."""

    base: Tensor
    result: Tensor

    def ious(self) -> dict[str, tuple[float, ...]]:
        """Return, for base and result, each picture's intersection over union of object and drawn shape."""
        return {
            name: tuple(shape_iou(picture, case) for picture, case in zip(pictures, CASES, strict=True))
            for name, pictures in (("base", self.base), ("result", self.result))
        }


def learn_control(
    folder: Path, settings: Mapping[str, Json] | None = None, *, base: str = SECOND_ALIAS
) -> Path:
    """Write pairs, train ETHER+ and an encoder on their silhouettes, and return the adapter's folder.

    Raises:
        ValueError: the settings cannot be used, or the folder holds another run.
        StoppedError: a signal stopped the training; called again, it goes on.
    """
    pairs, adapter = folder / "pairs", folder / "adapter"
    if not (pairs / "metadata.jsonl").is_file():  # written last
        drawn = sample_pairs(training_concepts(), NUM_PAIRS, control_type="silhouette", scattered=True)
        write_pairs(drawn, pairs, size=open_base(base).native_size)
    given: dict[str, Json] = {
        **SETTINGS,
        **(settings or {}),
        "pretrained_model_name_or_path": base,
        "instance_data_dir": str(pairs),
        "conditioning_data_dir": str(pairs / CONTROL_FOLDER),
        "output_dir": str(adapter),
    }
    if code := train_dreambooth(ControlRunConfig.from_flat(given)):
        raise StoppedError(code, adapter)
    return adapter


def draw_cases(*adapters: Path, base: str = SECOND_ALIAS, seed: int = 0) -> tuple[ControlPictures, ...]:
    """Draw `CASES` by the base, and by each adapter, which sees their shapes."""
    size = open_base(base).native_size
    prompts, shapes = [case.prompt for case in CASES], [draw_shape(case.shape, size=size) for case in CASES]
    alone = _draw(base, prompts, (), None, shapes, seed)
    return tuple(ControlPictures(alone, _draw(base, prompts, (), each, shapes, seed)) for each in adapters)


def places(subject: Concept) -> tuple[Scene, ...]:
    """Return where a subject is put: small on the left, turned at the right; captions do not say so."""
    return (
        Scene(subject, SNOW, scale=0.5, shift_x=-0.22, shift_y=0.1),
        Scene(subject, BLUE, scale=0.55, shift_x=0.16, shift_y=-0.1, rotation=35, flipped=True),
        Scene(subject, SNOW, scale=0.6, shift_x=0.1, shift_y=0.1, rotation=180),
    )


def draw_placed(
    subject: Concept, subject_adapter: Path, control_adapter: Path, *, base: str = SECOND_ALIAS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw a learned subject with and without the shapes of `places`: each (b, 3, h, h) in [-1, 1]."""
    prompts = [scene.caption(subject_noun(subject)) for scene in places(subject)]
    shapes = [draw_silhouette(scene, size=open_base(base).native_size) for scene in places(subject)]
    free = _draw(base, prompts, (subject_adapter,), None, shapes, seed)
    return free, _draw(base, prompts, (subject_adapter,), control_adapter, shapes, seed)


@torch.no_grad()
def _draw(
    base: str,
    prompts: Sequence[str],
    adapters: Sequence[Path],
    control: Path | None,
    shapes: Sequence[Image.Image],
    seed: int,
) -> Tensor:
    pipeline = open_base(base).load_pipeline(dtype=torch.float32)
    names = [f"subject_{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        load_ether(pipeline, adapter, adapter_name=name)
    following: AbstractContextManager[None] = nullcontext()
    if control is not None:
        encoder, side = load_control(pipeline, control).encoder, shapes[0].width
        images = control_batch(shapes, height=side, width=side, control_type=SILHOUETTE)
        following = controlled(pipeline.unet, encoder, images)
        pipeline.set_adapters([*names, "control"])
    with following:
        return generate(pipeline, prompts, seed=seed, batch_size=len(prompts))[0]


def shape_iou(picture: Tensor, case: DrawnCase) -> float:
    """Return the intersection over union of what stands out of the background and the drawn shape."""
    colour = torch.tensor(COLOURS[case.colour]).view(3, 1, 1) / 127.5 - 1
    found = (picture - colour).abs().amax(0) > STANDS_OUT
    wanted = to_tensor([draw_shape(case.shape, size=picture.shape[-1])])[0, 0] > 0
    return float((found & wanted).sum() / (found | wanted).sum())


def control_sheet(pictures: ControlPictures) -> Image.Image:
    """Return one picture: control, base and result of each case."""
    size = pictures.base.shape[-1]
    shapes = [draw_shape(case.shape, size=size).convert("RGB") for case in CASES]
    return draw_contact_sheet(
        [shapes, to_images(pictures.base), to_images(pictures.result)],
        row_labels=["control", "base", "result"],
        column_labels=[case.prompt for case in CASES],
    )


def placed_sheet(subject: Concept, free: Tensor, placed: Tensor) -> Image.Image:
    """Return one picture: shape, the subject's adapter alone, and both adapters together."""
    shapes = [draw_silhouette(scene, size=free.shape[-1]).convert("RGB") for scene in places(subject)]
    return draw_contact_sheet(
        [shapes, to_images(free), to_images(placed)],
        row_labels=["control", "subject alone", "subject and control"],
        column_labels=[scene.caption(subject_noun(subject)) for scene in places(subject)],
    )

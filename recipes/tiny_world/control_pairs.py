"""Control images of Tiny World: silhouette, edges and palette map of a scene, and shapes that none has."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ether_diffusion.tiny_world.concepts import (
    RENDERS_FOLDER,
    Concept,
    find_concept,
    load_concepts,
    shipped_concepts,
)
from ether_diffusion.tiny_world.world import (
    BACKGROUND_CLASSES,
    CLASSES,
    NATIVE_SIZE,
    PALETTE,
    SUPERSAMPLING,
    Background,
    Scene,
    draw,
    draw_object,
)
from recipes.tiny_world.scenes import sample_scene

ControlType = Literal["silhouette", "edges", "palette"]
CONTROL_TYPES: tuple[ControlType, ...] = ("silhouette", "edges", "palette")

VALIDATION_CONCEPTS = ("fox", "taxi", "doughnut", "guitar", "snowman", "frog", "rocket", "strawberry")
"""Kept from control's training: one of each kind that the base never saw, and three that it knows."""
PICTURE_COLUMN, CONTROL_COLUMN, TEXT_COLUMN = "file_name", "conditioning_image_file_name", "text"
"""The fields of metadata.jsonl, which the datasets library shows as image, conditioning_image and text."""
CONTROL_FOLDER = "conditioning_images"
SCATTERED_SCALES = (0.4, 0.92)
"""Longest side of a scattered object before it is turned, as a fraction of the picture's."""
UPSET = 0.3
"""Share of scattered objects that are turned by any angle; the others by at most 35 degrees."""
EDGE_STEP = 0.12
"""A pixel is an edge where the brightness rises by this much a pixel, of 1 from black to white."""


@dataclass(frozen=True)
class Pair:
    """A scene and what says where it is: picture, control image and caption."""

    scene: Scene
    control_type: ControlType

    @property
    def caption(self) -> str:
        """The caption of the picture."""
        return self.scene.caption()


def training_concepts() -> tuple[Concept, ...]:
    """Return the shipped concepts that control learns from, none of the benchmark's among them."""
    left_out = {*map(find_concept, VALIDATION_CONCEPTS), *load_concepts("benchmark")}
    return tuple(concept for concept in shipped_concepts() if concept not in left_out)


def validation_concepts() -> tuple[Concept, ...]:
    """Return the concepts that control never sees in training."""
    return tuple(map(find_concept, VALIDATION_CONCEPTS))


def sample_pairs(
    concepts: Sequence[Concept],
    number: int,
    *,
    control_type: ControlType,
    seed: int = 0,
    scattered: bool = False,
) -> tuple[Pair, ...]:
    """Draw pairs, as many of each concept; a smaller number gives the first of a larger one.

    Scattered objects lie anywhere, turned and mirrored, and captions are silent of it: only the control image
    says where. Without, a concept has one outline, and captions name sizes and places.
    """
    rng = random.Random(f"control/{seed}")
    scenes = (sample_scene(concepts[index % len(concepts)], rng) for index in range(number))
    return tuple(Pair(_scatter(scene, rng) if scattered else scene, control_type) for scene in scenes)


def _scatter(scene: Scene, rng: random.Random) -> Scene:
    scale = rng.uniform(*SCATTERED_SCALES)
    reach = max(0.0, (1 - scale) / 2 - 0.02)
    return replace(
        scene,
        size="medium",
        place="center",
        scale=scale,
        shift_x=rng.uniform(-reach, reach),
        shift_y=rng.uniform(-reach, reach),
        rotation=rng.uniform(-180, 180) if rng.random() < UPSET else rng.uniform(-35, 35),
        flipped=rng.random() < 0.5,
    )


def draw_silhouette(
    scene: Scene, *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER
) -> Image.Image:
    """Draw the object's shape (mode L): white where it covers at least half of a pixel, else black."""
    inside = object_coverage(scene, size=size, renders_folder=renders_folder) >= 0.5
    return Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))


def draw_edges(
    scene: Scene, *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER
) -> Image.Image:
    """Draw the edges of the scene's picture (mode L): white where its Sobel gradient is steep, else black."""
    picture = draw(scene, size=size, renders_folder=renders_folder).convert("L")
    light = np.pad(np.asarray(picture, dtype=np.float64) / 255, 1, mode="edge")
    smooth_rows = light[:-2] + 2 * light[1:-1] + light[2:]
    smooth_columns = light[:, :-2] + 2 * light[:, 1:-1] + light[:, 2:]
    across, down = smooth_rows[:, 2:] - smooth_rows[:, :-2], smooth_columns[2:] - smooth_columns[:-2]
    steepness = np.hypot(across, down) / 8  # both kernels' positive weights add up to 4, over 2 px
    return Image.fromarray(np.where(steepness >= EDGE_STEP, 255, 0).astype(np.uint8))


def draw_palette(
    scene: Scene, *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER
) -> Image.Image:
    """Draw the map of classes in `PALETTE`'s colours (mode RGB): the object's kind over its background's."""
    classes = class_map(scene, size=size, renders_folder=renders_folder)
    return Image.fromarray(np.array(list(PALETTE.values()), dtype=np.uint8)[classes])


def class_map(
    scene: Scene, *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER
) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """Return the index in `CLASSES` of each pixel (size, size)."""
    inside = object_coverage(scene, size=size, renders_folder=renders_folder) >= 0.5
    of_object = CLASSES.index(scene.concept.kind)
    of_background = CLASSES.index(background_class(scene.background))
    found: np.ndarray[tuple[int, int], np.dtype[np.int64]] = np.where(inside, of_object, of_background)
    return found


def background_class(background: Background) -> str:
    """Return the class of a background: its scene, or plain, gradient or pattern."""
    if background.kind == "scene":
        return background.name
    return background.kind if background.kind in BACKGROUND_CLASSES else "pattern"


def object_coverage(
    scene: Scene, *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER
) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Return which share of each pixel (size, size) of the picture the object covers, from 0 to 1."""
    layer = draw_object(scene, size * SUPERSAMPLING, renders_folder=renders_folder)
    alpha = np.asarray(layer.getchannel("A"), dtype=np.float64) / 255
    shares: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    shares = alpha.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))
    return shares


_PAINTERS: dict[ControlType, Callable[..., Image.Image]] = {
    "silhouette": draw_silhouette,
    "edges": draw_edges,
    "palette": draw_palette,
}


def draw_control(
    pair: Pair, *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER
) -> Image.Image:
    """Draw the control image of a pair, of size x size px."""
    return _PAINTERS[pair.control_type](pair.scene, size=size, renders_folder=renders_folder)


def write_pairs(
    pairs: Sequence[Pair], folder: Path, *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER
) -> list[Path]:
    """Write pictures, their control images in a subfolder, and metadata.jsonl; return the pictures' paths."""
    (folder / CONTROL_FOLDER).mkdir(parents=True, exist_ok=True)
    rows, paths = [], []
    for number, pair in enumerate(pairs):
        name = f"{number:05d}_{pair.scene.concept.name.replace(' ', '_')}.png"
        draw(pair.scene, size=size, renders_folder=renders_folder).save(folder / name)
        draw_control(pair, size=size, renders_folder=renders_folder).save(folder / CONTROL_FOLDER / name)
        row = {PICTURE_COLUMN: name, CONTROL_COLUMN: f"{CONTROL_FOLDER}/{name}", TEXT_COLUMN: pair.caption}
        rows.append(json.dumps(row))
        paths.append(folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return paths


Point = tuple[float, float]
ShapeName = Literal["ellipse on the left", "wide ellipse", "triangle", "star", "disc at the right", "corner"]
_SHARPNESS = 8
"""The shape is drawn this many times larger, and then shrunk."""


@dataclass(frozen=True)
class Ellipse:
    """An ellipse in its box (left, top, right, bottom), in fractions of the picture's side."""

    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Polygon:
    """A polygon by its corners (x, y), in fractions of the picture's side."""

    corners: tuple[Point, ...]


def _star(centre: Point, outer: float, inner: float) -> Polygon:
    radii = [outer if number % 2 == 0 else inner for number in range(10)]
    angles = [math.pi * number / 5 for number in range(10)]
    x, y = centre
    return Polygon(
        tuple(
            (x + radius * math.sin(angle), y - radius * math.cos(angle))
            for radius, angle in zip(radii, angles, strict=True)
        )
    )


SHAPES: dict[ShapeName, Ellipse | Polygon] = {
    "ellipse on the left": Ellipse((0.06, 0.22, 0.53, 0.88)),
    "wide ellipse": Ellipse((0.09, 0.34, 0.91, 0.78)),
    "triangle": Polygon(((0.5, 0.09), (0.91, 0.88), (0.09, 0.88))),
    "star": _star((0.5, 0.52), 0.41, 0.19),
    "disc at the right": Ellipse((0.56, 0.5, 0.91, 0.85)),
    "corner": Polygon(((0.19, 0.12), (0.47, 0.12), (0.47, 0.59), (0.84, 0.59), (0.84, 0.88), (0.19, 0.88))),
}


def draw_shape(name: ShapeName, *, size: int = NATIVE_SIZE) -> Image.Image:
    """Draw a shape (mode L) of size x size px: white where it covers at least half of a pixel, else black."""
    shape, side = SHAPES[name], size * _SHARPNESS
    picture = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(picture)
    if isinstance(shape, Ellipse):
        left, top, right, bottom = (side * each for each in shape.box)
        pen.ellipse((left, top, right, bottom), fill=255)
    else:
        pen.polygon([(side * x, side * y) for x, y in shape.corners], fill=255)
    shares = picture.resize((size, size), Image.Resampling.BOX)
    return shares.point([255 if share >= 128 else 0 for share in range(256)])

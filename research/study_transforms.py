"""Draw with the embedded base under random transforms of growing strength: ETHER, ETHER+, OFT and none.

`python -m research.study_transforms --output_dir runs/transforms` trains nothing and takes a few minutes on
one CPU core. It writes transforms.json, transforms.png and transforms_sheet.png.

Random transforms of growing strength on a frozen UNet, without training: what a geometry itself does.

ETHER, Bini et al. 2024, arXiv:2405.20271, fig. 3. T multiplies each attention projection, W' = W T or T W T'
on both sides, in `NUM_BLOCKS` diagonal blocks. Strength s runs from 0, the identity, to 1:

    ETHER    T = I − 2ûûᵀ, which has no strength: the same at every s
    ETHER+   T = I − ûûᵀ + v̂v̂ᵀ with sin∠(û, v̂) = s: at 1 as far as it reaches, ‖T − I‖ = √2 a block
    OFT      T = (I − S)(I + S)⁻¹, S = s / (1 − s) · S₀ with S₀ skew, ‖S₀‖₂ = 1: towards −I,
             whose signs cancel in q kᵀ and in v with out, so that the end is like the beginning
    Naive    T = I + s / (1 − s) · N₀, ‖N₀‖₂ = 1: without bound
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.metrics.report import new_figure, png_of
from ether_diffusion.metrics.scores import Estimate, estimate, likeness_of_pairs
from ether_diffusion.reflections import Vectors, factors, merged_weight, rows
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import load_concepts, shipped_concepts
from ether_diffusion.tiny_world.networks import TinyClip, load_tiny_clip
from ether_diffusion.tiny_world.pictures import generate, recognise, to_images
from ether_diffusion.tiny_world.world import Background, Scene
from research.base import load_base
from research.distances import distance_to_identity
from research.study import run_study, study_parser, write_study

METHODS = ("ether", "ether_plus", "ether_plus_one_sided", "oft", "naive")
STRENGTHS = (0.1, 0.25, 0.5, 0.75, 0.97)
"""Without 1, where OFT and Naive end at infinity."""
NUM_BLOCKS = 4


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength that OFT or Naive do not reach."""
    if not 0 <= strength < 1:
        raise ValueError(f"a strength is from 0, the identity, to below 1; found {strength:g}")


def random_transform(
    weight: Tensor, method: str, strength: float, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Return W' (out, in) under a random transform, and ‖T − I‖, in quadrature over the sides.

    Equal generators give the same directions at every strength.
    """
    if method in ("oft", "naive"):
        blocks = _dense_blocks(weight.shape[1], method, strength, generator)
        columns = weight.view(len(weight), NUM_BLOCKS, -1)
        made: Tensor = torch.einsum("onk,nkm->onm", columns, blocks).reshape_as(weight)
        return made, float((blocks - torch.eye(blocks.shape[1])).norm())
    both = method == "ether_plus"
    widths = (weight.shape[1], weight.shape[0]) if both else (weight.shape[1],)
    sides = rows([_vectors(width, method, strength, generator) for width in widths], weight.dtype)
    update = factors(weight, sides[0], sides[1] if both else None)
    distance = sum(distance_to_identity(side) ** 2 for side in sides) ** 0.5
    return merged_weight(weight, [(*update, 1.0)]), distance


@contextmanager
@torch.no_grad()
def transformed(
    layers: Sequence[nn.Linear], method: str, strength: float, *, seed: int
) -> Iterator[Mapping[str, float]]:
    """Put random transforms on layers' weights inside, and the very tensors back after; give mean distances.

    `weight_distance` is ‖W' − W‖ / ‖W‖, `transform_distance` ‖T − I‖ (Frobenius), means over layers.
    """
    check_strength(strength)
    generator = torch.Generator().manual_seed(seed)
    kept = [layer.weight for layer in layers]
    weight_distances, distances = [], []
    try:
        for layer in layers:
            weight, distance = random_transform(layer.weight, method, strength, generator)
            weight_distances.append(float((weight - layer.weight).norm() / layer.weight.norm()))
            distances.append(distance)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        yield {
            "weight_distance": sum(weight_distances) / len(layers),
            "transform_distance": sum(distances) / len(layers),
        }
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight


def _vectors(width: int, method: str, strength: float, generator: torch.Generator) -> Vectors:
    """Return random u and, for ETHER+, v at the angle whose sine is the strength: (num_blocks, width / n)."""
    shape = (NUM_BLOCKS, width // NUM_BLOCKS)
    u = nn.functional.normalize(torch.randn(shape, generator=generator), dim=1)
    if method == "ether":
        return Vectors(u, None)
    other = torch.randn(shape, generator=generator)
    other = nn.functional.normalize(other - (other * u).sum(1, keepdim=True) * u, dim=1)
    return Vectors(u, (1 - strength**2) ** 0.5 * u + strength * other)


def _dense_blocks(width: int, method: str, strength: float, generator: torch.Generator) -> Tensor:
    side = width // NUM_BLOCKS
    raw = torch.randn(NUM_BLOCKS, side, side, generator=generator)
    direction = raw - raw.mT if method == "oft" else raw
    direction = direction / torch.linalg.matrix_norm(direction, ord=2)[:, None, None]
    scaled, one = strength / (1 - strength) * direction, torch.eye(side)
    if method == "naive":
        grown: Tensor = one + scaled
        return grown
    turned: Tensor = torch.linalg.solve(one + scaled, one - scaled, left=False)
    return turned


LABELS = {
    "ether": "ETHER (fixed)",
    "ether_plus": "ETHER+",
    "ether_plus_one_sided": "ETHER+ one-sided",
    "oft": "OFT",
    "naive": "Naive",
}
COLOURS = dict(zip(METHODS, ("#d62728", "#1f5fbf", "#63a4ff", "#e69f00", "#7a7a80"), strict=True))
PANELS = {
    "prompt_likeness": "likeness to the prompt",
    "recognised": "share recognised",
    "likeness_to_base": "likeness to the base's picture",
}
BACKGROUNDS = (Background("plain", "white"), Background("scene", "beach"))


@dataclass(frozen=True)
class TransformScores:
    """Pictures under one transform: how far it is, and estimates with errors over the scenes."""

    weight_distance: float
    transform_distance: float
    prompt_likeness: Estimate
    recognised: Estimate
    likeness_to_base: Estimate


@dataclass(frozen=True)
class TransformStudy:
    """Scores and pictures (b, 3, h, w) in [-1, 1] by method and strength, and the base's own."""

    prompts: tuple[str, ...]
    base: TransformScores
    base_pictures: torch.Tensor
    scores: Mapping[str, Mapping[float, TransformScores]]
    pictures: Mapping[str, Mapping[float, torch.Tensor]]

    def to_json(self) -> dict[str, Json]:
        """Return the numbers as JSON."""
        return {
            "prompts": list(self.prompts),
            "base": asdict(self.base),
            "methods": {
                method: {f"{strength:g}": asdict(found) for strength, found in by_strength.items()}
                for method, by_strength in self.scores.items()
            },
        }


def study_scenes() -> tuple[Scene, ...]:
    """Return what is drawn: each shipped concept that Tiny World knows, on two backgrounds in turn."""
    known = [concept for concept in shipped_concepts() if concept in load_concepts("trained")]
    return tuple(Scene(concept, BACKGROUNDS[number % 2]) for number, concept in enumerate(known))


def attention_projections(unet: nn.Module) -> list[nn.Linear]:
    """Return the q, k, v and output projections of every attention, as an adapter finds them."""
    from diffusers.models.attention_processor import Attention

    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    return [layer for a in attentions for layer in (a.to_q, a.to_k, a.to_v, a.to_out[0])]


def carry_out(
    methods: Sequence[str],
    strengths: Sequence[float],
    *,
    num_inference_steps: int,
    seed: int,
    on_progress: Callable[[str], None],
) -> TransformStudy:
    """Draw the study's scenes with Tiny World, untouched and under every transform, on equal seeds."""
    pipeline = load_base()
    clip, scenes = load_tiny_clip(tiny_world_path()), study_scenes()
    prompts = [scene.caption() for scene in scenes]

    def draw() -> torch.Tensor:
        pictures, _ = generate(pipeline, prompts, num_steps=num_inference_steps, seed=seed)
        return pictures.nan_to_num(-1)

    base = draw()
    none = {"weight_distance": 0.0, "transform_distance": 0.0}
    scores: dict[str, dict[float, TransformScores]] = {method: {} for method in methods}
    pictures: dict[str, dict[float, torch.Tensor]] = {method: {} for method in methods}
    layers = attention_projections(pipeline.unet)
    for method in methods:
        for strength in strengths:
            if method == "ether" and scores[method]:  # has no strength
                scores[method][strength] = next(iter(scores[method].values()))
                pictures[method][strength] = next(iter(pictures[method].values()))
                continue
            with transformed(layers, method, strength, seed=seed) as distances:
                drawn = draw()
            scores[method][strength] = score(clip, scenes, drawn, base, distances)
            pictures[method][strength] = drawn
            on_progress(f"{LABELS[method]} at {strength:g}: {scores[method][strength]}")
    return TransformStudy(tuple(prompts), score(clip, scenes, base, base, none), base, scores, pictures)


def score(
    clip: TinyClip,
    scenes: Sequence[Scene],
    drawn: torch.Tensor,
    base: torch.Tensor,
    distances: Mapping[str, float],
) -> TransformScores:
    """Score pictures of scenes by Tiny World's own encoder; the concept among all shipped ones."""
    seen = clip.embed_images(drawn)
    named = recognise(clip.embed_images, drawn, scenes, shipped_concepts())
    texts = clip.embed_texts([scene.caption() for scene in scenes])
    groups = range(len(scenes))
    hits = [float(name == scene.concept) for name, scene in zip(named, scenes, strict=True)]
    return TransformScores(
        distances["weight_distance"],
        distances["transform_distance"],
        estimate(likeness_of_pairs(seen, texts), groups),
        estimate(hits, groups),
        estimate(likeness_of_pairs(seen, clip.embed_images(base)), groups),
    )


def draw_sheet(study: TransformStudy, *, prompt: int) -> Image.Image:
    """Return one prompt under every method and strength, the base first."""
    strengths = list(next(iter(study.pictures.values())))
    base = to_images(study.base_pictures[prompt : prompt + 1])
    rows = [
        base + to_images(torch.stack([by_strength[strength][prompt] for strength in strengths]))
        for by_strength in study.pictures.values()
    ]
    return draw_contact_sheet(
        rows,
        row_labels=[LABELS[method] for method in study.pictures],
        column_labels=["base", *(f"strength {strength:g}" for strength in strengths)],
        title=f"Random transforms: {study.prompts[prompt]}",
    )


def draw_curves(study: TransformStudy) -> bytes:
    """Return a PNG of each score against the distance of the weights.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure(4.6 * len(PANELS), 3.8)
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for method, by_strength in study.scores.items():
            shown = list(by_strength.values())[: 1 if method == "ether" else None]
            found = [getattr(each, name) for each in shown]
            axes.errorbar(
                [each.weight_distance for each in shown],
                [each.mean for each in found],
                yerr=[each.standard_error or 0.0 for each in found],
                marker="o",
                capsize=3,
                label=LABELS[method],
                color=COLOURS[method],
            )
        axes.axhline(
            getattr(study.base, name).mean, color="black", linewidth=0.8, linestyle=":", label="base"
        )
        axes.set_xscale("log")
        axes.set_xlabel("distance of the weights, ‖W' − W‖ / ‖W‖")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    axes.legend()
    return png_of(figure)


logger = logging.getLogger(__name__)

STRENGTHS = (0.1, 0.25, 0.5, 0.75, 0.97)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="NAME")
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS, help="from 0 to below 1")
    parser.add_argument("--inference_steps", type=int, default=20, help="of each picture (20)")
    parser.add_argument("--seed", type=int, default=0)
    return run_study("study_transforms", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.pipelines.metadata import png_bytes

    for strength in parsed.strengths:
        check_strength(strength)
    study = carry_out(
        tuple(dict.fromkeys(parsed.methods)),
        sorted(set(parsed.strengths)),
        num_inference_steps=parsed.inference_steps,
        seed=parsed.seed,
        on_progress=logger.info,
    )
    found = {"inference_steps": parsed.inference_steps, "seed": parsed.seed, **study.to_json()}
    sheet = png_bytes(draw_sheet(study, prompt=0))
    write_study(parsed.output_dir, "transforms", found, transforms=draw_curves(study), transforms_sheet=sheet)


if __name__ == "__main__":
    sys.exit(main())

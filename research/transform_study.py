"""What Tiny World draws under random transforms: likeness to the prompts and to the base's pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.evaluation.figures import new_figure, png_of
from ether_diffusion.evaluation.likeness import Estimate, estimate, likeness_of_pairs
from ether_diffusion.evaluation.tiny_subjects import to_images
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.backgrounds import Background
from ether_diffusion.tiny_world.clip import TinyClip, load_tiny_clip
from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.tiny_world.pictures import generate
from ether_diffusion.tiny_world.recognition import recognise, shipped_concepts
from ether_diffusion.tiny_world.world import Scene
from research.random_transforms import METHODS, transformed

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
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_world_path(), dtype=torch.float32)
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

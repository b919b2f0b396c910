"""All stages of the second world in one process, for minutes on a GPU; called by train_on_gpu.sh."""

import argparse
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.flags import add_flags
from ether_diffusion.options import Options, PathText, Texts, option
from ether_diffusion.tiny_world import WEIGHTS_FOLDER
from ether_diffusion.tiny_world.concepts import load_concepts, trained_concepts
from recipes.tiny_world.fresh_pictures import other_concepts
from recipes.tiny_world.loop import RunConfig
from recipes.tiny_world.renders import NAMES_ARCHIVE, fetch_renders
from recipes.tiny_world.stages import run_stage

logger = logging.getLogger(__name__)


class GpuConfig(Options):
    """Where, from what and how long; each field is one flag."""

    run_folder: PathText = option(Path("runs/tiny_world_2"), "Folder with the renders; all is kept there.")
    init_from: PathText = option(WEIGHTS_FOLDER, "Exported pipeline that the UNet stage starts from.")
    export_folder: PathText = option(Path("runs/tiny_world_2/exported"), "Folder that gets the pipeline.")
    minutes: float = option(7.0, "Minutes of training; drawing and compiling come to about two more.")
    num_drawers: int = option(16, "Processes that draw pictures.")
    num_pictures: int = option(65536, "Pictures that the stages of 128 px are trained on.")
    composites_per_concept: int = option(1024, "Composites of each concept that the UNet is trained on.")
    stages: Texts = option((), "Stages to run, in the plan's order; none means all of them.")
    compiled: bool = option(False, "Compile the UNet's blocks: worth it from a few minutes on.")
    carry: PathText | None = option(
        None, "Copy what a run folder without a network needs into this folder, and stop."
    )
    batch_factor: float = option(1.0, "Multiplies all batches; below 1 for a trial on a CPU.")


@dataclass(frozen=True)
class Part:
    """A stage, its share of the minutes, its batch, peak rate and the part of it in which the rate falls."""

    stage: str
    share: float = 0.0
    batch_size: int = 0
    learning_rate: float = 0.0
    decay_fraction: float = 0.0


PLAN = (
    Part("pictures"),
    Part("features", 0.05, 128, 2e-3, 0.5),
    Part("autoencoder_128", 0.26, 64, 1.2e-3, 0.4),
    Part("decoder_128", 0.13, 64, 5e-4, 0.3),
    Part("latents"),
    Part("unet", 0.18, 512, 1.2e-3),
    Part("weights"),
    Part("unet", 0.38, 512, 1.2e-3, 0.4),
    Part("export"),
)


def train(config: GpuConfig) -> None:
    """Run the stages of PLAN one after another; called again, each goes on from where it was."""
    base = RunConfig(
        run_folder=config.run_folder,
        init_from=config.init_from,
        export_folder=config.export_folder,
        world=2,
        num_drawers=config.num_drawers,
        num_pictures=config.num_pictures,
        composites_per_concept=config.composites_per_concept,
        average_decay=0.999,
        checkpoint_minutes=2.0,
        sheet_minutes=1_000.0,
    )
    for part in PLAN:
        if config.stages and part.stage not in config.stages:
            continue
        logger.info("%s", part)
        changed = base.replace(
            time_budget_minutes=config.minutes * part.share or 1.0,
            batch_size=max(1, round(part.batch_size * config.batch_factor)),
            learning_rate=part.learning_rate,
            decay_fraction=part.decay_fraction,
            compiled=config.compiled and part.stage == "unet",
        )
        run_stage(part.stage, changed)


def copy_inputs(run_folder: Path, folder: Path) -> None:
    """Copy the renders that are drawn, and the table of emoji, fetching them first: about 5 MB."""
    renders = fetch_renders(run_folder)
    target = folder / "npm" / "renders"
    target.mkdir(parents=True, exist_ok=True)
    for concept in (*trained_concepts(2), *load_concepts("held_out"), *other_concepts(run_folder)):
        shutil.copyfile(renders / f"{concept.render}.webp", target / f"{concept.render}.webp")
    shutil.copyfile(run_folder / "npm" / NAMES_ARCHIVE, folder / "npm" / NAMES_ARCHIVE)


def main() -> None:
    """Parse, then copy or train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser("python -m recipes.tiny_world.gpu", description=__doc__)
    add_flags(parser, GpuConfig)
    config = GpuConfig(**vars(parser.parse_args()))
    if config.carry is not None:
        copy_inputs(config.run_folder, config.carry)
    else:
        train(config)


if __name__ == "__main__":
    main()

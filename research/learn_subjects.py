"""Learn several subjects of Tiny World, one after the other, and say which of them the adapters draw.

`python -m research.learn_subjects --output_dir runs/subjects` takes about a minute a subject on one CPU core.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ether_diffusion.console import run_command, use_one_thread
from ether_diffusion.tiny_world import SECOND_ALIAS
from ether_diffusion.tiny_world.concepts import find_concept, subject_concepts
from ether_diffusion.training.config import AdapterMethod

if TYPE_CHECKING:
    from ether_diffusion.strict_json import Json

logger = logging.getLogger(__name__)

SUBJECTS = ("fox", "owl", "taxi", "helicopter", "cupcake", "teapot", "guitar", "robot")
"""Two animals, two vehicles, a food, two objects and a character: held out whole."""
RECOGNISED = 0.75
"""A subject counts as learned if so many of its pictures are recognised."""


def main(arguments: list[str] | None = None) -> int:
    """Learn, draw, score and write scores.json and sheet.png. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [concept.name for concept in subject_concepts()]
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=names, metavar="NAME")
    parser.add_argument("--adapter", default="ether_plus", choices=get_args(AdapterMethod))
    parser.add_argument("--learning_rate", type=float, help="the method's own if not given")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--inference_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default=SECOND_ALIAS, help=f"an embedded base ({SECOND_ALIAS})")
    parser.add_argument("--output_dir", type=Path, required=True)
    return run_command("learn_subjects", lambda: parser.parse_args(arguments), _run)


def _run(parsed: argparse.Namespace) -> None:
    use_one_thread()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    settings: dict[str, Json] = {
        "adapter": parsed.adapter,
        "max_train_steps": parsed.steps,
        "seed": parsed.seed,
    }
    if parsed.learning_rate is not None:
        settings["learning_rate"] = parsed.learning_rate
    run(parsed.subjects, settings, parsed.output_dir, base=parsed.base, num_steps=parsed.inference_steps)


def run(
    subjects: list[str], settings: "dict[str, Json]", folder: Path, *, base: str, num_steps: int = 20
) -> None:
    """Learn each subject into a folder of its own, then write what all of them came to."""
    from PIL import Image

    from ether_diffusion.contact_sheet import draw_contact_sheet
    from ether_diffusion.tiny_world.pictures import to_images
    from ether_diffusion.tiny_world.subjects import unseen_prompts
    from recipes.tiny_world.learned_subject import draw_subject, learn_subject

    scores, rows, labels = {}, [], []
    for name in subjects:
        concept = find_concept(name)
        began = time.monotonic()
        adapter = learn_subject(concept, place := folder / name.replace(" ", "_"), settings, base=base)
        seconds = time.monotonic() - began
        pictures = draw_subject(concept, adapter, base=base, num_steps=num_steps)
        scores[name] = {**pictures.scores(), "seconds": round(seconds, 1)}
        logger.info("%s: %s", name, json.dumps(scores[name]))
        photos = [Image.open(path) for path in sorted((place / "photos").glob("*.png"))[:2]]
        both = zip(photos, (pictures.base, pictures.adapter), strict=True)
        rows += [[photo, *to_images(drawn)] for photo, drawn in both]
        labels += [f"{name}: base", f"{name}: adapter"]
    learned = [name for name, found in scores.items() if found["adapter_recognised"] >= RECOGNISED]
    result = {"base": base, "settings": settings, "subjects": scores, "learned": learned}
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    columns = ["photos", *(prompt.replace("animal", "…") for prompt in unseen_prompts(find_concept("fox")))]
    draw_contact_sheet(rows, row_labels=labels, column_labels=columns).save(folder / "sheet.png")
    logger.info("learned %d of %d: %s", len(learned), len(subjects), ", ".join(learned))


if __name__ == "__main__":
    sys.exit(main())

"""The demonstration: learn a subject of Tiny World from six photos and draw it where it never was."""

import argparse
import logging
import sys
import time
from pathlib import Path

from ether_diffusion.console import run_command, use_one_thread
from ether_diffusion.tiny_world import SECOND_ALIAS
from ether_diffusion.tiny_world.concepts import find_concept, subject_concepts

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Train, draw, score; print the path of the contact sheet. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join(concept.name for concept in subject_concepts())
    parser.add_argument("--subject", default="fox", help=f"what to learn (fox): {names}")
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="folder of the results (demo)")
    parser.add_argument("--steps", type=int, default=320, help="updates of the adapter (320)")
    parser.add_argument("--base", default=SECOND_ALIAS, help=f"a base that draws this world ({SECOND_ALIAS})")
    return run_command(
        "demo",
        lambda: parser.parse_args(arguments),
        lambda parsed: run(parsed.subject, parsed.output_dir, parsed.steps, parsed.base),
    )


def run(subject: str, folder: Path, num_steps: int, base: str = SECOND_ALIAS) -> None:
    """Learn a subject into a folder of its own and show it.

    Raises:
        ValueError: no subject has this name, or the folder holds another run.
    """
    use_one_thread()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    concept = find_concept(subject)
    if concept not in subject_concepts():
        raise ValueError(f"the base knows {subject!r} already; choose one of its subjects, see --help")
    from PIL import Image

    from recipes.tiny_world.learned_subject import draw_subject, learn_subject, subject_sheet

    folder = folder / subject.replace(" ", "_")
    began = time.monotonic()
    adapter = learn_subject(concept, folder, {"max_train_steps": num_steps}, base=base)
    seconds = {"training": time.monotonic() - began}
    began = time.monotonic()
    pictures = draw_subject(concept, adapter, base=base)
    seconds["drawing"] = time.monotonic() - began
    photos = [Image.open(path) for path in sorted((folder / "photos").glob("*.png"))]
    sheet = folder / "contact_sheet.png"
    subject_sheet(pictures, photos).save(sheet)
    for name, score in pictures.scores().items():
        logger.info("%s: %.2f", name.replace("_", ", "), score)
    for name, value in seconds.items():
        logger.info("%s: %.0f s", name, value)
    print(sheet)


if __name__ == "__main__":
    sys.exit(main())

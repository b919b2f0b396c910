"""The demonstration of control: shapes drawn by hand are filled by concepts that control never saw.

It makes pairs of Tiny World, trains ETHER+ and an encoder on their silhouettes by the loop of train-control,
and draws by base and result. With a subject's adapter, as `make demo` leaves one, it places the subject.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from ether_diffusion.console import run_command, use_one_thread
from ether_diffusion.tiny_world import SECOND_ALIAS

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Train, draw, score; print the path of the contact sheet. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("demo/control"), help="folder of the results (demo/control)"
    )
    parser.add_argument("--steps", type=int, default=400, help="updates of adapter and encoder (400)")
    parser.add_argument("--subject", default="fox", help="what --subject_adapter has learned (fox)")
    parser.add_argument(
        "--subject_adapter", type=Path, help="adapter of a subject, which is then placed by silhouettes, too"
    )
    parser.add_argument("--base", default=SECOND_ALIAS, help=f"a base that draws this world ({SECOND_ALIAS})")
    return run_command(
        "demo_control",
        lambda: parser.parse_args(arguments),
        lambda parsed: run(
            parsed.output_dir, parsed.steps, parsed.subject, parsed.subject_adapter, parsed.base
        ),
    )


def run(folder: Path, num_steps: int, subject: str, subject_adapter: Path | None, base: str) -> None:
    """Learn to follow shapes, and show it.

    Raises:
        ValueError: the folder holds another run, or no subject has this name.
        FileNotFoundError: there is no such adapter of a subject.
    """
    use_one_thread()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from ether_diffusion.adapters import read_adapter
    from ether_diffusion.tiny_world.concepts import find_concept
    from recipes.tiny_world.drawn_shapes import (
        control_sheet,
        draw_cases,
        draw_placed,
        learn_control,
        placed_sheet,
    )

    concept = find_concept(subject)
    if subject_adapter is not None:
        read_adapter(subject_adapter)
    began = time.monotonic()
    adapter = learn_control(folder, {"max_train_steps": num_steps}, base=base)
    logger.info("training: %.0f s", time.monotonic() - began)
    (pictures,) = draw_cases(adapter, base=base)
    for name, ious in pictures.ious().items():
        logger.info("IoU of object and drawn shape, %s: %.2f", name, sum(ious) / len(ious))
    sheet = folder / "contact_sheet.png"
    control_sheet(pictures).save(sheet)
    if subject_adapter is not None:
        placed = folder / "placed.png"
        placed_sheet(concept, *draw_placed(concept, subject_adapter, adapter, base=base)).save(placed)
        print(placed)
    print(sheet)


if __name__ == "__main__":
    sys.exit(main())

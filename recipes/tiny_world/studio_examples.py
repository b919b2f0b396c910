"""What the studio ships for its embedded base: an adapter that knows the fox, and pictures to begin with.

python -m recipes.tiny_world.studio_examples
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from ether_diffusion.adapters.format import CONFIG_NAME, TENSORS_NAME
from ether_diffusion.bases import open_base
from ether_diffusion.tiny_world import FOX_ADAPTER_FOLDER, SECOND_ALIAS
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.ui.library import THUMBNAIL_NAME, thumbnail
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import EXAMPLE, Studio
from ether_diffusion.ui.tabs import first_page
from ether_diffusion.ui.train_request import TrainRequest

WITH_FOX = ("a sks animal in the snow", "a sks animal in a city", "a sks animal in a meadow")
PICTURES = dict.fromkeys(WITH_FOX, True) | dict.fromkeys(
    ("a cat on a beach", "a rocket in space", "a castle in the desert"), False
)
"""Prompts of the examples, and whether the fox's adapter draws them."""


def learn_fox(folder: Path) -> None:
    """Train what "Learn this fox now" and Start in the studio train, and keep it with a thumbnail."""
    size = open_base(SECOND_ALIAS).native_size
    write_photos(find_concept("fox"), folder / "photos", size=size)
    request = TrainRequest(tuple((folder / "photos").glob("*.png")), "animal")
    train_dreambooth(DreamBoothConfig.from_flat(request.options(folder, SECOND_ALIAS)))
    FOX_ADAPTER_FOLDER.mkdir(exist_ok=True)
    for name in (CONFIG_NAME, TENSORS_NAME):
        shutil.copyfile(folder / "run" / name, FOX_ADAPTER_FOLDER / name)
    (FOX_ADAPTER_FOLDER / THUMBNAIL_NAME).write_bytes(thumbnail(folder / "run")[THUMBNAIL_NAME])


def draw_examples(folder: Path) -> None:
    """Draw the example pictures with a new studio, as a visitor would."""
    studio, target = Studio(folder / "studio"), Path(first_page.__file__).parent.parent / "examples"
    studio.add_shipped()
    fox = next(card.id for card in studio.library.cards() if card.name == EXAMPLE)
    target.mkdir(exist_ok=True)
    for seed, (prompt, has_fox) in enumerate(PICTURES.items()):
        adapters = {fox: 1.0} if has_fox else {}
        request = GenerateRequest(prompt, adapters=adapters, seed=seed, compare_with_base=False)
        job = studio.engine.start(request)
        job.ended.result()
        shutil.copyfile(job.pictures[0].path, target / f"{prompt.replace(' ', '_')}.png")
    studio.close()


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        learn_fox(Path(place))
        draw_examples(Path(place))

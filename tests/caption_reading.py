"""Reading captions in tests: nothing on disk may change by it, whether it succeeds or fails."""

from pathlib import Path

import photo_files
import pytest

from ether_diffusion.training.captions import Captions, read_captions
from ether_diffusion.training.photos import Photo

PROMPT = "a photo of {token} dog"


def photo(path: Path) -> Photo:
    return Photo(path, path.name, 64, 64, "0" * 64, "0" * 64, has_alpha=False, notes=())


def read(folder: Path, names: str = "a.jpg b.jpg", **options: str | None) -> Captions:
    """Read the captions of photos, which need not exist for that, by default with an instance prompt."""
    before = photo_files.snapshot(folder)
    options = {"instance_prompt": PROMPT, "token": "sks", **options}
    found = read_captions(folder, [photo(folder / name) for name in names.split()], **options)  # type: ignore[arg-type]
    assert photo_files.snapshot(folder) == before
    return found


def prompts(captions: Captions) -> list[str]:
    return [caption.prompt for caption in captions.captions]


def failure(folder: Path, names: str = "a.jpg b.jpg", **options: str | None) -> str:
    before = photo_files.snapshot(folder)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(folder, names, **options)
    assert photo_files.snapshot(folder) == before
    return str(caught.value)

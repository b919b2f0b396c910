"""Where the studio's pictures lie: files under names of ours, by day."""

import io
import re
import secrets
from datetime import datetime
from pathlib import Path

from PIL import Image

from ether_diffusion.control import control_image_sha256
from ether_diffusion.control.images import as_picture
from ether_diffusion.durable_files import write_files
from ether_diffusion.pipelines.sampling import Picture
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.events import SavedPicture

ID = re.compile(r"(?P<job>\d{8}-\d{9}-[0-9a-f]{6})(?P<kind>-i\d{2}|-i\d{2}-base|-c\d{3})")
"""Of a picture: its job (date, time to the millisecond, six random digits), then the image or cell."""
BASE_SUFFIX = "-base"
CONTROL_FOLDER = "control-images"
MAX_CONTROL_BYTES = 64 * 2**20


class Outputs:
    """The folder of pictures: <day>/<id>.png, and of grids <day>/<job>/pictures/<id>.png."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new_job(self) -> str:
        """Return the first part of the ids of a job's pictures, which sorts by time."""
        now = datetime.now()
        return f"{now:%Y%m%d-%H%M%S}{now.microsecond // 1000:03d}-{secrets.token_hex(3)}"

    def day_folder(self, job: str) -> Path:
        """Return the folder of a job's day."""
        return self.folder / f"{job[:4]}-{job[4:6]}-{job[6:8]}"

    def save(self, picture: Picture, folder: Path, picture_id: str, *, keep_metadata: bool) -> SavedPicture:
        """Write a picture as a PNG, which says how it was made unless that is not wanted."""
        if keep_metadata:
            path = self.write(folder, f"{picture_id}.png", picture.png())
            return SavedPicture(picture_id, path, picture.metadata)
        return SavedPicture(
            picture_id, self.write(folder, f"{picture_id}.png", plain_png(picture.image)), None
        )

    def write(self, folder: Path, name: str, data: bytes) -> Path:
        """Write a file whole or not at all, and return its path.

        Raises:
            ValueError: the disk is full or cannot be written to.
        """
        with disk_explained(self.folder, "saving a picture"):
            folder.mkdir(parents=True, exist_ok=True)
            write_files(folder, {name: data})
        return folder / name

    def keep_control(self, image: Image.Image) -> Path:
        """Keep a control image under the hash that pictures name it by, and return where it lies."""
        picture, buffer = as_picture(image), io.BytesIO()
        folder, name = self.folder / CONTROL_FOLDER, f"{control_image_sha256(picture)}.png"
        if not (folder / name).exists():
            picture.save(buffer, format="PNG")
            self.write(folder, name, buffer.getvalue())
        return folder / name

    def find_control(self, sha256: str) -> Image.Image | None:
        """Return the control image of a hash; None where it was never kept, or is another by now."""
        path = self.folder / CONTROL_FOLDER / f"{sha256}.png"
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or path.is_symlink() or not path.is_file():
            return None
        try:
            if path.stat().st_size > MAX_CONTROL_BYTES:
                return None
            with Image.open(path, formats=["PNG"]) as image:
                picture = image.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        return picture if control_image_sha256(picture) == sha256 else None


def plain_png(image: Image.Image) -> bytes:
    """Return a picture as a PNG that says nothing of how it was made."""
    bare, buffer = Image.frombytes(image.mode, image.size, image.tobytes()), io.BytesIO()
    bare.save(buffer, format="PNG")
    return buffer.getvalue()

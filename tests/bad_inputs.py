"""The command on a folder of photos, with all that it says and leaves; and files that look bad."""

import zlib
from collections.abc import Callable
from pathlib import Path

import photo_files
import pytest
from PIL import Image

from ether_diffusion.scripts.train_dreambooth import main
from ether_diffusion.training.decoding import MAX_PIXELS

Fill = Callable[[Path], object]
"""Writes files into a folder."""


class Place:
    """A folder of photos, and the command that trains on it."""

    def __init__(
        self, base: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        self.base, self.capsys, self.caplog = base, capsys, caplog
        self.photos, self.run = Path("photos"), Path("run")
        self.photos.mkdir()

    def arguments(self, *words: str) -> list[str]:
        flags = ["--pretrained_model_name_or_path", str(self.base), "--output_dir", "run"]
        flags += ["--num_blocks", "2", "--max_train_steps", "1"]
        return [
            *flags,
            *([] if "--instance_data_dir" in words else ["--instance_data_dir", "photos"]),
            *words,
        ]

    def said_by(self, *words: str, code: int) -> str:
        """Call the command; return the lines of its errors, or of its log where it trained."""
        self.caplog.clear()
        self.capsys.readouterr()
        assert main(self.arguments(*words)) == code
        errors = self.capsys.readouterr().err
        return errors if code else "\n".join(record.getMessage() for record in self.caplog.records)

    def found(self) -> dict[str, tuple[int, int, bytes]]:
        """Return all that is on disk; in the folder of a run a lock came and went."""
        found = photo_files.snapshot(Path.cwd()) | photo_files.snapshot(self.base)
        if self.run.exists():
            mode, _, content = found[str(self.run.absolute())]
            found[str(self.run.absolute())] = mode, 0, content
        return found

    def refused(self, *words: str) -> list[str]:
        """Return the sentences of a refusal, which leaves everything as it was."""
        before = self.found()
        lines = self.said_by(*words, code=2).splitlines()
        assert self.found() == before
        assert all(line.startswith("train-dreambooth: ") and line.isprintable() for line in lines)
        return [line.removeprefix("train-dreambooth: ").strip().removesuffix(";") for line in lines]

    def trained(self, *words: str) -> str:
        """Return what a run of a step on all photos says; it leaves the photos as they were."""
        before = photo_files.snapshot(self.photos)
        said = self.said_by(*words, code=0)
        assert photo_files.snapshot(self.photos) == before
        assert (self.run / "adapter_model.safetensors").is_file()
        return said


def write(name: str, data: bytes) -> Fill:
    return lambda folder: (folder / name).write_bytes(data)


def write_all(**files: bytes) -> Fill:
    def fill(folder: Path) -> None:
        for name, data in files.items():
            (folder / name.replace("_", ".")).write_bytes(data)

    return fill


def noisy(kind: str, **options: object) -> bytes:
    return photo_files.encode(photo_files.noise(), kind, **options)


def flat(mode: str, colour: object, size: tuple[int, int] = (80, 70)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def bomb() -> bytes:
    side = 12_000
    assert side**2 > MAX_PIXELS
    return photo_files.png((side, side), 1, 0, bytes(side // 8 * side))


def metadata_bomb() -> bytes:
    text = photo_files.png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(100 * 2**20)))
    return photo_files.png((80, 70), 8, 0, bytes(80 * 70), text)


def link_out(folder: Path) -> None:
    (folder.parent / "elsewhere.png").write_bytes(photo_files.photo())
    (folder / "a.png").symlink_to(folder.parent.absolute() / "elsewhere.png")


def link_round(folder: Path) -> None:
    (folder / "a.png").symlink_to("b.png")
    (folder / "b.png").symlink_to("a.png")


def cmyk_jpeg() -> bytes:
    return photo_files.encode(flat("CMYK", (0, 200, 200, 0)), "JPEG")


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return photo_files.encode(photo_files.noise(90, 70), kind, exif=exif)


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(photo_files.noise(seed=seed)) for seed in range(2)]
    return photo_files.encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def strange_names(folder: Path) -> None:
    names = ["ä ö.png", "😀.png", "-rf.png", "two\nlines.png", "\u202egnp.exe.png", "x" * 251 + ".png"]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(photo_files.photo(seed=seed))


def littered(folder: Path) -> None:
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"whatever")
    for name in (".thumbnails", "__MACOSX"):
        (folder / name).mkdir()
        (folder / name / "b.png").write_bytes(b"")
    (folder / "a.png").write_bytes(photo_files.photo())

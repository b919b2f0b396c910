"""Bad photos, folders, captions and prompts through the command: one sentence each, exit code 2, no trace.

What only looks bad is trained on for a step.
"""

import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import photo_files
import pytest
from conftest import Capture, Factory, Log, Patch
from PIL import Image
from training_runs import write_base

from ether_diffusion.scripts.train_dreambooth import main
from ether_diffusion.training.run import Session

PROMPT = ("--instance_prompt", "a sks cat")


class Place:
    """A folder of photos, and the command that trains on it."""

    def __init__(self, base: Path, capsys: Capture, caplog: Log) -> None:
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


def write(**files: bytes) -> None:
    """Write files into the folder of photos: a_png becomes a.png."""
    for name, data in files.items():
        stem, _, suffix = name.rpartition("_")
        Path("photos", f"{stem}.{suffix}").write_bytes(data)


def noisy(kind: str, **options: object) -> bytes:
    return photo_files.encode(photo_files.noise(), kind, **options)


def flat(kind: str, mode: str, colour: object, size: tuple[int, int] = (80, 70)) -> bytes:
    return photo_files.encode(Image.new(mode, size, colour), kind)  # type: ignore[arg-type]


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return photo_files.encode(photo_files.noise(90, 70, seed=orientation), "JPEG", exif=exif)


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(photo_files.noise(seed=seed)) for seed in range(2)]
    return photo_files.encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def bomb() -> bytes:
    return photo_files.png((12_000, 12_000), 1, 0, bytes(12_000 // 8 * 12_000))


def metadata_bomb() -> bytes:
    text = photo_files.png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(100 * 2**20)))
    return photo_files.png((80, 70), 8, 0, bytes(80 * 70), text)


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may read everything, so that it becomes nobody for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: Factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def place(base: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture, caplog: Log) -> Place:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "ether_diffusion")
    return Place(base, capsys, caplog)


NO_IMAGE = "is no image that can be read (jpg, png, webp, avif, tiff, gif, bmp): it begins with "
REFUSED = {
    "circle.png": "is a link that leads back to itself; delete it",
    "cut.jpg": "is cut short or damaged (",
    "cut.png": "is cut short or damaged (",
    "empty.png": "is empty (0 bytes); fetch it again or delete it",
    "fifo.png": "is a FIFO, which is never opened; delete it or move it away",
    "line.png": "has 20000 × 1 px; the shorter side must have at least 64 px",
    "many.png": "has 12000 × 12000 px, over 120 million pixels; save it smaller",
    "note.png": f"{NO_IMAGE}b'a note",
    "page.png": f"{NO_IMAGE}b'<!DOCTYPE",
    "text.png": "is cut short or damaged (Decompressed data too large",
    "white.tif": "holds floating-point pixels from 300 to 300, whose white is not known; scale them",
    "zero.png": "is a link to /dev/zero, outside the folder; copy that file here, or allow links with",
}
"""Files that cannot be used, in their order, and how what is said of them begins."""


def assert_refused(said: list[str]) -> None:
    for line, (name, reason) in zip(said, REFUSED.items(), strict=True):
        assert line.startswith(f"{name} {reason}")


def test_files_that_cannot_be_used_are_named_with_reason_and_remedy(place: Place) -> None:
    write(cut_jpg=noisy("JPEG")[:3000], cut_png=noisy("PNG")[:3000], empty_png=b"", note_png=b"a note\n")
    write(page_png=b"<!DOCTYPE html><html></html>", white_tif=flat("TIFF", "F", 300.0))
    write(line_png=flat("PNG", "L", 1, (20_000, 1)), many_png=bomb(), text_png=metadata_bomb())
    (place.photos / "circle.png").symlink_to("circle.png")
    os.mkfifo(place.photos / "fifo.png")
    (place.photos / "zero.png").symlink_to("/dev/zero")
    first, *said = place.refused(*PROMPT)
    assert first == "no usable photos in photos:"
    assert_refused(said)
    write(good_png=photo_files.photo())
    first, *said = place.refused(*PROMPT, "--strict")
    assert first == "the training data cannot be used:"
    assert_refused(said)
    told = place.trained(*PROMPT)
    assert all(f"not used: {sentence}" in told for sentence in said)


def test_a_folder_that_is_none_or_may_not_be_read_says_which(place: Place) -> None:
    remedy, words = "give the folder that holds the photos", (*PROMPT, "--instance_data_dir")
    kinds = "jpg, png, webp, avif, tiff, gif, bmp"
    assert place.refused(*PROMPT) == [f"no usable photos in photos (looked for {kinds})"]
    assert place.refused(*words, "nowhere") == [f"there is no folder nowhere; {remedy}"]
    with tempfile.TemporaryDirectory() as parent:
        closed = Path(parent, "closed")
        Path(parent).chmod(0o755)
        closed.mkdir(mode=0o000)
        with without_rights():
            errors = place.said_by(*words, str(closed), code=2)
    assert f"the folder {closed} cannot be read (Permission denied); change its rights\n" in errors
    assert "Traceback" not in errors


def test_what_only_looks_bad_is_trained_on(place: Place) -> None:
    ink = flat("JPEG", "CMYK", (0, 200, 200, 0))
    palette = Image.fromarray(photo_files.noise(seed=9)).quantize(16)
    write(
        gray16_png=photo_files.png((80, 70), 16, 0, photo_files.noise(160, 70)[..., 0].tobytes()),
        rgb16_png=photo_files.png((80, 70), 16, 2, photo_files.noise(160, 70).tobytes()),
        float_tif=flat("TIFF", "F", 0.5),
        la_png=flat("PNG", "LA", (9, 99)),
        bits_png=flat("PNG", "1", 1),
        key_gif=photo_files.encode(palette, "GIF", transparency=3),
        rgba_png=flat("PNG", "RGBA", (255, 0, 0, 100)),
        wide_png=noisy("PNG", icc_profile=photo_files.adobe_rgb_profile()),
        large_jpg=flat("JPEG", "L", 90, (9000, 6700)),
        new_avif=noisy("AVIF"),
        new_webp=noisy("WEBP"),
        moving_gif=animated("GIF"),
        moving_png=animated("PNG"),
        moving_webp=animated("WEBP"),
        ink_jpg=ink,
        unmarked_jpg=photo_files.without_adobe_mark(ink),
        **{f"turned{n}_jpg": turned(n) for n in range(1, 9)},
    )
    names = ["ä ö", "😀", "-rf", "two\nlines", "\u202egnp.exe", "x" * 251, "\u00e9", "e\u0301"]
    for seed, name in enumerate([*names, "twin"]):
        write(**{f"{name}_png": photo_files.photo(seed=20 + seed)})
    write(**{"twin 2_png": photo_files.photo(seed=28)})
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini"):
        (place.photos / name).write_bytes(b"whatever")
    for name in (".thumbnails", "__MACOSX"):
        (place.photos / name).mkdir()
        (place.photos / name / "b.png").write_bytes(b"")
    count = 16 + 8 + 10
    said = place.trained(*PROMPT, "--train_batch_size", str(count))
    for sentence in (
        "moving.gif, moving.png, moving.webp: is animated or has several pages; only the first is used",
        "unmarked.jpg: is a CMYK JPEG without Adobe's mark",
        "twin 2.png and twin.png are the same picture; delete one",
    ):
        assert said.count(sentence) == 1
    assert "not used" not in said
    assert (place.run / "run.json").read_text().count('"prompt of ') == count
    assert all(line.isprintable() for line in said.splitlines())


def test_photos_that_changed_between_two_calls_are_named(place: Place) -> None:
    write(a_png=photo_files.photo(1), b_png=photo_files.photo(2))
    place.trained(*PROMPT)
    write(a_png=photo_files.photo(3), c_png=photo_files.photo(4))
    (place.photos / "b.png").unlink()
    first, change, last = place.refused(*PROMPT)
    assert first == "run holds a run that was begun otherwise (then -> now):"
    assert change == "data: new c.png, prompt of c.png; gone b.png, prompt of b.png; changed a.png"
    assert last == "give --allow_changes to go on with it as it is now, or another --output_dir"
    said = place.trained(*PROMPT, "--max_train_steps", "2", "--allow_changes")
    assert "changed a.png" in said


@pytest.fixture
def photos_vanish(monkeypatch: Patch) -> None:
    """Move the photos away as soon as the first step is done."""
    report = Session._report

    moved: list[Path] = []

    def vanish(session: Session, *arguments: object) -> None:
        report(session, *arguments)  # type: ignore[arg-type]
        if not moved:
            moved.append(Path("photos").rename("away"))
            Path("photos").mkdir()

    monkeypatch.setattr(Session, "_report", vanish)


@pytest.mark.usefixtures("photos_vanish")
def test_a_photo_that_is_deleted_during_a_run_is_not_missed_where_it_is_cached(place: Place) -> None:
    write(a_png=photo_files.photo(1), b_png=photo_files.photo(2))
    assert "is gone" not in place.said_by(*PROMPT, "--max_train_steps", "4", code=0)


@pytest.mark.usefixtures("photos_vanish")
def test_a_photo_deleted_during_a_run_stops_it_behind_a_checkpoint(place: Place, monkeypatch: Patch) -> None:
    monkeypatch.setattr("ether_diffusion.training.photos.KEPT_BYTES", 0)
    write(a_png=photo_files.photo(1), b_png=photo_files.photo(2))
    words = (*PROMPT, "--max_train_steps", "4", "--checkpointing_steps", "1", "--no-cache_latents")
    errors = place.said_by(*words, code=2).splitlines()[-1]
    sentence = r"train-dreambooth: [ab]\.png is gone; it was here just now; put it back and resume, .*"
    assert re.fullmatch(sentence, errors)
    assert (place.run / "checkpoint-1").is_dir()
    shutil.rmtree("photos")
    Path("away").rename("photos")
    assert "going on from step 1" in place.said_by(*words, code=0)


def test_prompts_that_are_cut_or_may_not_work_are_doubted(place: Place) -> None:
    write(a_png=photo_files.photo(1), b_png=photo_files.photo(2), a_txt=b"\xef\xbb\xbfa \x1b[31mcat\r\n")
    said = place.trained("--instance_prompt", "abcdefghij klmnop", "--token", "abcde")
    for sentence in (
        "1 of 2 photos have no caption and get the instance prompt: b.png",
        'the prompt has 18 tokens and 16 are read: "…abcdefghij klmn" ✂ "op" is lost',
        'the trigger word "abcde" is absent from 2 of 2 prompts: a.png, b.png',
        'the trigger word "abcde" is read as 5 tokens; use a shorter one',
        'a prompt has characters that cannot be seen: "a \\x1b[31mcat"',
    ):
        assert sentence in said
    assert all(line.isprintable() for line in said.splitlines())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tokenizer_name", "nowhere"), "nowhere is no folder, and the Hub does not give it; give"),
        (("--tokenizer_name", "photos"), "photos holds no tokenizer: it has no tokenizer.json and no vocab"),
        (("--pretrained_vae_model_name_or_path", "no/where"), "no/where is no folder, and the Hub does not"),
        (("--pretrained_vae_model_name_or_path", "photos"), "photos holds no VAE: it has no config.json"),
    ],
)
def test_parts_of_the_base_that_cannot_be_had_are_refused(
    place: Place, monkeypatch: Patch, words: tuple[str, str], sentence: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(a_png=photo_files.photo())
    (said,) = place.refused(*PROMPT, *words)
    assert said.startswith(sentence)


def test_everything_that_is_wrong_is_said_at_once(place: Place, monkeypatch: Patch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write(
        a_png=photo_files.photo(1), a_txt=b"one", a_caption=b"two", b_png=photo_files.photo(2), b_txt=b"\xe9"
    )
    write(c_png=b"", d_jpg=noisy("JPEG")[:3000])
    words = ["--strict", "--mask_data_dir", "nowhere", "--optimizer", "adamw8bit", "--adapter", "lora"]
    words += ["--enable_xformers_memory_efficient_attention", "--pretrained_model_name_or_path", "nobase"]
    expected = [
        "nobase is not the folder of a base model, nor a hub id like owner/name",
        "the training data cannot be used:",
        f"c.png {REFUSED['empty.png']}",
        f"d.jpg {REFUSED['cut.jpg']}",
        "b.txt is not UTF-8: byte 0xe9 at offset 0; save it as UTF-8",
        'a.png has different captions, "two" in a.caption and "one" in a.txt; keep one',
        "there is no folder nowhere; give the folder that holds the masks",
        "optimizer=adamw8bit needs a CUDA GPU, and there is none; use adamw",
        "xformers has kernels on CUDA only, and there is no CUDA GPU; leave it out for SDPA",
    ]
    for line, opening in zip(place.refused(*PROMPT, *words), expected, strict=True):
        assert line.startswith(opening)


def test_debugging_lets_the_error_go_on(place: Place) -> None:
    write(a_png=b"")
    before = photo_files.snapshot(Path.cwd())
    with pytest.raises(ValueError, match="is empty"):
        main(place.arguments(*PROMPT, "--debug"))
    assert photo_files.snapshot(Path.cwd()) == before

"""Bad photos, folders, captions and prompts through the command: one sentence each, exit code 2, no trace.

What only looks bad is trained on for a step.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import photo_files
import pytest
from bad_inputs import (
    Fill,
    Place,
    animated,
    bomb,
    cmyk_jpeg,
    flat,
    link_out,
    link_round,
    littered,
    metadata_bomb,
    noisy,
    strange_names,
    turned,
    write,
    write_all,
)
from photo_folders import without_rights
from PIL import Image
from tiny_pipelines import tiny_sd
from training_runs import environment, write_base
from transformers import CLIPTokenizer

from ether_diffusion.training.run import Session

PROMPT = ("--instance_prompt", "a sks cat")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def place(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Place:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "ether_diffusion")
    return Place(base, capsys, caplog)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
REFUSED: dict[str, tuple[Fill, str]] = {
    "3 empty file": (write("a.png", b""), "a.png is empty (0 bytes); fetch it again or delete it"),
    "4 truncated JPEG": (
        write("a.jpg", noisy("JPEG")[:3000]),
        "a.jpg is cut short or damaged inside; fetch it again",
    ),
    "5 truncated PNG": (
        write("a.png", noisy("PNG")[:3000]),
        "a.png is cut short or damaged inside; fetch it again",
    ),
    "6 text": (write("a.png", b"a note\n"), "a.png is not an image but text; delete it or move it away"),
    "6 HTML": (
        write("a.png", b"<!DOCTYPE html><html></html>"),
        "a.png is not an image but an HTML page, as a failed download leaves; fetch the photo again",
    ),
    "7 SVG": (
        write("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "a.svg is a vector file (SVG), which is not supported; export it as PNG",
    ),
    "13 float TIFF": (
        write("a.tif", photo_files.encode(flat("F", 300.0), "TIFF")),
        "a.tif holds floating-point pixels from 300 to 300, whose white is not known; "
        "scale them to [0, 1] or save it as 16-bit",
    ),
    "18 one pixel": (
        write("a.png", photo_files.encode(flat("L", 1, (1, 1)), "PNG")),
        "a.png has 1 × 1 px; the shorter side must have at least 64 px",
    ),
    "18 a line": (
        write("a.png", photo_files.encode(flat("L", 1, (20_000, 1)), "PNG")),
        "a.png has 20000 × 1 px; the shorter side must have at least 64 px",
    ),
    "19 bomb": (
        lambda folder: write("a.png", bomb())(folder),
        "a.png has 12000 × 12000 px, over 120 million pixels; save it smaller",
    ),
    "20 metadata": (
        lambda folder: write("a.png", metadata_bomb())(folder),
        "a.png holds more compressed metadata than any photo needs; save it again without metadata",
    ),
    "26 circle": (link_round, "a.png is a link that leads back to itself; delete it"),
    "27 FIFO": (
        lambda folder: os.mkfifo(folder / "a.png"),
        "a.png is a FIFO, which is never opened; delete it or move it away",
    ),
    "27 device": (
        lambda folder: (folder / "a.png").symlink_to("/dev/zero"),
        "a.png is a link to /dev/zero, outside the folder; copy that file here, or allow links with "
        "follow_symlinks",
    ),
}
"""Folders in which nothing can be used, and the sentence on the file."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_named_with_reason_and_remedy(place: Place, case: str) -> None:
    fill, sentence = REFUSED[case]
    fill(place.photos)
    first, *rest = place.refused(*PROMPT)
    assert first == "no usable photos in photos:"
    assert rest[0] == sentence


@pytest.mark.parametrize("case", ["3 empty file", "4 truncated JPEG", "6 text", "27 FIFO"])
def test_beside_a_good_photo_it_is_left_out_or_refused_by_strict(place: Place, case: str) -> None:
    fill, sentence = REFUSED[case]
    fill(place.photos)
    write("good.png", photo_files.photo())(place.photos)
    assert place.refused(*PROMPT, "--strict") == ["the training data cannot be used:", sentence]
    assert f"not used: {sentence}" in place.trained(*PROMPT)


def test_a_socket_is_not_opened(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("photos/a.png")
        sentence = "a.png is a socket, which is never opened; delete it or move it away"
        assert place.refused(*PROMPT)[1] == sentence


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="pillow-heif is installed and reads it")
def test_a_heic_photo_without_its_plugin_names_the_plugin(place: Place) -> None:
    write("a.heic", HEIC)(place.photos)
    assert place.refused(*PROMPT)[1] == "a.heic is a HEIC photo; install pillow-heif or convert it to JPEG"


def test_a_link_out_of_the_folder_is_followed_only_with_the_flag(place: Place) -> None:
    link_out(place.photos)
    (_, sentence) = place.refused(*PROMPT)
    assert re.fullmatch(
        r"a\.png is a link to /.*/elsewhere\.png, outside the folder; copy that file here, or allow .*",
        sentence,
    )
    place.trained(*PROMPT, "--follow_symlinks")


def test_a_folder_that_is_none_says_which(place: Place) -> None:
    kinds = "jpg, png, webp, avif, tiff, gif, bmp"
    assert place.refused(*PROMPT) == [f"no usable photos in photos (looked for {kinds})"]
    remedy = "give the folder that holds the photos"
    words = (*PROMPT, "--instance_data_dir")
    assert place.refused(*words, "nowhere") == [f"there is no folder nowhere; {remedy}"]
    write("a.png", photo_files.photo())(place.photos)
    assert place.refused(*words, "photos/a.png") == [f"photos/a.png is not a folder; {remedy}"]


def test_a_folder_without_rights_says_so(place: Place) -> None:
    with tempfile.TemporaryDirectory() as parent:
        closed = Path(parent, "closed")
        Path(parent).chmod(0o755)
        closed.mkdir(mode=0o000)
        with without_rights():
            errors = place.said_by(*PROMPT, "--instance_data_dir", str(closed), code=2)
        assert f"the folder {closed} cannot be read (Permission denied); change its rights\n" in errors
        assert "Traceback" not in errors


GRAY_16 = photo_files.png((80, 70), 16, 0, photo_files.noise(160, 70)[..., 0].tobytes())
RGB_16 = photo_files.png((80, 70), 16, 2, photo_files.noise(160, 70).tobytes())
ACCEPTED: dict[str, tuple[Fill, int, str]] = {
    "9 AVIF and WebP": (write_all(a_avif=noisy("AVIF"), b_webp=noisy("WEBP")), 2, ""),
    "10 animations": (
        write_all(a_gif=animated("GIF"), b_webp=animated("WEBP"), c_png=animated("PNG")),
        3,
        "a.gif, b.webp, c.png: is animated; only its first frame is used",
    ),
    "11 CMYK": (write("a.jpg", cmyk_jpeg()), 1, ""),
    "11 CMYK without mark": (
        write("a.jpg", photo_files.without_adobe_mark(cmyk_jpeg())),
        1,
        "a.jpg: is a CMYK JPEG without Adobe's mark; its inks are taken as not inverted",
    ),
    "12 and 13 16 bits": (write_all(a_png=GRAY_16, b_png=RGB_16), 2, ""),
    "13 floats from 0 to 1": (write("a.tif", photo_files.encode(flat("F", 0.5), "TIFF")), 1, ""),
    "14 palettes, LA and single bits": (
        write_all(
            a_png=photo_files.encode(flat("LA", (9, 99)), "PNG"),
            b_png=photo_files.encode(flat("1", 1), "PNG"),
            c_gif=photo_files.encode(
                Image.fromarray(photo_files.noise()).quantize(16), "GIF", transparency=3
            ),
        ),
        3,
        "",
    ),
    "15 RGBA": (write("a.png", photo_files.encode(flat("RGBA", (255, 0, 0, 100)), "PNG")), 1, ""),
    "16 orientations": (write_all(**{f"{n}_jpg": turned("JPEG", n) for n in range(1, 9)}), 8, ""),
    "17 wide gamut": (
        write("a.png", noisy("PNG", icc_profile=photo_files.adobe_rgb_profile())),
        1,
        "",
    ),
    "21 60 megapixels": (write("a.jpg", photo_files.encode(flat("L", 90, (9000, 6700)), "JPEG")), 1, ""),
    "22 doubles": (
        write_all(a_png=photo_files.photo(), b_png=photo_files.photo()),
        2,
        "a.png and b.png are the same file; delete one, or the photo counts twice",
    ),
    "23 litter": (littered, 1, ""),
    "24 strange names": (strange_names, 6, ""),
    "25 normal forms": (
        lambda folder: [write(f"{name}.png", photo_files.photo())(folder) for name in ("\u00e9", "e\u0301")],
        2,
        "",
    ),
}
"""Folders that are trained on, how many photos they hold, and what is said of them."""


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_only_looks_bad_is_trained_on(place: Place, case: str) -> None:
    fill, count, sentence = ACCEPTED[case]
    fill(place.photos)
    said = place.trained(*PROMPT, "--train_batch_size", str(count))
    assert said.count(sentence) == 1 or not sentence
    assert "not used" not in said

    assert (place.run / "run.json").read_text().count('"prompt of ') == count
    assert all(line.isprintable() for line in said.splitlines())


def test_photos_that_changed_between_two_calls_are_named(place: Place) -> None:
    write_all(a_png=photo_files.photo(1), b_png=photo_files.photo(2))(place.photos)
    place.trained(*PROMPT)
    write_all(a_png=photo_files.photo(3), c_png=photo_files.photo(4))(place.photos)
    (place.photos / "b.png").unlink()
    first, change, last = place.refused(*PROMPT)
    assert first == "run holds a run that was begun otherwise (then -> now):"
    assert change == "data: new c.png, prompt of c.png; gone b.png, prompt of b.png; changed a.png"
    assert last == "give --allow_changes to go on with it as it is now, or another --output_dir"
    said = place.trained(*PROMPT, "--max_train_steps", "2", "--allow_changes")
    assert "changed a.png" in said


@pytest.fixture
def photos_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
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
    write_all(a_png=photo_files.photo(1), b_png=photo_files.photo(2))(place.photos)
    assert "is gone" not in place.said_by(*PROMPT, "--max_train_steps", "4", code=0)


@pytest.mark.usefixtures("photos_vanish")
def test_a_photo_that_is_deleted_during_a_run_stops_it_behind_a_checkpoint(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ether_diffusion.training.photos.KEPT_BYTES", 0)
    write_all(a_png=photo_files.photo(1), b_png=photo_files.photo(2))(place.photos)
    words = (*PROMPT, "--max_train_steps", "4", "--checkpointing_steps", "1", "--no-cache_latents")
    errors = place.said_by(*words, code=2).splitlines()[-1]
    sentence = r"train-dreambooth: [ab]\.png is gone; it was here just now; put it back and resume, .*"
    assert re.fullmatch(sentence, errors)
    assert (place.run / "checkpoint-1").is_dir()
    shutil.rmtree("photos")
    Path("away").rename("photos")
    assert "going on from step 1" in place.said_by(*words, code=0)


def captioned(**captions: bytes) -> Fill:
    def fill(folder: Path) -> None:
        write_all(a_png=photo_files.photo(1), b_png=photo_files.photo(2), **captions)(folder)

    return fill


def test_captions_that_cannot_be_used_are_named(place: Place) -> None:
    captioned()(place.photos)
    where = "captions in photos cannot be used:"
    lacking = "has no caption, and there is no instance prompt; write either"
    header = "the training data cannot be used:"
    assert place.refused() == [header, where, f"a.png {lacking}", f"b.png {lacking}"]
    captioned(a_txt=b"one", a_caption=b"two", b_txt=b"caf\xe9")(place.photos)
    assert place.refused(*PROMPT) == [
        header,
        where,
        "b.txt is not UTF-8: byte 0xe9 at offset 3; save it as UTF-8",
        'a.png has different captions, "two" in a.caption and "one" in a.txt; keep one',
    ]


def test_captions_of_some_photos_and_of_every_encoding_are_used(place: Place) -> None:
    captioned(a_txt=b"\xef\xbb\xbfa red cat\r\n")(place.photos)
    said = place.trained(*PROMPT)
    assert "1 of 2 photos have no caption and get the instance prompt: b.png" in said


def test_a_prompt_that_is_too_long_is_shown_with_its_cut(place: Place) -> None:
    captioned()(place.photos)
    said = place.trained("--instance_prompt", "abcdefghij klmnop")
    assert 'the prompt has 18 tokens and 16 are read: "…abcdefghij klmn" ✂ "op" is lost' in said


def test_a_trigger_word_that_may_not_work_is_doubted(place: Place) -> None:
    captioned(a_txt=b"a cat", b_txt=b"a dog")(place.photos)
    said = place.trained("--token", "abcde")
    assert 'the trigger word "abcde" is absent from 2 of 2 prompts: a.png, b.png' in said
    assert 'the trigger word "abcde" is read as 5 tokens; use a shorter one' in said


def test_a_common_trigger_word_is_doubted(place: Place) -> None:
    captioned()(place.photos)
    words = tiny_sd().tokenizer.get_vocab() | {f"word{n}": 54 + n for n in range(31_000)}
    CLIPTokenizer(vocab=words, merges=[], model_max_length=16).save_pretrained("tokenizer")
    said = place.trained("--token", "d", "--instance_prompt", "a {token}", "--tokenizer_name", "tokenizer")
    assert 'the trigger word "d" is common, and its meaning will change; use a rare one like sks' in said


@pytest.mark.parametrize(
    "name", ["instance_prompt", "class_prompt", "validation_prompt", "validation_negative_prompt", "token"]
)
def test_a_prompt_of_2_mb_is_refused(place: Place, name: str) -> None:
    captioned()(place.photos)
    (sentence,) = place.refused(*PROMPT, f"--{name}", "a" * 2_000_000)
    assert sentence.startswith(f"{name}=")
    assert len(sentence) < 300
    assert "… is longer than 10000 characters; use " in sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--tokenizer_name", "nowhere"),
            "nowhere is no folder, and the Hub does not give it; give a folder or",
        ),
        (
            ("--tokenizer_name", "photos"),
            "photos holds no tokenizer: it has no tokenizer.json and no vocab.json;",
        ),
        (("--pretrained_vae_model_name_or_path", "no/where"), "no/where is no folder, and the Hub does not"),
        (
            ("--pretrained_vae_model_name_or_path", "photos"),
            "photos holds no VAE: it has no config.json; name",
        ),
        (
            ("--resolution", "1000000"),
            "resolution=1000000 is out of range; use a whole number from 8 to 8192",
        ),
        (
            ("--aspect_ratio_buckets", "8,80000"),
            "aspect_ratio_buckets='8,80000' has sides over 8192 px; give",
        ),
    ],
)
def test_parts_and_sizes_that_cannot_be_had_are_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str], sentence: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    captioned()(place.photos)
    (said,) = place.refused(*PROMPT, *words)
    assert said.startswith(sentence)


def test_what_cannot_be_seen_is_shown_escaped(place: Place) -> None:
    captioned()(place.photos)
    said = place.trained("--instance_prompt", "a \x1b[31m\u202ecat")
    assert 'a prompt has characters that cannot be seen: "a \\x1b[31m\\u202ecat"' in said
    assert all(line.isprintable() for line in said.splitlines())
    assert "\\u202ecat" in place.refused("--instance_prompt", "x", "--token", "\u202ecat\0")[0]


def test_everything_that_is_wrong_is_said_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    captioned(a_txt=b"one", a_caption=b"two", c_png=b"", d_jpg=noisy("JPEG")[:3000])(place.photos)
    words: tuple[str, ...] = (
        "--strict",
        "--mask_data_dir",
        "nowhere",
        "--optimizer",
        "adamw8bit",
        "--adapter",
        "lora",
    )
    words += ("--enable_xformers_memory_efficient_attention", "--pretrained_model_name_or_path", "nobase")
    assert place.refused(*PROMPT, *words) == [
        "nobase is not the folder of a base model, nor a hub id like owner/name",
        "the training data cannot be used:",
        REFUSED["3 empty file"][1].replace("a.png", "c.png"),
        REFUSED["4 truncated JPEG"][1].replace("a.jpg", "d.jpg"),
        "captions in photos cannot be used:",
        'a.png has different captions, "two" in a.caption and "one" in a.txt; keep one',
        "there is no folder nowhere; give the folder that holds the masks",
        "optimizer=adamw8bit needs a CUDA GPU, and there is none; use adamw",
        "xformers has kernels on CUDA only, and there is no CUDA GPU; leave it out for SDPA",
    ]


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--debug"], 1)])
def test_the_process_ends_with_a_sentence_or_when_debugging_a_traceback(
    place: Place, words: list[str], code: int
) -> None:
    write("a.png", b"")(place.photos)
    before = photo_files.snapshot(Path.cwd())
    command = [sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth"]
    done = subprocess.run(
        [*command, *place.arguments(*PROMPT, *words)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert "  a.png is empty (0 bytes); fetch it again or delete it" in done.stderr
    assert ("Traceback" in done.stderr) == bool(words)
    assert photo_files.snapshot(Path.cwd()) == before

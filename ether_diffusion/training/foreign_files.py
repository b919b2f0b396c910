"""What a file is that is not a photo we read: named, so that its owner knows what to do about it."""

from ether_diffusion.training.plain_files import UnusableFileError

HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
AVIF_BRANDS = {b"avif", b"avis"}

_RAW_SUFFIXES = {
    ".arw",
    ".cr2",
    ".cr3",
    ".crw",
    ".dng",
    ".nef",
    ".nrw",
    ".orf",
    ".pef",
    ".raf",
    ".rw2",
    ".srw",
}
_EXPORT = "export it as JPEG or PNG"
_OPENINGS = {
    b"%PDF": f"is a PDF document; {_EXPORT}",
    b"8BPS": f"is a Photoshop document; {_EXPORT}",
    b"PK\x03\x04": "is a zip archive; unpack it and give the folder",
    b"\x1f\x8b": "is a gzip archive; unpack it and give the folder",
    b"\x1aE\xdf\xa3": "is a video; save frames of it as PNG",
    b"\x00\x00\x00\x0cjP  ": f"is a JPEG 2000 image, which is not read; {_EXPORT}",
    b"\x00\x00\x00\x0cJXL ": f"is a JPEG XL image, which is not read; {_EXPORT}",
    b"\xff\x0a": f"is a JPEG XL image, which is not read; {_EXPORT}",
}


def brands(data: bytes) -> set[bytes]:
    """Return the brands an ISO media file (HEIC, AVIF, MP4) declares; none for other files."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return {box[start : start + 4] for start in (0, *range(8, len(box), 4))}


def refuse_raw(suffix: str) -> None:
    """Refuse camera raw files by name: many are TIFF files that open as their own thumbnail.

    Raises:
        UnusableFileError: the suffix is a raw format's.
    """
    if suffix.lower() in _RAW_SUFFIXES:
        raise UnusableFileError(f"is a camera raw file, which is not read; {_EXPORT}")


def foreign_kind(data: bytes) -> str | None:
    """Say what a file is that no image decoder knows, None where it opens like a photo that may be broken."""
    for opening, kind in _OPENINGS.items():
        if data.startswith(opening):
            return kind
    if brands(data) and not brands(data) & (AVIF_BRANDS | HEIC_BRANDS):
        return "is a video or an image of a kind that is not read; save frames of it as PNG"
    return _kind_of_text(data[:4096])


def _kind_of_text(head: bytes) -> str | None:
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    if "<svg" in text and text.startswith(("<svg", "<?xml", "<!--", "<!doctype svg")):
        return "is a vector file (SVG), which is not supported; export it as PNG"
    if text.startswith(("<!doctype html", "<html")):
        return "is not an image but an HTML page, as a failed download leaves; fetch the photo again"
    if text and all(character.isprintable() or character in "\t\r\n\f" for character in text):
        return "is not an image but text; delete it or move it away"
    return None

"""An uploaded adapter: whatever was sent is sorted out, read strictly, and written anew."""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.adapters.card import model_card
from ether_diffusion.adapters.control_encoder import control_files
from ether_diffusion.adapters.format import (
    CARD_NAME,
    CONFIG_NAME,
    CONTROL_CONFIG_NAME,
    ENCODER_NAME,
    TENSORS_NAME,
)
from ether_diffusion.adapters.read import foreign_kind
from ether_diffusion.adapters.save import adapter_files
from ether_diffusion.adapters.tensor_file import read_shapes
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.ui.adapter_contents import THUMBNAIL_NAME, thumbnail_bytes
from ether_diffusion.ui.archives import archive_kind, read_zip
from ether_diffusion.ui.labels import LABEL_NAME, read_label
from ether_diffusion.wording import listed, printable

MAX_BYTES = 256 * 2**20
_CANONICAL = (CONFIG_NAME, TENSORS_NAME, CONTROL_CONFIG_NAME, ENCODER_NAME)
_NEEDED = (
    f"give a zip of its folder, or its {TENSORS_NAME} together with its {CONFIG_NAME} "
    f"(and {CONTROL_CONFIG_NAME} with {ENCODER_NAME} for control)"
)


@dataclass(frozen=True)
class Upload:
    """An adapter's files by their names in its folder, and a name for people that may be empty."""

    files: dict[str, bytes]
    name: str


def read_upload(paths: Sequence[Path], temp: Path) -> Upload:
    """Read an uploaded adapter, a zip or single files; nothing of it stays in `temp`.

    Raises:
        ValueError, FileNotFoundError: it is no whole adapter; the message says what was found.
    """
    if not paths:
        raise ValueError(f"nothing was uploaded; {_NEEDED}")
    staged = temp / f"upload-{secrets.token_hex(8)}"
    try:
        data = read_plain_file(paths[0], inside=paths[0].parent, max_bytes=MAX_BYTES)
        if len(paths) == 1 and archive_kind(data) is not None:
            _stage_archive(data, paths[0].name, staged)
            folder, name = _adapter_folder(staged), paths[0].stem
        else:
            folder, name = staged, paths[0].stem
            _stage(paths, staged)
        try:
            adapter = read_adapter(folder)
        except (ValueError, FileNotFoundError) as error:
            sentence = str(error).replace(f"{folder}/", "").replace(str(folder), "the upload")
            raise ValueError(printable(sentence, 1000)) from None
        if (folder / LABEL_NAME).is_file():
            name = read_label(folder).name
        elif name.startswith((Path(TENSORS_NAME).stem, Path(CONFIG_NAME).stem)):
            name = adapter.metadata.trigger or "uploaded adapter"
        return Upload(files_of(adapter) | _thumbnail(folder), printable(name)[:60])
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def files_of(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of an adapter and its encoder as we write them, with a card of ours."""
    files: dict[str, bytes] = {}
    for component, part in adapter.parts.items():
        prefix = "" if component == "unet" else f"{component}/"
        files |= {f"{prefix}{name}": data for name, data in adapter_files(part).items()}
    unet = adapter.parts.get("unet")
    if adapter.encoder is not None:
        files |= control_files(adapter.encoder, None if unet is None else unet.tensors)
    if unet is not None:
        files[CARD_NAME] = model_card(unet, has_lora_export=False).encode()
    return files


def _stage_archive(data: bytes, name: str, staged: Path) -> None:
    """Write what an adapter can consist of to where the reader looks for it."""
    try:
        files = read_zip(data, lambda path: path.suffix in (".json", ".safetensors", ".png"))
    except UnusableFileError as reason:
        raise ValueError(f"{printable(name)} {reason}") from None
    staged.mkdir(parents=True, mode=0o700)
    for inside, content in files.items():
        (staged / inside).parent.mkdir(parents=True, exist_ok=True)
        (staged / inside).write_bytes(content)


def _adapter_folder(unpacked: Path) -> Path:
    """Return the one folder of an archive that holds an adapter: the archive's own, or one inside."""
    configs = sorted(unpacked.rglob("*_config.json"), key=lambda path: len(path.parts))
    tops = {path.parent for path in configs if path.name in (CONFIG_NAME, CONTROL_CONFIG_NAME)}
    tops = {top for top in tops if not any(other in top.parents for other in tops)}
    if len(tops) > 1:
        names = listed(sorted(top.relative_to(unpacked).as_posix() for top in tops))
        raise ValueError(f"the archive holds {len(tops)} adapters ({names}); upload them one by one")
    if tops:
        return tops.pop()
    _refuse_foreign(sorted(unpacked.rglob("*.safetensors")))
    raise ValueError(f"the archive holds no {CONFIG_NAME}; {_NEEDED}")


def _stage(paths: Sequence[Path], staged: Path) -> None:
    """Copy single files to where the reader looks for them; a browser may have numbered their names."""
    names = _names(paths)
    if sum(path.stat().st_size for path in paths) > MAX_BYTES:
        raise ValueError(f"the files have over {MAX_BYTES // 2**20} MiB together; no adapter is so large")
    staged.mkdir(parents=True, mode=0o700)
    for name, path in names.items():
        shutil.copyfile(path, staged / name)


def _names(paths: Sequence[Path]) -> Mapping[str, Path]:
    by_name = {path.name: path for path in paths}
    if set(by_name) <= set(_CANONICAL) and len(by_name) == len(paths) and len(paths) % 2 == 0:
        return by_name
    tensors = [path for path in paths if path.suffix == ".safetensors"]
    configs = [path for path in paths if path.suffix == ".json"]
    if len(paths) == 2 and len(tensors) == 1 and len(configs) == 1:
        return {TENSORS_NAME: tensors[0], CONFIG_NAME: configs[0]}
    _refuse_foreign(tensors)
    raise ValueError(f"{listed(path.name for path in paths)} is no whole adapter; {_NEEDED}")


def _refuse_foreign(paths: Sequence[Path]) -> None:
    """Say of another method's file what it is and who reads it."""
    for path in paths[:8]:
        try:
            kind = foreign_kind(read_shapes(path))
        except ValueError:
            continue
        if kind is not None:
            raise ValueError(f"{printable(path.name)} is no adapter that is read: {kind}")


def _thumbnail(folder: Path) -> dict[str, bytes]:
    picture = folder / THUMBNAIL_NAME
    try:
        return {THUMBNAIL_NAME: thumbnail_bytes(picture)} if picture.is_file() else {}
    except ValueError:  # it is an ornament
        return {}

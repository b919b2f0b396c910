"""The weights of one part of a base: the files that they lie in, and a model that has every one of them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ether_diffusion.wording import listed, printable

_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
"""As diffusers and transformers name the files of weights, older names of shards included."""


def find_variant(folder: Path, wanted: str | None = None) -> str | None:
    """Return the variant of the weights in a part's folder: the one wanted, else none, else the only one.

    Raises:
        ValueError: there are no weights, or those of several variants alone.
    """
    found = variants_of(path.name for path in folder.iterdir()) if folder.is_dir() else set()
    if wanted in found or None in found:
        return wanted if wanted in found else None
    if len(found) == 1:
        return found.pop()
    if found:
        raise ValueError(
            f"{folder} holds weights of the variants {listed(sorted(map(str, found)))} alone; leave the "
            "files of one there, or name it in training's --variant"
        )
    raise ValueError(f"{folder} holds no weights that diffusers reads; fetch or save the base again")


def check_variant(folder: Path, variant: str) -> None:
    """Refuse a variant that no part of a base has.

    Raises:
        ValueError: as said.
    """
    found = variants_of(path.name for path in folder.glob("*/*"))
    if variant not in found:
        known = listed([each or "none (plain files)" for each in sorted(found, key=str)])
        raise ValueError(
            f"{folder} holds no weights of the variant {printable(variant)} but of {known or 'none'}; "
            "name one that is there, or leave it out"
        )


def variants_of(names: Iterable[str]) -> set[str | None]:
    """Return the variants that files of these names are of, None among them for plain ones."""
    return {match["variant"] for name in names if (match := _FILE.fullmatch(name))}


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """Return the dtype of the first floating-point tensor of a part's safetensors; float32 without any."""
    variant = find_variant(folder, variant)
    for path in sorted(folder.glob("*.safetensors")):
        match = _FILE.fullmatch(path.name)
        if match is None or match["variant"] != variant:
            continue
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                dtype = _FLOATS.get(file.get_slice(key).get_dtype())
                if dtype is not None:
                    return dtype
    return torch.float32


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_part(
    kind: Any,
    folder: Path,
    subfolder: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> Any:
    """Load a model of diffusers or transformers, of whose weights none is missing; dtype None is as stored.

    Raises:
        ValueError: files are missing or damaged, or weights would be drawn at random.
    """
    place = folder / (subfolder or "")
    what = f"{subfolder or 'model'} in {folder}" if subfolder else f"{place.name} in {place.parent}"
    found = find_variant(place, variant)
    options: dict[str, Any] = {} if subfolder is None else {"subfolder": subfolder}
    if issubclass(kind, PreTrainedModel):  # its report then names keys of another shape
        options["ignore_mismatched_sizes"] = True
    try:
        options["dtype"] = dtype or stored_dtype(place, found)
        model, report = kind.from_pretrained(str(folder), variant=found, output_loading_info=True, **options)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"the {what} is damaged; fetch or save it again ({error})") from error
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if lacking:
        raise ValueError(
            f"the {what} lacks weights of its class {kind.__name__}, which would be random numbers: "
            f"{listed(sorted(lacking), 3)}; fetch or save it again"
        )
    return model

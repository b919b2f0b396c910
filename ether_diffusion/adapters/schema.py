"""What the header's `ether.*` entries may hold: a closed schema, checked before use."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, cast

from ether_diffusion.adapters.adapter import FORMAT_VERSION, AdapterMetadata, Fact
from ether_diffusion.adapters.fingerprint import BaseFingerprint
from ether_diffusion.strict_json import Json, is_number, is_whole, parse_json
from ether_diffusion.wording import listed, printable

PREFIX = "ether."
FINGERPRINT_SCHEMA = "null or {architecture: text, norms: numbers from 0, rounding: 0 to 0.1}"


def parse_metadata(header: Mapping[str, str], where: str) -> AdapterMetadata:
    """Return what the header's `ether.*` entries say; the defaults for a file that plain PEFT wrote.

    Raises:
        ValueError: an entry is malformed or unknown, or a newer release made the file.
    """
    entries = {
        name.removeprefix(PREFIX): parse_json(text, f"the metadata entry {printable(name)} of {where}")
        for name, text in header.items()
        if name.startswith(PREFIX)
    }
    if not entries:
        return AdapterMetadata()
    _check_version(entries.get("format_version"), where)
    unknown = entries.keys() - {field.name for field in fields(AdapterMetadata)}
    if unknown:
        raise ValueError(
            f"{where} has unknown metadata entries {listed(sorted(unknown))}; upgrade ether-diffusion"
        )
    training = entries.get("training", {})
    for name, is_valid, needed in (
        ("base_model", isinstance(entries.get("base_model"), str | None), "text or null"),
        ("trigger", isinstance(entries.get("trigger"), str | None), "text or null"),
        ("training", _is_flat(training), "a flat object of text, numbers and true or false"),
        ("base_fingerprint", _is_fingerprint(entries.get("base_fingerprint")), FINGERPRINT_SCHEMA),
    ):
        if not is_valid:
            raise _refused(name, entries[name], needed, where)
    return AdapterMetadata(
        base_model=cast(str | None, entries.get("base_model")),
        base_fingerprint=_fingerprint(cast(dict[str, Any] | None, entries.get("base_fingerprint"))),
        trigger=cast(str | None, entries.get("trigger")),
        training=cast(dict[str, Fact], training),
    )


def _check_version(version: Json, where: str) -> None:
    if not is_whole(version) or cast(int, version) < 1:
        raise _refused("format_version", version, "a whole number from 1", where)
    if cast(int, version) > FORMAT_VERSION:
        raise ValueError(
            f"{where} was made by a newer release (format {version}; this one reads up to {FORMAT_VERSION}); "
            "upgrade ether-diffusion"
        )


def _refused(name: str, value: Json, needed: str, where: str) -> ValueError:
    found = printable(json.dumps(value))
    return ValueError(
        f"{where}: the metadata entry ether.{name} is {found}; it must be {needed}: save it again"
    )


def _is_flat(training: Json) -> bool:
    return isinstance(training, dict) and all(
        isinstance(fact, str | int | float) for fact in training.values()
    )


def _is_fingerprint(found: Json) -> bool:
    if found is None:
        return True
    if not isinstance(found, dict) or found.keys() != {"architecture", "norms", "rounding"}:
        return False
    architecture, norms, rounding = found["architecture"], found["norms"], found["rounding"]
    return (
        isinstance(architecture, str)
        and architecture.isalnum()
        and len(architecture) <= 64
        and isinstance(norms, list)
        and all(is_number(norm) and cast(float, norm) >= 0 for norm in norms)
        and is_number(rounding)
        and 0 <= cast(float, rounding) <= 0.1
    )


def _fingerprint(found: dict[str, Any] | None) -> BaseFingerprint | None:
    if found is None:
        return None
    norms = tuple(float(norm) for norm in found["norms"])
    return BaseFingerprint(found["architecture"], norms, float(found["rounding"]))


def metadata_header(metadata: AdapterMetadata) -> dict[str, str]:
    """Return the header's entries: "format" as safetensors' users write it, and ours as JSON.

    Raises:
        ValueError: a training fact is not flat, or not a finite number.
    """
    wrong = [name for name, fact in metadata.training.items() if not _is_fact(fact)]
    if wrong:
        raise ValueError(f"training facts must be text, finite numbers or flags; {listed(wrong)} is not")
    entries = {
        field.name: getattr(metadata, field.name)
        for field in fields(AdapterMetadata)
        if field.name != "base_fingerprint"
    }
    entries["training"] = dict(metadata.training)
    print_of_base = metadata.base_fingerprint
    entries["base_fingerprint"] = None if print_of_base is None else asdict(print_of_base)
    compact = {f"{PREFIX}{name}": json.dumps(value, separators=(",", ":")) for name, value in entries.items()}
    return {"format": "pt"} | compact


def _is_fact(fact: object) -> bool:
    return isinstance(fact, str | bool | int) or (isinstance(fact, float) and math.isfinite(fact))

"""Flat configurations on top of each other: preset, file, flags."""

from collections.abc import Mapping

from ether_diffusion.strict_json import Json

TAKES_THE_PLACE_OF = {
    "max_train_steps": "num_train_epochs",
    "num_train_epochs": "max_train_steps",
    "validation_steps": "validation_epochs",
    "validation_epochs": "validation_steps",
    "instance_data_dir": "dataset_name",
    "dataset_name": "instance_data_dir",
    "mask_data_dir": "mask_from_alpha",
    "mask_from_alpha": "mask_data_dir",
    "train_text_encoder": "pre_compute_text_embeddings",
    "aspect_ratio_buckets": "use_aspect_ratio_buckets",
}
"""An option, and the one that it puts out of force where a lower layer gave it."""


def stack(*layers: Mapping[str, Json]) -> dict[str, Json]:
    """Return one flat configuration of several, each of which outranks those before it."""
    values: dict[str, Json] = {}
    for layer in layers:
        for name, other in TAKES_THE_PLACE_OF.items():
            if layer.get(name) not in (None, False):
                values.pop(other, None)
        values |= layer
    return values

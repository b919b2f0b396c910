"""`train-dreambooth` as a function: `python examples/dreambooth_from_python.py photos my-adapter`."""

import sys

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.run import train_dreambooth

SETTINGS: dict[str, Json] = {
    "pretrained_model_name_or_path": "tiny_world_2",  # or a folder, or a hub id
    "instance_prompt": "a photo of a sks animal",
    "adapter": "ether_plus",
    "max_train_steps": 200,
    "train_batch_size": 6,
    "random_flip": True,
}
"""The options of `train-dreambooth --help`, by their names."""


def main(photos: str, output: str, **settings: Json) -> int:
    """Train on a folder of photos, or go on where a call before stopped; return the exit code."""
    given: dict[str, Json] = {**SETTINGS, **settings, "instance_data_dir": photos, "output_dir": output}
    return train_dreambooth(DreamBoothConfig.from_flat(given))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))

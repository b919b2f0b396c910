"""Train an adapter that follows control images: `train-control --conditioning_data_dir maps …`."""

import sys
from collections.abc import Sequence

from ether_diffusion.scripts.train_dreambooth import Program, run_program
from ether_diffusion.training.config import ControlRunConfig

NAME = "train-control"
CONTROL = Program(
    NAME,
    f"{NAME} --train_data_dir PATH [--detector NAME] [flag …]",
    "Train an adapter and an encoder that let an image say where things are.",
    f"Example: {NAME} --train_data_dir pairs --control_type silhouette, where metadata.jsonl has the fields "
    "file_name, conditioning_image_file_name and text; or --instance_data_dir pictures with "
    "--conditioning_data_dir silhouettes, of the pictures' names; or --instance_data_dir photos --detector "
    "canny. The flags of diffusers' train_controlnet.py are known.",
    ControlRunConfig,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training; the exit code is 0, 130 or 143 if interrupted, or 2 for what the user can mend."""
    return run_program(CONTROL, arguments)


if __name__ == "__main__":
    sys.exit(main())

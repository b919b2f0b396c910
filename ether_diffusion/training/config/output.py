"""Where results go."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ether_diffusion.options import option, shown
from ether_diffusion.training.config.section import Section

Tracker = Literal["tensorboard", "wandb", "trackio", "comet_ml", "all"]


@dataclass(frozen=True)
class OutputConfig(Section):
    """The run's folder, its checkpoints, trackers and the hub."""

    output_dir: Path = option(
        Path("dreambooth-adapter"), "Folder of the result, its samples and checkpoints."
    )
    checkpointing_steps: int = option(100, "Updates between two checkpoints.", least=1)
    checkpoints_total_limit: int = option(
        2, "Checkpoints to keep; older ones are deleted after a new one is whole.", least=1
    )
    resume_from_checkpoint: str | None = option(
        None,
        "'latest', or a checkpoint's name or path; a run in output_dir goes on from its newest without it.",
    )
    export_lora: bool = option(
        True, "Also write pytorch_lora_weights.safetensors, which diffusers, ComfyUI and WebUIs load."
    )
    report_to: Tracker | None = option(
        None, "Tracker of loss and images, beside log.jsonl; none if not given."
    )
    logging_dir: str = option("logs", "Folder of the tracker's files, inside output_dir.")
    tracker_project_name: str = option("train-dreambooth", "Project the tracker files the run under.")
    push_to_hub: bool = option(False, "Upload the result to the hub; log in first with `hf auth login`.")
    hub_model_id: str | None = option(
        None, "Repository on the hub, owner/name; the folder's name if not given."
    )
    hub_private_repo: bool = option(False, "Make the repository private.")

    def contradictions(self) -> Iterator[str]:
        """Say what cannot be a repository."""
        if self.hub_model_id is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.hub_model_id):
            yield f"hub_model_id={shown(self.hub_model_id)} is not a repository of the hub; use owner/name"

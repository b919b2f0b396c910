"""What a checkpoint must have in common with the run that goes on from it."""

import hashlib
import json
import logging
from collections.abc import Mapping

from torch import Tensor

from ether_diffusion.adapters.models import base_fingerprint
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX
from ether_diffusion.strict_json import Json
from ether_diffusion.training.checkpoint import Checkpoint
from ether_diffusion.training.methods import TrainedPart, adapter_tensors
from ether_diffusion.training.setup import LoadedRun

logger = logging.getLogger(__name__)


def marks_of(run: LoadedRun) -> dict[str, Json]:
    """Return what a checkpoint is only good for: the base's weights, and all that is trained on."""
    adapted = [name for name, module in run.unet.named_modules() if hasattr(module, "base_layer")]
    found = base_fingerprint(run.unet, adapted or ["conv_in"])  # of encoder-only, what it is added after
    data = json.dumps(run.source.fingerprint(), sort_keys=True).encode()
    return {
        "weights_of_the_base": None if found is None else found.id,
        "photos_or_class_images": hashlib.sha256(data).hexdigest(),
    }


def compare_marks(state: Mapping[str, Json], marks: Mapping[str, Json], *, allow_changes: bool) -> None:
    """Refuse a checkpoint of other base weights or other photos, or warn where changes are allowed.

    Raises:
        ValueError: it is of others, and changes are not allowed.
    """
    for name, found in marks.items():
        if state.get(name) == found:
            continue
        sentence = f"the {name.replace('_', ' ')} changed since the checkpoint was written"
        if not allow_changes:
            raise ValueError(f"{sentence}; give --allow_changes to go on, or another --output_dir")
        logger.warning("%s; the run goes on with what is there now", sentence)


def stored_tensors(part: TrainedPart, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors, if they are those that the part trains now.

    Raises:
        ValueError: they are others.
    """
    now = {key: tensor.shape for key, tensor in adapter_tensors(part.model).items()}
    found = checkpoint.tensors(name) if checkpoint.has(name) else {}
    if {key.removeprefix(PEFT_PREFIX): tensor.shape for key, tensor in found.items()} != now:
        raise ValueError(
            f"{checkpoint.folder} holds no adapter of this form for the {part.part}; give another "
            "--output_dir, or the adapter settings and the base that it was made with"
        )
    return found

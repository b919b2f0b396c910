"""Adapters of every method that training saves, attached to a pipeline."""

from pathlib import Path

from diffusers import StableDiffusionPipeline
from peft import PeftConfig, inject_adapter_in_model
from safetensors.torch import load_file

from ether_diffusion.adapters import load_any
from ether_diffusion.adapters.format import CONFIG_NAME, TENSORS_NAME
from ether_diffusion.training.methods import restore_adapter
from ether_diffusion.tuner import EtherConfig

NAME = "saved"
_PARTS = ("unet", "text_encoder", "text_encoder_2")


def attach_saved(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Attach what a training saved to a pipeline's models, and put it in force.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: it does not fit.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; give the folder of an adapter")
    if saved_method(folder) != "full":
        load_any(pipeline, folder, adapter_name=NAME)
        return
    for part in _PARTS:
        place = folder if part == "unet" else folder / part
        if (place / CONFIG_NAME).is_file():
            model = getattr(pipeline, part)
            inject_adapter_in_model(PeftConfig.from_pretrained(str(place)), model, NAME)
            restore_adapter(model, load_file(place / TENSORS_NAME), name=NAME)


def saved_method(folder: Path) -> str:
    """Return the method of a saved adapter as training names it: "ether_plus", "lora", "oft" …

    Raises:
        FileNotFoundError: the folder holds no adapter.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; give the folder of an adapter")
    config = PeftConfig.from_pretrained(str(folder))
    return (
        config.variant
        if isinstance(config, EtherConfig)
        else str(getattr(config.peft_type, "value", config.peft_type)).lower()
    )

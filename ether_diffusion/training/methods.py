"""Adapters of every method on equal terms: made, attached, switched off, taken out and put back."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from ether_diffusion.adapters import AdapterMetadata, Pipeline, detach_adapter, load_any, models, save
from ether_diffusion.adapters.format import CONFIG_NAME, TENSORS_NAME
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX
from ether_diffusion.bases import Base
from ether_diffusion.bases.stable_diffusion import UNetBase
from ether_diffusion.training.config import AdapterConfig
from ether_diffusion.training.randomness import stream
from ether_diffusion.tuner import EtherConfig, FullConfig, prepared_adapters
from ether_diffusion.wording import listed

ADAPTER_NAME, SAVED_NAME = "default", "saved"
"""Of an adapter in training, and of one that is read again."""


@dataclass(frozen=True)
class TrainedPart:
    """A frozen model that carries the adapter in training, and what was added to it.

    part is "unet" for every denoiser, else the name of a text encoder.
    """

    part: str
    model: nn.Module
    config: PeftConfig
    parameters: Sequence[nn.Parameter]
    learning_rate: float

    @property
    def prefix(self) -> str:
        """Where its files lie in the folder of a run: the UNet's on top, the others' in folders."""
        return "" if self.part == "unet" else f"{self.part}/"


def peft_config(config: AdapterConfig, part: str, base: Base | type[UNetBase]) -> PeftConfig:
    """Return PEFT's configuration of the adapter of one part; rank and blocks mean what they mean there."""
    blocks, rank, dropout = config.blocks, config.rank, config.dropout
    targets: str | list[str] = list(base.text_targets)
    if part == "unet" and config.target_modules in base.targets:
        preset = base.targets[config.target_modules]
        targets = preset if isinstance(preset, str) else list(preset)
    elif part == "unet":  # names with commas between, or a regex
        names = [name.strip() for name in config.target_modules.split(",")]
        are_names = all(re.fullmatch(r"[\w.]+", name) for name in names)
        targets = names if are_names else config.target_modules
    own: dict[str, Any] = {"target_modules": targets}
    match config.adapter:
        case "ether" | "ether_plus" as variant:
            return EtherConfig(variant=variant, num_blocks=blocks, sides=config.sides, dropout=dropout, **own)
        case "lora":
            own["init_lora_weights"] = "gaussian"  # as diffusers' scripts
            return peft.LoraConfig(r=rank, lora_alpha=config.lora_alpha or rank, lora_dropout=dropout, **own)
        case "oft":
            return peft.OFTConfig(r=blocks, oft_block_size=0, module_dropout=dropout, **own)
        case "boft":
            return peft.BOFTConfig(boft_block_num=blocks, boft_block_size=0, boft_dropout=dropout, **own)
        case "hra":
            return peft.HRAConfig(r=rank, **own)
        case "ia3":  # W' = W diag(l), which leaves biases alone
            return peft.IA3Config(feedforward_modules=targets, **own)
        case "delora":
            return peft.DeloraConfig(r=rank, module_dropout=dropout, **own)
        case "full":
            return FullConfig()
    raise AssertionError("there is nothing to configure")


def attach_new(model: nn.Module, config: PeftConfig, *, seed: int, part: str) -> list[nn.Parameter]:
    """Add a new adapter to a frozen model and return its parameters, float32 whatever the model's dtype.

    A ValueError says that the model has no such modules, or that their widths do not fit the method.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, f"adapter of {part}").initial_seed())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", r"Invalid `r` \(\d+\)! Adjusted")  # PEFT's OFT takes others
            try:
                inject_adapter_in_model(config, model, ADAPTER_NAME)
            except UserWarning as adjusted:
                widths = sorted({m.in_features for m in model.modules() if isinstance(m, nn.Linear)})
                found = f"num_blocks={config.r} does not divide every width of the {part}"
                raise ValueError(f"{found} ({listed(widths, 9)}); use one that does, as 4") from adjusted
    if hasattr(model, "_hf_peft_config_loaded"):
        model.__dict__["_hf_peft_config_loaded"] = True  # as diffusers' and transformers' add_adapter
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


@contextmanager
def adapters_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Run the base inside, in all these models; what was on is on again after."""
    layers = [each for model in models for each in model.modules() if isinstance(each, BaseTunerLayer)]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def prepared(model: nn.Module, config: PeftConfig) -> Any:
    """Return the context that a forward and its backward run fastest in."""
    return prepared_adapters(model) if isinstance(config, EtherConfig) else nullcontext()


def adapter_files(model: nn.Module, metadata: AdapterMetadata) -> dict[str, bytes]:
    """Return the files of a model's adapter in PEFT's layout: equal values give equal bytes."""
    return save.adapter_files(detach_adapter(model, ADAPTER_NAME, metadata=metadata))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of an adapter's tensors by their names in the model, on the CPU."""
    tensors = models.adapter_tensors(model, ADAPTER_NAME)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def attach_saved(pipeline: Pipeline, folder: Path) -> None:
    """Attach what a training saved to a pipeline's models, and put it in force.

    Full fine-tuning, whose files only training writes and reads, is no method of `load_any`.
    """
    is_there = (folder / CONFIG_NAME).is_file()
    if not is_there or not isinstance(PeftConfig.from_pretrained(str(folder)), FullConfig):
        load_any(pipeline, folder, adapter_name=SAVED_NAME)
        return
    for part in models.find_parts(pipeline):
        place = folder if part.component == "unet" else folder / part.component
        if (place / CONFIG_NAME).is_file():
            inject_adapter_in_model(PeftConfig.from_pretrained(str(place)), part.model, SAVED_NAME)
            restore_adapter(part.model, load_file(place / TENSORS_NAME), name=SAVED_NAME)


def restore_adapter(model: nn.Module, tensors: Mapping[str, Tensor], *, name: str = ADAPTER_NAME) -> None:
    """Give a model's adapter the values that `adapter_files` stored."""
    named = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    result = peft.set_peft_model_state_dict(model, named, name)
    assert not result.unexpected_keys, result.unexpected_keys

"""The result of a run: adapter, LoRA export, what the saved files draw, model card, and the upload of it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file

from ether_diffusion.adapters import AdapterMetadata, read_adapter
from ether_diffusion.adapters import format as layout
from ether_diffusion.adapters.card import encoder_card, is_ours, model_card, plain_card
from ether_diffusion.adapters.control_encoder import control_files
from ether_diffusion.adapters.load import remove_adapter
from ether_diffusion.adapters.models import TEXT_ENCODERS, shareable_name
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX, safetensors_bytes
from ether_diffusion.bases.distilled import distilled_doubt
from ether_diffusion.control import ControlEncoder, read_control
from ether_diffusion.durable_files import write_files
from ether_diffusion.export import export_lora
from ether_diffusion.training.config import OutputConfig
from ether_diffusion.training.methods import ADAPTER_NAME, adapter_files, adapter_tensors, attach_saved

if TYPE_CHECKING:
    from ether_diffusion.training.setup import Run

logger = logging.getLogger(__name__)

CONTROL_FILES = (layout.CONTROL_CONFIG_NAME, layout.ENCODER_NAME)
SAMPLES_FOLDER, FINAL = "samples", "final"
EVALUATION_NAME, CURVE_NAME = "evaluation.json", "evaluation.png"
_FOLDERS = ("", *(f"{each}/" for each in TEXT_ENCODERS))
UPLOADED = [
    layout.CARD_NAME,
    layout.EXPORT_NAME,
    *CONTROL_FILES,
    f"{SAMPLES_FOLDER}/*.png",
    CURVE_NAME,
    EVALUATION_NAME,
]
UPLOADED += [f"{SAMPLES_FOLDER}/*.png"]
UPLOADED += [f"{part}{name}" for part in _FOLDERS for name in (layout.CONFIG_NAME, layout.TENSORS_NAME)]
"""All of a run's folder that is for others: its settings name folders of this machine."""


def metadata_of_run(run: "Run", step: int | None = None) -> AdapterMetadata:
    """Return what the adapter's file says at a step, or as far as the run is; equal runs say equal things."""
    config = run.config
    return AdapterMetadata(
        base_model=shareable_name(config.base.pretrained_model_name_or_path),
        trigger=config.trigger,
        training={
            "steps": run.trainer.step if step is None else step,
            "learning_rate": config.learning_rate,
            "batch_size": run.progress.effective_batch,
            "optimizer": config.optimization.optimizer,
            "lr_scheduler": config.optimization.lr_scheduler,
            "prior_preservation": config.prior.prior_preservation,
            "seed": config.compute.seed,
        },
    )


def result_files(run: "Run") -> dict[str, bytes]:
    """Return the files of all adapters and the control encoder by their names; the UNet's lie on top."""
    files: dict[str, bytes] = {}
    for part in run.trainer.parts:
        own = adapter_files(part.model, metadata_of_run(run))
        files |= {f"{part.prefix}{name}": data for name, data in own.items()}
    if run.trainer.control is not None:
        unet = next((part.model for part in run.trainer.parts if part.part == "unet"), None)
        files |= control_files(run.trainer.control, None if unet is None else adapter_tensors(unet))
    return files


def write_adapters(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of adapters into a folder and its subfolders."""
    for subfolder in sorted({Path(name).parent for name in files}):
        inside = {Path(name).name: data for name, data in files.items() if Path(name).parent == subfolder}
        (folder / subfolder).mkdir(exist_ok=True, parents=True)
        write_files(folder / subfolder, inside)


def write_export(folder: Path, run: "Run") -> Path | None:
    """Write the LoRA file of the adapters in a folder, where the method has one; return its path."""
    method, base = run.config.adapter.adapter, run.base
    if method == "lora":
        return _save_lora(folder, run)
    if not method.startswith("ether"):
        logger.info("no LoRA file is written: %s is no low-rank update", method)
        return None
    unet, stored = run.unet, base.denoiser_dtype
    is_exact = unet.dtype in (stored, torch.float32) and run.config.quantize is None
    if not is_exact:  # it is to be so on the weights as they are stored
        unet = base.load_denoiser(stored)
    if len(run.trainer.parts) == 1:
        return export_lora(read_adapter(folder, components=["unet"], with_encoder=False), unet, folder)
    pipeline = base.load_text_encoders().pipeline
    pipeline.register_modules(**{base.denoiser: unet})
    return export_lora(folder, pipeline, folder)


def _save_lora(folder: Path, run: "Run") -> Path:
    """Write PEFT's LoRA as diffusers' own scripts do."""
    arguments: dict[str, object] = {}
    for part in run.trainer.parts:
        tensors, config = load_file(folder / f"{part.prefix}{layout.TENSORS_NAME}"), part.config.to_dict()
        name = run.base.denoiser if part.part == "unet" else part.part
        arguments[f"{name}_lora_layers"] = {key.removeprefix(PEFT_PREFIX): t for key, t in tensors.items()}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        arguments[f"{name}_lora_adapter_metadata"] = plain
    with TemporaryDirectory() as temporary:
        run.base.pipeline_class.save_lora_weights(temporary, weight_name=layout.EXPORT_NAME, **arguments)
        with safe_open(Path(temporary) / layout.EXPORT_NAME, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(Path(temporary) / layout.EXPORT_NAME)
    write_files(
        folder, {layout.EXPORT_NAME: safetensors_bytes(tensors, header)}
    )  # whole, equal bytes each time
    return folder / layout.EXPORT_NAME


def restore_control(encoder: ControlEncoder, folder: Path) -> None:
    """Give the encoder the values of one that was written; a ValueError says that it is of another form."""
    found = read_control(folder)
    if found.config != encoder.config:
        raise ValueError(f"{folder} holds no control encoder of this form; give another --output_dir")
    encoder.load_state_dict(found.state_dict())


def load_saved(folder: Path, run: "Run") -> None:
    """Take the adapters in training off the models, and load those in a folder instead."""
    if run.trainer.control is not None:
        restore_control(run.trainer.control, folder)
    models = {part.part: part.model for part in run.trainer.parts}
    for model in models.values():
        remove_adapter(model, [ADAPTER_NAME])
    if models:
        attach_saved(SimpleNamespace(components=models), folder)


def write_card(
    folder: Path,
    run: "Run",
    pictures: list[tuple[str, str]],
    step: int | None = None,
    evaluation: Sequence[str] = (),
) -> None:
    """Write README.md, unless somebody edited the one that is there; evaluation are lines on it."""
    path, method = folder / layout.CARD_NAME, run.config.adapter.adapter
    if path.exists() and not is_ours(path):
        logger.info("left %s as it is: it was edited", path)
        return
    control = None if run.trainer.control is None else run.base.drawn_by_with_control
    told: dict[str, Any] = {"pictures": pictures, "evaluation": evaluation, "control": control}
    told["doubt"] = distilled_doubt(str(metadata_of_run(run, step).base_model), run.base.folder)
    exported = told | {"has_lora_export": (folder / layout.EXPORT_NAME).exists()}
    if method == "none":
        text = encoder_card(metadata_of_run(run, step), **told)
    elif method.startswith("ether"):
        text = model_card(read_adapter(folder, with_encoder=False).first, **exported)
    else:
        text = plain_card(method.upper(), metadata_of_run(run, step), **exported)
    write_files(folder, {layout.CARD_NAME: text.encode()})


def open_repository(config: OutputConfig, token: str | None) -> str:
    """Make the repository on the hub unless it is there, and return its id."""
    name = config.hub_model_id or config.output_dir.resolve().name
    private = config.hub_private_repo or None  # what the account makes of new ones, unless asked
    return str(HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id)


def upload(folder: Path, config: OutputConfig, token: str | None) -> str:
    """Upload a result to the hub and return its address; checkpoints, logs and settings stay here."""
    where, said = open_repository(config, token), "Upload the adapter"
    send = HfApi(token=token).upload_folder
    commit = send(repo_id=where, folder_path=folder, commit_message=said, allow_patterns=UPLOADED)
    return str(commit.commit_url)

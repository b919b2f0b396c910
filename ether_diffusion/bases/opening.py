"""A base by its name, opened by the family that it is of, or loaded whole."""

from pathlib import Path

from diffusers import DiffusionPipeline, UNet2DConditionModel

from ether_diffusion.bases.base import Base
from ether_diffusion.bases.files import find_folder, find_part, load_part, load_pipeline, read_config
from ether_diffusion.bases.flux import Chroma, Flux1, Flux2Dev, Flux2Klein
from ether_diffusion.bases.qwen_image import QwenImage
from ether_diffusion.bases.sana import Sana
from ether_diffusion.bases.single_file import complete_vae, is_single_file, unpack_vae
from ether_diffusion.bases.stable_diffusion import SDXL, StableDiffusion
from ether_diffusion.bases.stable_diffusion_3 import StableDiffusion3
from ether_diffusion.bases.z_image import ZImage
from ether_diffusion.wording import printable

FAMILIES: tuple[type[Base], ...] = (
    *(SDXL, StableDiffusion, StableDiffusion3, Flux1, Flux2Klein, Flux2Dev, ZImage, QwenImage, Chroma),
    Sana,
)
_VAE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors")


def open_base(
    name: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    local_files_only: bool = False,
) -> Base:
    """Open a base: a folder in diffusers' layout, a hub id, a single file or the name of an embedded one.

    Raises:
        FileNotFoundError: there is none.
        OSError: the Hub does not give it.
        ValueError: it is of none of FAMILIES, or of parts that are not handled.
    """
    folder = find_folder(name, revision=revision, variant=variant, local_files_only=local_files_only)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json; name a folder in diffusers' layout")
    index = read_config(folder, "model_index.json")
    family = next((each for each in FAMILIES if each.recognises(folder, index)), None)
    if family is None:
        found = printable(index.get("_class_name", "an unknown pipeline"))
        raise ValueError(
            f"{folder} is a {found}; use Stable Diffusion 1.x, 2.x, 3 or 3.5, a whole SDXL base, FLUX.1, "
            "FLUX.2, Z-Image, Qwen-Image, Chroma or Sana"
        )
    vae_folder = tokenizer_folder = None
    if vae is not None and is_single_file(Path(vae)):
        vae_folder = unpack_vae(Path(vae), folder)
    elif vae is not None:
        vae_folder = find_part(vae, _VAE_FILES, local_files_only=local_files_only)
    elif Path(name).is_file() and not list((folder / "vae").glob("*.safetensors")):
        complete_vae(folder)
    if tokenizer is not None:
        files = ("*.json", "*.txt")
        tokenizer_folder = find_part(tokenizer, files, revision=revision, local_files_only=local_files_only)
    return family.open(
        str(name), folder, variant=variant, vae_folder=vae_folder, tokenizer_folder=tokenizer_folder
    )


def load_base(name: str | Path) -> DiffusionPipeline | UNet2DConditionModel:
    """Load a base by a folder, a hub id, a file or an embedded one's name, in the dtypes it is stored in.

    A folder may hold a whole pipeline, or a UNet by itself.

    Raises:
        FileNotFoundError: a path that is not there, or a folder that holds neither.
        OSError: the Hub does not give it.
        ValueError: its files are damaged, or do not fit together.
    """
    folder = find_folder(name)
    if (folder / "model_index.json").is_file():
        index = read_config(folder, "model_index.json")
        for family in FAMILIES:  # parts that are not handled are refused before anything is loaded
            is_its_own = index.get("_class_name") == family.pipeline_class.__name__
            if is_its_own and family.recognises(folder, index):
                family.open(str(name), folder, variant=None, vae_folder=None, tokenizer_folder=None)
        return load_pipeline(folder)
    is_model = (folder / "config.json").is_file()
    if is_model and read_config(folder, "config.json").get("_class_name") == UNet2DConditionModel.__name__:
        return load_part(UNet2DConditionModel, folder)
    raise FileNotFoundError(
        f"{folder} holds no model_index.json and no UNet's config.json; name a folder in diffusers' layout"
    )

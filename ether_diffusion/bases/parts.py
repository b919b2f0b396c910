"""What the parts of a Stable Diffusion base may be: others are refused by name, before one is loaded."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ether_diffusion.wording import listed, printable

TRAINED_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep"),
        *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep"),
        *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep"),
    )
)
"""Of the noise of DDPM: variance-preserving, by betas over discrete timesteps (Ho et al. 2020)."""
_SCHEDULERS = TRAINED_SCHEDULERS | {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
_TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast"})
_CLASSES = {
    "unet": ("UNet", frozenset({"UNet2DConditionModel"})),
    "vae": ("VAE", frozenset({"AutoencoderKL", "AutoencoderTiny"})),
    "text_encoder": ("text encoder", frozenset({"CLIPTextModel"})),
    "text_encoder_2": ("second text encoder", frozenset({"CLIPTextModelWithProjection"})),
    "tokenizer": ("tokenizer", _TOKENIZERS),
    "tokenizer_2": ("second tokenizer", _TOKENIZERS),
    "scheduler": ("scheduler", _SCHEDULERS),
}
"""What a part is called, and the classes of diffusers and transformers that are handled."""
_CLIP_TEXTS = ("clip", "clip_text_model")
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""What transformers calls any tokenizer that is one file."""


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of a base.

    Raises:
        ValueError: there is none.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} has no {name}; name a whole Stable Diffusion pipeline")
    try:
        config = json.loads(path.read_bytes())  # diffusers writes -Infinity, which strict JSON has not
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch or save the base again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object; fetch or save the base again")
    return config


def check_classes(folder: Path, index: Mapping[str, Any]) -> None:
    """Compare the classes that model_index.json and the parts' own configs name with those handled.

    Raises:
        ValueError: one is another; what would be loaded as ours would have random weights.
    """
    for name in _CLASSES:
        entry = index.get(name)
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            check_class(name, entry[1], folder)
            _check_own_word(name, folder / name)


def check_class(name: str, found: object, where: Path) -> None:
    """Refuse a part of a class that is not handled.

    Raises:
        ValueError: as said.
    """
    called, classes = _CLASSES[name]
    if found not in classes:
        needed = "DDIM's, Euler's or another of that noise" if name == "scheduler" else _or(classes)
        raise ValueError(
            f"the {called} of {where} is of the class {printable(found)}, which is not handled here; use a "
            f"base whose {called} is {needed}"
        )


def check_vae(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a VAE of another class, or of other pictures or latents.

    Raises:
        ValueError: as said.
    """
    check_class("vae", config.get("_class_name", "AutoencoderKL"), folder)
    for setting, needed in (("in_channels", 3), ("out_channels", 3), ("latent_channels", 4)):
        if config.get(setting, needed) != needed:
            raise ValueError(
                f"the VAE in {folder} has {setting}={printable(config[setting])}; use one with {needed}, "
                "as Stable Diffusion's"
            )


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Return what a VAE divides the sides of pictures by."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (64,)
    return int(2 ** (len(blocks) - 1))


def check_unet(folder: Path, unet: Mapping[str, Any], texts: list[Mapping[str, Any]]) -> None:
    """Refuse a UNet that wants what no prompt gives, or text of another width than its encoders'.

    Raises:
        ValueError: as said.
    """
    wanted = list(_foreign_conditions(unet))
    if wanted:
        raise ValueError(
            f"the UNet in {folder} wants {listed(wanted)}, which nothing here gives; use Stable Diffusion "
            "1.x, 2.x or SDXL"
        )
    if unet.get("out_channels", 4) != 4:
        raise ValueError(f"the UNet in {folder} gives {unet['out_channels']} channels; use one of 4")
    if unet.get("addition_embed_type") == "text_time":
        found = unet.get("projection_class_embeddings_input_dim")
        needed = 6 * (unet.get("addition_time_embed_dim") or 0) + texts[-1].get("projection_dim", 512)
        if found != needed:
            raise ValueError(
                f"the UNet in {folder} reads {found} numbers of sizes and pooled text, and there are "
                f"{needed}; use a whole SDXL base, not a refiner"
            )
    width = sum(_text_width(text) for text in texts)
    known = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    known = known if isinstance(known, list) else [known]
    if any(each != width for each in known):
        raise ValueError(
            f"the UNet in {folder} reads text of width {listed(sorted(set(known)))}, and the text encoders "
            f"give {width}; fetch or save the base again"
        )


def _foreign_conditions(unet: Mapping[str, Any]) -> Iterator[str]:
    """Name the settings of a UNet that ask for more than a prompt, sizes and crops."""
    given = {"class_embed_type": (), "num_class_embeds": (), "addition_embed_type": ("text_time",)}
    given |= {"encoder_hid_dim_type": ("text_proj",)}
    for setting, values in given.items():
        value = unet.get(setting)
        if value is not None and value not in values:
            yield f"{setting}={value}"


def _text_width(text: Mapping[str, Any]) -> int:
    return int(text.get("text_config", text).get("hidden_size", 512))


def _check_own_word(name: str, folder: Path) -> None:
    """Compare what a part's own config says with what is handled, where it says it."""
    file = {"scheduler": "scheduler_config.json"}.get(name, "config.json")
    file = "tokenizer_config.json" if name.startswith("tokenizer") else file
    if not (folder / file).is_file():
        return
    config = read_config(folder, file)
    if name.startswith("text_encoder"):
        if config.get("model_type", "clip") not in _CLIP_TEXTS:
            check_class(name, (config.get("architectures") or [config["model_type"]])[0], folder)
        return
    said = config.get("tokenizer_class" if name.startswith("tokenizer") else "_class_name")
    if said is not None and said not in _PLAIN_TOKENIZERS:
        check_class(name, said, folder)


def _or(classes: frozenset[str]) -> str:
    return " or ".join(sorted(classes))

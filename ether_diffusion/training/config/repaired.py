"""Defaults that differ from those of diffusers' scripts, so that nobody is surprised by them."""

from collections.abc import Collection

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config.control_run import control_of
from ether_diffusion.training.config.dreambooth import DreamBoothConfig
from ether_diffusion.training.config.optimization import DEFAULT_STEPS

THEIR_DEFAULTS: dict[str, Json] = {
    "learning_rate": 5e-4,
    "adam_weight_decay": 0.01,
    "lr_warmup_steps": 500,  # longer than the runs their README recommends
    "train_batch_size": 4,
    "max_train_steps": "1 epoch",
    "validation_steps": "50 epochs",
    "checkpointing_steps": 500,
    "checkpoints_total_limit": "no limit",
    "resolution": 512,
    "seed": "none",
    "pre_compute_text_embeddings": False,
    "report_to": "tensorboard",
}
"""The defaults of diffusers' train_dreambooth_lora.py where they are not ours."""

THEIR_CONTROL_DEFAULTS: dict[str, Json] = THEIR_DEFAULTS | {
    "learning_rate": 5e-6,
    "validation_steps": 100,
    "center_crop": True,
}
"""Those of their train_controlnet.py."""

_REPLACED_BY = {"max_train_steps": "num_train_epochs", "validation_steps": "validation_epochs"}


def repaired_defaults(config: DreamBoothConfig, given: Collection[str] = ()) -> str:
    """Return one line of the options nobody gave, with what is used and, in brackets, what diffusers has.

    It is empty where all of them were given.
    """
    all_theirs = THEIR_DEFAULTS if control_of(config) is None else THEIR_CONTROL_DEFAULTS
    used = config.flat() | {
        "learning_rate": config.learning_rate,
        "max_train_steps": config.optimization.max_train_steps or DEFAULT_STEPS,
        "resolution": config.data.resolution or "the base's",
    }
    left = [
        name
        for name, theirs in all_theirs.items()
        if name not in given and _REPLACED_BY.get(name) not in given and used[name] != theirs
    ]
    items = ", ".join(f"{name} {_plain(used[name])} ({_plain(all_theirs[name])})" for name in left)
    return f"defaults here (diffusers' in brackets): {items}" if items else ""


def _plain(value: Json) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)

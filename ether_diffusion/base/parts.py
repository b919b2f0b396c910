"""The configs of a base's parts."""

import json
from pathlib import Path
from typing import Any


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

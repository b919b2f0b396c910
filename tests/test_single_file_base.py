"""A base or a VAE that is one file is refused with what makes a folder of it."""

from pathlib import Path

import pytest
from tiny_pipelines import tiny_sd

from ether_diffusion.bases import load_base, open_base

SINGLE_FILES = {
    "model.safetensors": r"StableDiffusionXLPipeline\)\.from_single_file\('.*'\)\.save_pretrained",
    "model.ckpt": r"StableDiffusionXLPipeline\)\.from_single_file\('.*'\)\.save_pretrained",
    "model.gguf": "a single file of quantized weights",
}


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_a_single_file_is_told_what_to_do_with(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    for load in (open_base, load_base):
        with pytest.raises(ValueError, match=SINGLE_FILES[name]):
            load(tmp_path / name)
    tiny_sd().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"AutoencoderKL\.from_single_file|quantized weights"):
        open_base(tmp_path / "base", vae=str(tmp_path / name))

"""One batch, a different adapter for each row: `python examples/mix_adapters.py first second pictures`."""

import sys
from pathlib import Path

from ether_diffusion.pipelines import EtherStableDiffusionPipeline
from ether_diffusion.tiny_world import tiny_world_path

PROMPT = "a sks animal on a beach"


def main(first: str, second: str, output: str, steps: int = 20) -> list[Path]:
    """Draw one prompt by each adapter, by one at half strength, by the base; return the paths."""
    pipe = EtherStableDiffusionPipeline.from_pretrained(tiny_world_path("tiny_world_2"))
    pipe.load_ether_weights(first, adapter_name="first")
    pipe.load_ether_weights(second, adapter_name="second")
    choices = ["first", "second", {"second": 0.5}, None]
    pictures = pipe(
        [PROMPT] * len(choices),
        adapters=choices,
        seed=[7] * len(choices),  # the same noise in each row
        num_inference_steps=steps,
        guidance_scale=3.0,
    ).images
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in ("first", "second", "half", "base")]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


if __name__ == "__main__":
    print(*main(sys.argv[1], sys.argv[2], sys.argv[3]), sep="\n")

"""clip_skip leaves the text encoder's last layers out, as diffusers means it, whatever transformers nests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_sd, tiny_sdxl

from ether_diffusion.pipelines import EtherStableDiffusionPipeline, EtherStableDiffusionXLPipeline

DRAWN = {"num_inference_steps": 1, "height": 16, "width": 16, "seed": 3}


def without_last_layers(encoder: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """What diffusers means by clip_skip: an earlier layer's output, normed as the last one's would be."""
    states = encoder(ids, output_hidden_states=True).hidden_states
    result: torch.Tensor = encoder.final_layer_norm(states[-(count + 1)])
    return result


@pytest.mark.parametrize("count", [0, 1, 2])
@torch.no_grad()
def test_clip_skip_leaves_the_last_layers_out_for_the_prompt_alone(tmp_path: Path, count: int) -> None:
    tiny_sd().save_pretrained(tmp_path)
    pipe = EtherStableDiffusionPipeline.from_pretrained(tmp_path)
    options: dict[str, Any] = {"device": torch.device("cpu"), "num_images_per_prompt": 2}
    options["do_classifier_free_guidance"] = True
    prompts, negative = ["a fox", "b"], ["c", "d"]
    found = pipe.encode_prompt(prompts, negative_prompt=negative, clip_skip=count, **options)
    plain = pipe.encode_prompt(prompts, negative_prompt=negative, **options)
    tokens = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    expected = without_last_layers(pipe.text_encoder, tokens, count).repeat_interleave(2, dim=0)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[0], plain[0]) == (count == 0)


@pytest.mark.parametrize(
    ("make", "kind", "most"),
    [(tiny_sd, EtherStableDiffusionPipeline, 2), (tiny_sdxl, EtherStableDiffusionXLPipeline, 1)],
)
def test_clip_skip_beyond_the_layers_is_refused_and_changes_nothing(
    make: Any, kind: Any, most: int, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    pipe = kind.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    before = np.asarray(pipe("a fox", **DRAWN).images[0])
    for wrong in (-1, most + 1, "1", True, 1.0):
        with pytest.raises(ValueError, match=f"clip_skip is from 0 to {most} .* found {wrong!r}"):
            pipe("a fox", clip_skip=wrong, **DRAWN)
    skipped = np.asarray(pipe("a fox", clip_skip=1, guidance_scale=9.0, **DRAWN).images[0])
    plain = np.asarray(pipe("a fox", guidance_scale=9.0, **DRAWN).images[0])
    assert not np.array_equal(skipped, plain)
    assert np.array_equal(np.asarray(pipe("a fox", **DRAWN).images[0]), before)

"""Encoders give what their own libraries give, whatever the batch, and refuse in a sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoder_models import save_clip, save_dino, save_dinov2, save_other_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, Dinov2Model, ViTModel

from ether_diffusion.metrics.encoders import Encoder, load_encoder
from ether_diffusion.tiny_world import WEIGHTS_FOLDER
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.networks import load_tiny_clip
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.world import Background, Scene, draw

TEXTS = ["a fox on a red background", "a cat", "an owl in the snow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("encoders")
    save_dino(made / "dino")
    save_dinov2(made / "dinov2")
    save_clip(made / "clip")
    return made


def pictures(count: int = 5, size: tuple[int, int] = (48, 40)) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def normalised(picture: Image.Image, side: int, mean: list[float], std: list[float]) -> Tensor:
    """Scale a picture to a square and normalise it, by hand."""
    small = picture.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255
    return ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


@pytest.mark.parametrize(("name", "size"), [("dino", 32), ("dinov2", 32), ("clip", 24), ("tiny_world", 128)])
def test_vectors_have_unit_length_whatever_the_batch_and_the_order(
    folder: Path, name: str, size: int
) -> None:
    alone, together = load(folder, name, batch_size=1), load(folder, name, batch_size=4)
    found = pictures()
    vectors = alone.embed_images(found)
    assert (vectors.shape, vectors.dtype) == ((5, size), torch.float64)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(together.embed_images(found), vectors, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.embed_images(found[::-1]).flip(0), vectors, atol=1e-6, rtol=0)


def test_dino_is_the_class_token_of_transformers_last_hidden_state(folder: Path) -> None:
    model = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False).eval()
    picture = pictures(1, (32, 32))[0]
    with torch.no_grad():
        state = model(normalised(picture, 32, [0.5] * 3, [0.5] * 3)).last_hidden_state[:, 0]
    expected = F.normalize(state.double(), dim=1)
    torch.testing.assert_close(load(folder, "dino").embed_images([picture]), expected, atol=1e-6, rtol=0)


def test_dinov2_is_the_normed_class_token(folder: Path) -> None:
    model = Dinov2Model.from_pretrained(folder / "dinov2").eval()
    picture = pictures(1, (32, 32))[0]
    imagenet = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        state = model(normalised(picture, 32, *imagenet)[..., 2:30, 2:30]).pooler_output
    expected = F.normalize(state.double(), dim=1)
    torch.testing.assert_close(load(folder, "dinov2").embed_images([picture]), expected, atol=1e-6, rtol=0)


def test_clip_is_that_of_transformers_own_processor_and_model(folder: Path) -> None:
    model, encoder = CLIPModel.from_pretrained(folder / "clip").eval(), load(folder, "clip")

    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "clip"),
    )
    found = pictures(3)
    inputs = processor(text=TEXTS, images=found, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        output = model(**inputs)
    ours = encoder.embed_images(found) @ encoder.embed_texts(TEXTS).T
    expected = output.logits_per_image.double() / model.logit_scale.exp().double()
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_tiny_worlds_encoder_is_its_clip() -> None:
    scenes = [Scene(find_concept(name), Background("plain", "red")) for name in ("cat", "star")]
    clip, encoder = load_tiny_clip(WEIGHTS_FOLDER), load_encoder("tiny_world")
    images = encoder.embed_images([draw(scene, size=64) for scene in scenes])
    expected = clip.embed_images(draw_scenes(scenes)).double()
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        encoder.embed_texts(TEXTS), clip.embed_texts(TEXTS).double(), atol=1e-6, rtol=0
    )


def test_a_text_that_is_too_long_is_cut_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder, "clip").embed_texts(["a cat " * 100])
    assert "tokens are compared" in caplog.text


@pytest.mark.parametrize("name", ["nothing", "facebook/dino-vits16", "dino", "clip", "dinov2"])
def test_an_encoder_that_is_not_here_is_said_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"found no encoder .* name a folder, a hub id, or one of"):
        load_encoder(name, offline=True)


@pytest.mark.parametrize("name", ["./nothing", "/nothing", "no/such/folder"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("httpx.Client.send", lambda *parts, **options: asked.append(str(parts)))
    with pytest.raises(FileNotFoundError, match="found no encoder"):
        load_encoder(name)
    assert not asked


def test_a_network_of_another_kind_is_refused_by_its_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type bert.*give a DINO ViT"):
        load_encoder(str(save_other_model(tmp_path / "bert")))


@pytest.mark.parametrize("lacks", ["layernorm.weight", "model.safetensors", "preprocessor_config.json"])
def test_an_incomplete_encoder_is_refused_rather_than_filled_at_random(tmp_path: Path, lacks: str) -> None:
    folder = save_dino(tmp_path / "dino")
    if (folder / lacks).is_file():
        (folder / lacks).unlink()
    else:
        weights = load_file(folder / "model.safetensors")
        del weights[lacks]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"is not whole; fetch it again.*{lacks if 'w' in lacks else ''}"):
        load_encoder(str(folder))


def load(folder: Path, name: str, batch_size: int = 16) -> Encoder:
    return load_encoder(name if name == "tiny_world" else str(folder / name), batch_size=batch_size)

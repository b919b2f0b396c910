"""The model card is one that the Hub reads, with an example that runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from peft import get_peft_model
from small_models import adapted_unet, exactly_equal, output, small_llama, small_unet
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import read_adapter, save_ether
from ether_diffusion.tiny_world import tiny_world_path


def test_the_model_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, trigger="a photo of sks dog", base_model="stable/base")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "stable/base"
    assert card.data.instance_prompt == "a photo of sks dog"
    assert {"ether", "text-to-image"} <= set(card.data.tags)
    assert "load_ether(pipe," in card.text
    assert "load_lora_weights" not in card.text


def test_the_model_card_tells_of_the_export_that_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    save_ether(adapted_unet(), tmp_path)
    assert "pipe.load_lora_weights(" in (tmp_path / "README.md").read_text()


def test_the_model_card_of_a_language_model_speaks_of_no_pictures(tmp_path: Path) -> None:
    config = EtherConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_ether(get_peft_model(small_llama(), config), tmp_path, base_model="some/llama")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag is None
    assert 'AutoModelForCausalLM.from_pretrained("some/llama")' in card.text


def test_the_example_of_the_model_card_runs(tmp_path: Path) -> None:
    base = tmp_path / "base"
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(base)
    save_ether(adapted_unet(), tmp_path / "adapter", base_model=str(base))
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("path or Hub id of this adapter", str(tmp_path / "adapter"))
    names: dict[str, Any] = {}
    exec(code, names)
    assert exactly_equal(output(names["pipe"].unet), output(adapted_unet()))


def test_a_local_path_is_not_given_to_the_hub_as_the_base(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, base_model="/home/somebody/base")
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_a_readme_that_somebody_edited_is_left_alone(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path, trigger="one")
    save_ether(adapted_unet(), tmp_path, trigger="two")
    assert "two" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace("# ETHER", "# My ETHER"))
    save_ether(adapted_unet(), tmp_path, trigger="three")
    text = (tmp_path / "README.md").read_text()
    assert "# My ETHER" in text
    assert "three" not in text


@pytest.mark.parametrize("origin", ["str", "Path"])
def test_a_shared_adapter_names_its_base_but_not_where_it_lay(tmp_path: Path, origin: str) -> None:
    tiny_sd().save_pretrained(tmp_path / "home" / "my-base")
    folder = tmp_path / "home" / "my-base"
    pipe = DiffusionPipeline.from_pretrained(str(folder) if origin == "str" else folder)
    pipe.unet.add_adapter(EtherConfig())
    save_ether(pipe, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").metadata.base_model == "my-base"
    written = b"".join(path.read_bytes() for path in (tmp_path / "adapter").iterdir())
    assert str(tmp_path).encode() not in written


def test_an_adapter_of_the_embedded_base_names_it_by_its_alias(tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_world_path())
    pipe.unet.add_adapter(EtherConfig())
    save_ether(pipe, tmp_path)
    assert read_adapter(tmp_path).metadata.base_model == "tiny_world"


def test_the_example_of_an_adapter_for_the_embedded_base_runs(tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_world_path())
    pipe.unet.add_adapter(EtherConfig())
    save_ether(pipe, tmp_path, base_model="tiny_world")
    card = (tmp_path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict[str, object] = {}
    exec(code.replace("path or Hub id of this adapter", str(tmp_path)), scope)
    loaded = scope["pipe"]
    assert isinstance(loaded, DiffusionPipeline)
    assert loaded.get_active_adapters() == ["default"]

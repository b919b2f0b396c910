"""A pipeline's adapters are saved and loaded together, whole or not at all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDPMPipeline, DDPMScheduler, StableDiffusionControlNetPipeline
from peft import LoraConfig, get_peft_model
from small_models import (
    adapted_unet,
    encoded,
    exactly_equal,
    output,
    pipeline,
    small_llama,
    small_text_encoder,
    small_unet,
)
from tiny_pipelines import tiny_sd
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import load_ether, save_ether
from ether_diffusion.tuner import EtherLinear


def test_a_pipeline_of_diffusers_saves_and_loads_as_its_unet_does(tmp_path: Path) -> None:
    unet = adapted_unet()
    save_ether(DDPMPipeline(unet, DDPMScheduler()), tmp_path)
    pipe = DDPMPipeline(small_unet(), DDPMScheduler())
    assert load_ether(pipe, tmp_path).components == {"unet": 32}
    assert exactly_equal(output(pipe.unet), output(unet))


def test_a_pipeline_with_a_transformer_takes_the_adapter_of_the_folder_into_it(tmp_path: Path) -> None:
    save_ether(adapted_unet(), tmp_path)
    pipe = SimpleNamespace(components={"transformer": small_unet(), "text_encoder": small_text_encoder()})
    assert load_ether(pipe, tmp_path).components == {"transformer": 32}


def test_a_pipeline_takes_back_the_adapters_of_unet_and_text_encoder(tmp_path: Path) -> None:
    pipe, fresh = pipeline(adapt_text=True), pipeline()
    save_ether(pipe, tmp_path)
    assert (tmp_path / "text_encoder" / "adapter_model.safetensors").exists()
    report = load_ether(fresh, tmp_path, adapter_name="dog")
    assert report.components == {"unet": 32, "text_encoder": 2}
    assert exactly_equal(output(fresh.components["unet"]), output(pipe.components["unet"]))
    assert exactly_equal(encoded(fresh), encoded(pipe))


OTHERS = ["transformer_2", "controlnet", "motion_adapter", "image_encoder", "vae", "prior"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("with_denoiser", [True, False])
def test_every_component_that_carries_the_adapter_is_saved_and_loaded(
    name: str, with_denoiser: bool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    adapted = {"transformer": adapted_unet() if with_denoiser else small_unet(), name: adapted_unet()}
    save_ether(SimpleNamespace(components=adapted), tmp_path)
    fresh = {"transformer": small_unet(), name: small_unet()}
    report = load_ether(SimpleNamespace(components=fresh), tmp_path)
    assert report.components == ({"transformer": 32} if with_denoiser else {}) | {name: 32}
    for part, model in fresh.items():
        assert exactly_equal(output(model), output(adapted[part]))


@pytest.mark.parametrize("name", OTHERS)
def test_a_pipeline_without_a_component_refuses_its_adapter(name: str, tmp_path: Path) -> None:
    save_ether(SimpleNamespace(components={"unet": adapted_unet(), name: adapted_unet()}), tmp_path)
    with pytest.raises(ValueError, match=f"an adapter of {name}, which this pipeline lacks"):
        load_ether(pipeline(), tmp_path)
    with pytest.raises(ValueError, match=f"holds adapters of {name}, which 'default' lacks"):
        save_ether(adapted_unet(), tmp_path)


def test_a_controlnet_takes_its_adapter_back_in_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    base = tiny_sd()

    def controlled() -> StableDiffusionControlNetPipeline:
        torch.manual_seed(5)
        controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16))
        return StableDiffusionControlNetPipeline(**base.components, controlnet=controlnet)

    pipe, fresh = controlled(), controlled()
    pipe.controlnet.add_adapter(EtherConfig())
    save_ether(pipe, tmp_path)
    assert load_ether(fresh, tmp_path).components == {"controlnet": 16}
    ours, theirs = pipe.controlnet.state_dict(), fresh.controlnet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(exactly_equal(ours[key], theirs[key]) for key in ours)


def test_an_adapter_of_another_method_under_the_same_name_is_not_left_out_in_silence(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.components["unet"].add_adapter(EtherConfig())
    pipe.components["text_encoder"].add_adapter(LoraConfig(target_modules=["q_proj"]), "default")
    with pytest.raises(ValueError, match="'default' is an adapter of another method in text_encoder"):
        save_ether(pipe, tmp_path)
    assert not list(tmp_path.iterdir())
    save_ether(pipe.components["unet"], tmp_path)


def test_a_model_under_two_names_is_one_part(tmp_path: Path) -> None:
    unet = adapted_unet()
    save_ether(SimpleNamespace(components={"unet": unet, "controlnet": unet}), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_holds_no_model_that_can_be_adapted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has none of unet, transformer"):
        save_ether(SimpleNamespace(components={"vae": nn.Linear(2, 2)}), tmp_path)
    with pytest.raises(ValueError, match="str is neither a torch module nor a diffusers pipeline"):
        load_ether("model", tmp_path)  # type: ignore[arg-type]


def test_a_pipeline_without_the_text_encoder_refuses_its_adapter(tmp_path: Path) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    pipe = pipeline(text_encoder=False)
    with pytest.raises(ValueError, match="an adapter of text_encoder, which this pipeline lacks"):
        load_ether(pipe, tmp_path)
    assert not hasattr(pipe.components["unet"], "peft_config")


def test_a_bare_unet_is_told_of_the_text_encoders_adapter_that_it_leaves(tmp_path: Path) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    with pytest.warns(UserWarning, match="also holds an adapter of text_encoder, which is not loaded"):
        load_ether(small_unet(), tmp_path)


def test_a_unet_alone_is_not_saved_over_an_adapter_with_a_text_encoder(tmp_path: Path) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    with pytest.raises(ValueError, match="holds adapters of text_encoder, which 'default' lacks"):
        save_ether(adapted_unet(), tmp_path)


def test_a_text_encoder_that_does_not_fit_leaves_the_unet_untouched(tmp_path: Path) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    pipe = pipeline()
    pipe.components["text_encoder"] = small_llama()
    before = {name: type(module) for name, module in pipe.components["unet"].named_modules()}
    with pytest.raises(ValueError, match="2 of its 2 projections are not in"):
        load_ether(pipe, tmp_path)
    assert {name: type(module) for name, module in pipe.components["unet"].named_modules()} == before


def test_a_failure_in_the_text_encoder_takes_the_adapter_out_of_the_unet_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ether(pipeline(adapt_text=True), tmp_path)
    pipe, layers = pipeline(), iter(range(100))
    before = output(pipe.components["unet"])
    update = EtherLinear.update_layer

    def failing(self: EtherLinear, *arguments: Any) -> None:
        if next(layers) == 33:  # the second of the text encoder's
            raise MemoryError("no memory left")
        update(self, *arguments)

    monkeypatch.setattr(EtherLinear, "update_layer", failing)
    with pytest.raises(MemoryError, match="no memory left"):
        load_ether(pipe, tmp_path)
    for part in ("unet", "text_encoder"):
        assert not any(isinstance(module, EtherLinear) for module in pipe.components[part].modules())
        assert not hasattr(pipe.components[part], "peft_config")
        assert all(parameter.requires_grad for parameter in pipe.components[part].parameters())
    assert exactly_equal(output(pipe.components["unet"]), before)


def test_a_failure_in_a_peft_model_leaves_its_own_adapter_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ether(adapted_unet(), tmp_path)
    model = get_peft_model(small_unet(), EtherConfig(num_blocks=2))
    before, flags = output(model), [p.requires_grad for p in model.parameters()]
    names = list(model.state_dict())
    monkeypatch.setattr(
        "ether_diffusion.adapters.load.set_peft_model_state_dict",
        lambda *_: (_ for _ in ()).throw(MemoryError("no memory left")),
    )
    with pytest.raises(MemoryError, match="no memory left"):
        load_ether(model, tmp_path, adapter_name="dog")
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert exactly_equal(output(model), before)

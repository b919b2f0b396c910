"""Any model of Linear layers through PEFT alone; and what transformers does: add, save, load, delete."""

import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from small_models import small_llama, small_text_encoder
from tiny_pipelines import tiny_sd
from torch import Tensor
from torch.testing import assert_close
from transformer_families import TRANSFORMERS
from transformers import ViTConfig, ViTModel

from ether_diffusion import EtherConfig
from ether_diffusion.tuner import EtherLinear, FullConfig

TOKENS = {"input_ids": torch.arange(8)[None]}
PIXART = {"hidden_states": torch.linspace(-1, 1, 256).view(1, 4, 8, 8), "timestep": torch.ones(1)}
PIXART |= {"encoder_hidden_states": torch.linspace(-1, 1, 160).view(1, 5, 32)}


def small_vit() -> ViTModel:
    torch.manual_seed(0)
    form = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTModel(ViTConfig(**form, image_size=16, patch_size=8))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "language model": (small_llama, TOKENS),
    "text encoder": (small_text_encoder, TOKENS),
    "vision model": (small_vit, {"pixel_values": torch.ones(1, 3, 16, 16)}),
    "pixart": (
        TRANSFORMERS["pixart"],
        PIXART | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
}
of_transformers = pytest.mark.parametrize("make", [small_llama, small_text_encoder])


def answer(model: Any, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model(**inputs)[0]
    return found


@torch.no_grad()
def output(model: Any) -> Tensor:
    return answer(model.eval(), TOKENS)


def adapted(make: Callable[[], Any], **fields: Any) -> Any:
    model = make()
    model.add_adapter(EtherConfig(target_modules=["q_proj", "v_proj"], **fields), adapter_name="first")
    return model


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # of diffusers' models
@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "to_q", "to_v"], "all-linear"], ids=["some", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_adapted_learns_and_is_saved_loaded_merged_and_restored(
    name: str, variant: str, targets: list[str] | str, tmp_path: Path
) -> None:
    make, inputs = MODELS[name]
    if isinstance(targets, list):
        targets = targets[2:] if name == "pixart" else targets[:2]
    base = make().eval()
    run = partial(answer, inputs=inputs)
    expected = run(base).detach()
    target = torch.randn_like(expected)
    config = EtherConfig(variant=variant, target_modules=targets)  # type: ignore[arg-type]
    model: Any = get_peft_model(base, config).eval()
    assert sum(isinstance(module, EtherLinear) for module in model.modules()) >= 4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    losses = []
    for _ in range(8):
        loss = (run(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    with torch.no_grad():
        learned = run(model)
        with model.disable_adapter():
            assert torch.equal(run(model), expected)
        model.save_pretrained(str(tmp_path))
        for low_cpu_mem_usage in (False, True):
            loaded: Any = PeftModel.from_pretrained(
                make().eval(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
            )
            assert torch.equal(run(loaded), learned)
        plain = loaded.merge_and_unload()
        assert not any(isinstance(module, EtherLinear) for module in plain.modules())
        assert_close(run(plain), learned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [EtherConfig(), FullConfig()], ids=["ETHER", "FULL"])
def test_the_type_is_a_member_of_pefts_enum(config: PeftConfig) -> None:
    kind, name = config.peft_type, type(config).__name__.removesuffix("Config").upper()
    assert isinstance(kind, PeftType)
    assert (kind.name, kind.value, str(kind)) == (name, name, f"PeftType.{name}")
    assert kind is PeftType(name) is PeftType[name] is getattr(PeftType, name)
    assert [kind] == [member for member in PeftType if member == name]
    assert pickle.loads(pickle.dumps(kind)) is copy.deepcopy(kind) is kind
    assert json.loads(json.dumps(config.to_dict(), default=list))["peft_type"] == name


@of_transformers
def test_transformers_saves_an_adapter_and_loads_it_into_its_base(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = adapted(make, variant="ether_plus", init_weights=False)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type == "ETHER"
    fresh = make()
    fresh.load_adapter(str(tmp_path), adapter_name="again")
    assert torch.equal(output(fresh), output(model))
    fresh.disable_adapters()
    assert torch.equal(output(fresh), output(make()))
    assert torch.equal(output(PeftModel.from_pretrained(make(), str(tmp_path)).base_model), output(model))


@of_transformers
def test_transformers_loads_a_base_with_the_adapter_that_names_it(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "base")
    model = type(make()).from_pretrained(tmp_path / "base")
    model.add_adapter(EtherConfig(target_modules=["k_proj"]), adapter_name="first")
    model.save_pretrained(tmp_path / "adapter")
    found = type(model).from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(found), output(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second adapter
@of_transformers
def test_transformers_deletes_one_adapter_of_two(make: Callable[[], Any]) -> None:
    model = adapted(make)
    alone = output(model)
    model.add_adapter(EtherConfig(target_modules=["q_proj"], num_blocks=2), adapter_name="second")
    assert not torch.equal(output(model), alone)
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert model.active_adapters() == ["first"]
    assert torch.equal(output(model), alone)


@of_transformers
def test_what_pefts_lora_alone_can_do_is_refused_in_words(make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'ETHER' is not compatible with the `PeftMixedModel`"):
        get_peft_model(make(), EtherConfig(target_modules=["q_proj"]), mixed=True)
    model = adapted(make)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(str(tmp_path), adapter_name="first", hotswap=True)


def test_a_pipeline_keeps_the_adapter_of_its_text_encoder(tmp_path: Path) -> None:
    tiny_sd().save_pretrained(tmp_path / "base")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    base = output(pipe.text_encoder)
    pipe.text_encoder.add_adapter(EtherConfig(target_modules=["q_proj", "out_proj"]))
    pipe.save_pretrained(tmp_path / "adapted")
    found = StableDiffusionPipeline.from_pretrained(tmp_path / "adapted")
    assert torch.equal(output(found.text_encoder), output(pipe.text_encoder))
    assert not torch.equal(output(found.text_encoder), base)

"""The method's type as PEFT's own, and what transformers does with it: add, save, load, delete."""

import copy
import json
import pickle
from collections.abc import Callable
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

from ether_diffusion import EtherConfig
from ether_diffusion.tuner import FullConfig

TOKENS = torch.arange(8)[None]
MODELS: dict[str, Callable[[], Any]] = {"language model": small_llama, "text encoder": small_text_encoder}
of_each_kind = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@torch.no_grad()
def output(model: Any) -> Tensor:
    found: Tensor = model.eval()(TOKENS)[0]
    return found


def adapted(make: Callable[[], Any], **fields: Any) -> Any:
    model = make()
    model.add_adapter(EtherConfig(target_modules=["q_proj", "v_proj"], **fields), adapter_name="first")
    return model


@pytest.mark.parametrize("config", [EtherConfig(), FullConfig()], ids=["ETHER", "FULL"])
def test_the_type_is_a_member_of_pefts_enum(config: PeftConfig) -> None:
    kind, name = config.peft_type, type(config).__name__.removesuffix("Config").upper()
    assert isinstance(kind, PeftType)
    assert (kind.name, kind.value, str(kind)) == (name, name, f"PeftType.{name}")
    assert kind is PeftType(name) is PeftType[name] is getattr(PeftType, name)
    assert [kind] == [member for member in PeftType if member == name]
    assert pickle.loads(pickle.dumps(kind)) is copy.deepcopy(kind) is kind
    assert json.loads(json.dumps(config.to_dict(), default=list))["peft_type"] == name


@of_each_kind
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


@of_each_kind
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
@of_each_kind
def test_transformers_deletes_one_adapter_of_two(make: Callable[[], Any]) -> None:
    model = adapted(make)
    alone = output(model)
    model.add_adapter(EtherConfig(target_modules=["q_proj"], num_blocks=2), adapter_name="second")
    assert not torch.equal(output(model), alone)
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert model.active_adapters() == ["first"]
    assert torch.equal(output(model), alone)


@of_each_kind
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

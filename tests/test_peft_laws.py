"""The laws that PEFT holds its methods to, for ETHER and ETHER+ on models of several shapes.

Two deviations are the method's: ETHER does not start at the base (a reflection has no identity; ETHER+
does), and adapters stay in float32 whatever the model is cast to, unless autocast_adapter_dtype=False.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.utils import infer_device
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DebertaConfig, DebertaModel

from ether_diffusion import EtherConfig
from ether_diffusion.tuner import EtherLayer

pytestmark = pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")


class Perceptron(nn.Module):
    """Linear layers, an activation in place, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        head: Tensor = self.head(self.second(x).mul_(1.5))
        return head


class Embedded(nn.Module):
    """An embedding before the adapted layer, whose input then wants no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.first = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 3).long().clamp(max=11)
        head: Tensor = self.head(self.first(self.embedding(tokens)))
        return head


class Repeated(nn.Module):
    """One layer that runs twice, on four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x[:, None, None])
        head: Tensor = self.head(self.first(x))
        return head


SHAPES: dict[str, Callable[[], nn.Module]] = {c.__name__: c for c in (Perceptron, Embedded, Repeated)}
CONFIGS: dict[str, dict[str, Any]] = {
    "ether": {"variant": "ether"},
    "ether on both sides": {"variant": "ether", "sides": "both", "num_blocks": 2},
    "ether_plus": {"variant": "ether_plus", "init_weights": False},
    "ether_plus on the input": {
        "variant": "ether_plus",
        "sides": "input",
        "num_blocks": 1,
        "init_weights": False,
    },
}
for_all = pytest.mark.parametrize(
    ("shape", "fields"),
    [
        pytest.param(shape, fields, id=f"{shape}-{name}")
        for shape in SHAPES
        for name, fields in CONFIGS.items()
    ],
)


def base(shape: str) -> nn.Module:
    torch.manual_seed(1)
    return SHAPES[shape]().eval()


def config(fields: dict[str, Any], **further: Any) -> EtherConfig:
    return EtherConfig(target_modules="first|second", **fields, **further)


def adapted(shape: str, fields: dict[str, Any], **further: Any) -> Any:
    model = base(shape)
    torch.manual_seed(2)
    return get_peft_model(model, config(fields, **further)).eval()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(60).view(5, 12) * 7 % 17 / 4 - 2).to(dtype)  # exact in 16 bits


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    floats = [p.dtype for n, p in model.named_parameters() if "ether_" not in n]
    found: Tensor = model(inputs(floats[0]))
    return found


def train(model: Any, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model(inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@for_all
def test_only_the_adapter_is_trained(shape: str, fields: dict[str, Any]) -> None:
    model = adapted(shape, fields)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".ether_" in name}


@for_all
def test_training_changes_what_the_model_says_and_disabling_hides_it(
    shape: str, fields: dict[str, Any]
) -> None:
    model = adapted(shape, fields)
    untrained = output(model)
    train(model)
    assert not torch.allclose(output(model), untrained)
    with model.disable_adapter():
        assert torch.equal(output(model), output(base(shape)))
    assert not torch.equal(output(model), output(base(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_base_for_ether_plus_alone(shape: str) -> None:
    assert torch.equal(output(adapted(shape, {"variant": "ether_plus"})), output(base(shape)))
    assert not torch.allclose(output(adapted(shape, {"variant": "ether"})), output(base(shape)))


@for_all
@pytest.mark.parametrize("safe_merge", [True, False])
def test_merging_and_unloading_give_a_plain_model(
    shape: str, fields: dict[str, Any], safe_merge: bool
) -> None:
    model = adapted(shape, fields)
    expected = output(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert_close(output(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model), expected)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert_close(output(merged), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, EtherLayer) for module in merged.modules())


@for_all
def test_a_safe_merge_refuses_what_is_not_finite(shape: str, fields: dict[str, Any]) -> None:
    model = adapted(shape, fields)
    for name, parameter in model.named_parameters():
        if ".ether_" in name:
            parameter.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="would give weights that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(output(model.unload()), output(base(shape)))


@for_all
def test_unloading_gives_the_base_back(shape: str, fields: dict[str, Any]) -> None:
    model = adapted(shape, fields)
    train(model)
    assert torch.equal(output(model.unload()), output(base(shape)))


@for_all
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_what_is_saved_is_loaded(
    shape: str, fields: dict[str, Any], low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = adapted(shape, fields, modules_to_save=["head"])
    train(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base(shape), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded), output(model))
    assert not any(p.requires_grad for p in loaded.parameters())


@for_all
def test_modules_to_save_are_trained_beside_the_adapter(shape: str, fields: dict[str, Any]) -> None:
    model = adapted(shape, fields, modules_to_save=["head"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".ether_" in name or "modules_to_save" in name}
    with model.disable_adapter():
        assert torch.equal(output(model), output(base(shape)))


@for_all
def test_two_adapters_live_side_by_side(shape: str, fields: dict[str, Any]) -> None:
    model = adapted(shape, fields)
    first = output(model)
    torch.manual_seed(3)
    model.add_adapter("other", config(fields))
    assert torch.equal(output(model), first)
    model.set_adapter("other")
    other = output(model)
    assert not torch.allclose(other, first)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(output(model), first)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("other")
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(output(model), other)
    assert not any(name.endswith(".default") for name, _ in model.named_parameters())


@for_all
def test_a_merged_adapter_is_neither_deleted_nor_merged_twice(shape: str, fields: dict[str, Any]) -> None:
    model = adapted(shape, fields)
    model.merge_adapter()
    merged = output(model)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert torch.equal(output(model), merged)


@for_all
def test_each_sample_of_a_batch_has_the_adapter_that_is_named(shape: str, fields: dict[str, Any]) -> None:
    model = adapted(shape, fields, modules_to_save=["head"])
    torch.manual_seed(3)
    model.add_adapter("other", config({"variant": "ether"}, modules_to_save=["head"]))
    names = ["default", "__base__", "other", "default", "other"]
    with torch.no_grad():
        mixed = model(inputs(), adapter_names=names)
    alone: dict[str, Tensor] = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = output(model)
    with model.disable_adapter():
        alone["__base__"] = output(model)
    for row, name in enumerate(names):
        assert_close(mixed[row], alone[name][row], atol=1e-5, rtol=1e-5)


def test_a_mixed_batch_that_cannot_be_is_refused() -> None:
    model = adapted("Perceptron", CONFIGS["ether"])
    for names, sentence in (
        (["default"], "the batch has 5 rows and mixed_adapters names 1 adapters"),
        (["nobody"] * 5, "no adapter named nobody; loaded are default"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(inputs(), adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match="adapter_names gives no gradients"):
        model(inputs(), adapter_names=["default"] * 5)


@for_all
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_is_in_float32_unless_it_is_to_be_as_the_base(
    shape: str, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    expected = output(adapted(shape, fields))
    for autocast, wanted in ((True, torch.float32), (False, dtype)):
        model = base(shape).to(dtype)
        torch.manual_seed(2)
        model = get_peft_model(model, config(fields), autocast_adapter_dtype=autocast).eval()
        model.add_adapter("other", config(fields), autocast_adapter_dtype=autocast)
        assert {p.dtype for name, p in model.named_parameters() if ".ether_" in name} == {wanted}
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
        error = (output(model).float() - expected).norm() / expected.norm()
        assert error < 16 * torch.finfo(dtype).eps  # three layers' roundings
        model(inputs(dtype)).float().square().mean().backward()
        assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


@for_all
@pytest.mark.parametrize("autocast", [True, False])
def test_a_loaded_adapter_has_the_dtype_that_is_asked_for(
    shape: str, fields: dict[str, Any], autocast: bool, tmp_path: Path
) -> None:
    adapted(shape, fields).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(base(shape).bfloat16(), str(tmp_path), autocast_adapter_dtype=autocast)
    model.load_adapter(str(tmp_path), adapter_name="again", autocast_adapter_dtype=autocast)
    wanted = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if ".ether_" in name} == {wanted}


@for_all
def test_autocast_is_the_dtype_of_the_products(shape: str, fields: dict[str, Any]) -> None:
    model = adapted(shape, fields)
    with torch.autocast(infer_device(), dtype=torch.bfloat16):
        assert output(model).dtype == torch.bfloat16


@for_all
def test_it_says_what_is_adapted(shape: str, fields: dict[str, Any]) -> None:
    text = repr(adapted(shape, fields))
    assert "EtherLinear" in text
    assert f"default: {fields.get('num_blocks', 4)} blocks at 1" in text
    assert "(base_layer): Linear" in text


def test_a_transformer_that_works_in_place_is_trained() -> None:
    torch.manual_seed(1)
    form = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "relative_attention": True,
        "pos_att_type": "c2p|p2c",
    }
    model = get_peft_model(DebertaModel(DebertaConfig(**form)), EtherConfig(target_modules="all-linear"))
    model(input_ids=torch.arange(8)[None]).last_hidden_state.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert len(trained) == 6

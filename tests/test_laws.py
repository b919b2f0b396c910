"""The laws of an adapter: of one layer against dense float64, and of a model as PEFT holds its methods to.

Two deviations are the method's: ETHER does not start at the base (a reflection has no identity; ETHER+ does),
and adapters stay in float32 whatever the model is cast to, unless autocast_adapter_dtype=False.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import dense_weight, in_float64
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.utils import infer_device
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DebertaConfig, DebertaModel

from ether_diffusion import EtherConfig
from ether_diffusion.tuner import EtherLayer, EtherLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # the base is a toy
]

WIDTH, HEIGHT = 32, 48
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
# in 16 bits W' is rounded when merged, y when not


class Base(nn.Module):
    """Two projections, one adapted, so that an adapter is only part of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, HEIGHT)
        self.head = nn.Linear(HEIGHT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.to_q(x))


class Case:
    """A model with an adapter that is far from where it starts, its adapted layer, and inputs."""

    def __init__(self, variant: str, sides: str, num_blocks: int, dtype: torch.dtype) -> None:
        self.fields: dict[str, Any] = {"variant": variant, "sides": sides, "num_blocks": num_blocks}
        self.variant, self.sides, self.dtype = variant, sides, dtype
        self.base = Base().to(dtype).eval()
        self.projection, self.weight = self.base.to_q, self.base.to_q.weight.detach().clone()
        self.model: Any = get_peft_model(self.base, self.config(init_weights=False))
        if dtype == torch.float64:
            self.model.double()  # the vectors too: they follow upwards, never downwards
        self.layer: EtherLinear = self.model.base_model.model.to_q
        self.x = torch.randn(5, WIDTH, dtype=dtype)

    def config(self, **further: Any) -> EtherConfig:
        return EtherConfig(target_modules=["to_q"], **self.fields, **further)

    def close(self, found: Tensor, expected: Tensor) -> None:
        tolerance = TOLERANCE[self.dtype]
        assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


CASES = list(itertools.product(["ether", "ether_plus"], ["input", "output", "both"], [1, 4, 16], TOLERANCE))


@pytest.fixture(params=CASES, ids=[f"{v}-{s}-{n}-{str(d)[6:]}" for v, s, n, d in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@torch.no_grad()
def test_forward_is_the_dense_oracle_and_merging_changes_nothing_but_rounding(case: Case) -> None:
    layer, before = case.layer, case.layer(case.x)
    wide = [None if side is None else in_float64(side) for side in layer.vectors("default")]
    weight, bias = case.weight.double(), layer.base_linear.bias.double()
    case.close(before, F.linear(case.x.double(), dense_weight(weight, *wide), bias))
    layer.merge(safe_merge=True)
    case.close(layer(case.x), before)


@torch.no_grad()
def test_unmerging_gives_the_base_back_bit_for_bit(case: Case) -> None:
    for _ in range(3):
        case.layer.merge()
        assert not torch.equal(case.layer.base_linear.weight, case.weight)
        case.layer.unmerge()
    assert torch.equal(case.layer.base_linear.weight, case.weight)


@torch.no_grad()
def test_a_scale_is_a_straight_line_from_the_base_which_is_there_bit_for_bit_at_zero(case: Case) -> None:
    layer = case.layer
    whole, base = layer(case.x), layer.base_linear(case.x)
    layer.set_scale("default", 0.3)
    case.close(layer(case.x), base.double() + 0.3 * (whole.double() - base.double()))
    layer.set_scale("default", 0.0)
    assert torch.equal(layer(case.x), base)
    layer.merge()
    assert torch.equal(layer.base_linear.weight, case.weight)


def test_only_the_adapters_vectors_train_and_in_float32(case: Case) -> None:
    trained = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    assert all("ether_" in name for name in trained)
    wanted = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert {p.dtype for p in trained.values()} == {wanted}
    width = {"input": WIDTH, "output": HEIGHT, "both": WIDTH + HEIGHT}[case.sides]
    assert sum(p.numel() for p in trained.values()) == width * (2 if case.variant == "ether_plus" else 1)
    case.model(case.x).float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in trained.values())


@torch.no_grad()
def test_ether_plus_starts_at_the_base_bit_for_bit_and_ether_never_does(case: Case) -> None:
    base, x = Base().to(case.dtype).eval(), torch.randn(100, WIDTH, dtype=case.dtype)
    expected = base(x)
    model = get_peft_model(base, case.config(init_weights=True))
    assert torch.equal(model(x), expected) == (case.variant == "ether_plus")


@torch.no_grad()
def test_saved_copied_and_pickled_it_is_the_same_model_bit_for_bit(case: Case, tmp_path: Path) -> None:
    expected = case.layer(case.x)
    assert torch.equal(copy.deepcopy(case.layer)(case.x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(case.layer))(case.x), expected)
    pristine = copy.deepcopy(case.model).unload()
    case.model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(pristine, str(tmp_path)).to(case.dtype)
    case.model.float().to(case.dtype)  # PEFT loads float64 into float32 vectors
    assert torch.equal(loaded(case.x), case.model(case.x))


@torch.no_grad()
def test_unloading_gives_back_the_very_module_and_merging_it_the_adapters_output(case: Case) -> None:
    expected, other = case.model(case.x), copy.deepcopy(case.model)
    assert case.model.unload().to_q is case.projection
    assert torch.equal(case.projection.weight, case.weight)
    merged = other.merge_and_unload(safe_merge=True)
    assert type(merged.to_q) is nn.Linear
    case.close(merged(case.x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_thousand_merges_leave_no_trace(dtype: torch.dtype) -> None:
    case = Case("ether_plus", "both", 4, dtype)
    for _ in range(1000):
        case.layer.merge()
        case.layer.unmerge()
    assert torch.equal(case.layer.base_linear.weight, case.weight)


@torch.no_grad()
def test_casting_reaches_a_merged_base_and_never_the_adapter() -> None:
    case = Case("ether_plus", "both", 4, torch.float32)
    before = [p.clone() for name, p in case.model.named_parameters() if "ether_" in name]
    case.layer.merge()
    case.model.to(torch.bfloat16)
    case.layer.unmerge()
    assert torch.equal(case.layer.base_linear.weight, case.weight.bfloat16())
    after = [p for name, p in case.model.float().named_parameters() if "ether_" in name]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@torch.no_grad()
def test_pefts_converter_finds_the_same_update(variant: str) -> None:
    case = Case(variant, "input", 4, torch.float32)
    expected = case.model(case.x)
    lora, tensors = convert_to_lora(case.model, rank=8)
    converted = get_peft_model(copy.deepcopy(case.model).unload(), lora)
    set_peft_model_state_dict(converted, tensors)
    case.close(converted(case.x), expected)


class Perceptron(nn.Module):
    """Linear layers, an activation in place, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x), inplace=True)).mul_(1.5))


class Embedded(nn.Module):
    """An embedding before the adapted layer, whose input then wants no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.head = nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self.embedding((x.abs() * 3).long().clamp(max=11))))


class Repeated(nn.Module):
    """One layer that runs twice, on four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self.first(x[:, None, None])))


CONFIGS: dict[str, dict[str, Any]] = {
    "ether": {"variant": "ether"},
    "ether on both sides": {"variant": "ether", "sides": "both", "num_blocks": 2},
    "ether_plus": {"variant": "ether_plus", "init_weights": False},
    "ether_plus on the input": {"variant": "ether_plus", "sides": "input", "init_weights": False},
}


class Subject:
    """A kind of model and of adapter."""

    def __init__(self, shape: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
        self.shape, self.fields = shape, fields

    def base(self) -> nn.Module:
        torch.manual_seed(1)
        return self.shape().eval()

    def config(self, **further: Any) -> EtherConfig:
        return EtherConfig(target_modules="first|second", **(self.fields | further))

    def adapted(self, base: nn.Module | None = None, **options: Any) -> Any:
        save = {"modules_to_save": options.pop("modules_to_save")} if "modules_to_save" in options else {}
        model = base or self.base()
        torch.manual_seed(2)
        return get_peft_model(model, self.config(**save), **options).eval()

    @property
    def plain(self) -> Tensor:
        return output(self.base())


SUBJECTS = list(itertools.product((Perceptron, Embedded, Repeated), CONFIGS))


@pytest.fixture(params=SUBJECTS, ids=[f"{shape.__name__}-{name}" for shape, name in SUBJECTS])
def subject(request: pytest.FixtureRequest) -> Subject:
    shape, name = request.param
    return Subject(shape, CONFIGS[name])


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(60).view(5, 12) * 7 % 17 / 4 - 2).to(dtype)  # exact in 16 bits


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    floats = [p.dtype for n, p in model.named_parameters() if "ether_" not in n]
    found: Tensor = model(inputs(floats[0]))
    return found


def train(model: Any) -> set[str]:
    """Do three steps; return the names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".ether_" in name}


def in_training(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


def test_training_moves_the_adapter_alone_which_can_be_disabled_and_unloaded(subject: Subject) -> None:
    model = subject.adapted()
    untrained = output(model)
    assert train(model) == set(adapters_of(model))
    trained = output(model)
    assert not torch.allclose(trained, untrained)
    with model.disable_adapter():
        assert torch.equal(output(model), subject.plain)
    assert torch.equal(output(model), trained)
    assert torch.equal(output(model.unload()), subject.plain)


@pytest.mark.parametrize("safe_merge", [True, False])
def test_merging_and_unloading_give_a_plain_model(subject: Subject, safe_merge: bool) -> None:
    model = subject.adapted()
    expected = output(model)
    model.merge_adapter(safe_merge=safe_merge)
    merged = output(model)
    assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert torch.equal(output(model), merged)
    model.unmerge_adapter()
    assert torch.equal(output(model), expected)
    plain = model.merge_and_unload(safe_merge=safe_merge)
    assert_close(output(plain), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, EtherLayer) for module in plain.modules())


def test_a_safe_merge_refuses_what_is_not_finite(subject: Subject) -> None:
    model = subject.adapted()
    for parameter in adapters_of(model).values():
        parameter.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="would give weights that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(output(model.unload()), subject.plain)


def test_modules_to_save_are_trained_beside_the_adapter_saved_and_loaded(
    subject: Subject, tmp_path: Path
) -> None:
    model = subject.adapted(modules_to_save=["head"])
    saved = {name for name, _ in model.named_parameters() if "modules_to_save" in name}
    assert train(model) == set(adapters_of(model)) | saved
    assert saved
    with model.disable_adapter():
        assert torch.equal(output(model), subject.plain)
    model.save_pretrained(str(tmp_path))
    for low_cpu_mem_usage in (True, False):
        loaded = PeftModel.from_pretrained(subject.base(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(output(loaded), output(model))
        assert not in_training(loaded)


def test_two_adapters_live_side_by_side(subject: Subject) -> None:
    model = subject.adapted()
    first = output(model)
    torch.manual_seed(3)
    model.add_adapter("other", subject.config())
    assert torch.equal(output(model), first)
    model.set_adapter("other")
    other = output(model)
    assert not torch.allclose(other, first)
    assert in_training(model) == {"other"}
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(output(model), first)
    assert not in_training(model)
    model.set_requires_grad("other")
    assert in_training(model) == {"other"}
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(output(model), other)
    assert {name.rpartition(".")[2] for name in adapters_of(model)} == {"other"}


def test_each_sample_of_a_batch_has_the_adapter_that_is_named(subject: Subject) -> None:
    model = subject.adapted(modules_to_save=["head"])
    torch.manual_seed(3)
    other = EtherConfig(target_modules="first|second", modules_to_save=["head"])
    model.add_adapter("other", other)
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
    model = Subject(Perceptron, CONFIGS["ether"]).adapted()
    for names, sentence in ((["default"], "names 1 adapters"), (["nobody"] * 5, "no adapter named nobody")):
        with pytest.raises(ValueError, match=sentence):
            model(inputs(), adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match="adapter_names gives no gradients"):
        model(inputs(), adapter_names=["default"] * 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_an_adapter_is_in_float32_unless_it_is_to_be_as_the_base(
    subject: Subject, dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    wanted = torch.float32 if autocast else dtype
    exact = subject.adapted()
    exact.save_pretrained(str(tmp_path))
    model = subject.adapted(subject.base().to(dtype), autocast_adapter_dtype=autocast)
    model.add_adapter("other", subject.config(), autocast_adapter_dtype=autocast)
    model.load_adapter(str(tmp_path), adapter_name="loaded", autocast_adapter_dtype=autocast)
    assert {p.dtype for p in adapters_of(model).values()} == {wanted}
    assert in_training(model) == {"default"}
    error = (output(model).float() - output(exact)).norm() / output(exact).norm()
    assert error < 16 * torch.finfo(dtype).eps  # three layers' roundings
    model(inputs(dtype)).float().square().mean().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    with torch.autocast(infer_device(), dtype=torch.bfloat16):
        assert output(exact).dtype == torch.bfloat16


def test_it_says_what_is_adapted(subject: Subject) -> None:
    text = repr(subject.adapted())
    assert f"default: {subject.fields.get('num_blocks', 4)} blocks at 1" in text
    assert "(base_layer): Linear" in text


def test_a_transformer_that_works_in_place_is_trained() -> None:
    form: dict[str, Any] = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    form |= {"intermediate_size": 16, "relative_attention": True, "pos_att_type": "c2p|p2c"}
    model = get_peft_model(DebertaModel(DebertaConfig(**form)), EtherConfig(target_modules="all-linear"))
    model(input_ids=torch.arange(8)[None]).last_hidden_state.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6
    assert all(p.grad is not None for p in trained)

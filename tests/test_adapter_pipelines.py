"""A pipeline's adapters are saved and loaded together, whole or not at all, from a folder or the Hub."""

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Factory, Patch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from hostile_files import state
from huggingface_hub import DryRunFileInfo
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from small_models import adapted_unet, exactly_equal, output, small_llama, small_text_encoder, small_unet
from tiny_pipelines import tiny_sd
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import load_ether, read_adapter, save_ether
from ether_diffusion.tuner import EtherLinear

OTHERS = ["transformer_2", "controlnet", "motion_adapter", "image_encoder", "vae", "prior"]


def pipeline(**components: object) -> SimpleNamespace:
    parts = {"unet": small_unet(), "vae": None, "scheduler": object(), "text_encoder": small_text_encoder()}
    return SimpleNamespace(components=parts | components)


def adapted_pipeline() -> SimpleNamespace:
    text_encoder = small_text_encoder()
    text_encoder.add_adapter(EtherConfig(target_modules=["q_proj"]))
    return pipeline(unet=adapted_unet(), text_encoder=text_encoder)


def encoded(pipe: SimpleNamespace) -> Tensor:
    with torch.no_grad():
        result: Tensor = pipe.components["text_encoder"](torch.arange(10)[None])[0]
    return result


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: Factory) -> Path:
    """The adapters of adapted_pipeline()."""
    folder = tmp_path_factory.mktemp("with_text")
    save_ether(adapted_pipeline(), folder)
    return folder


@pytest.fixture(scope="module")
def of_unet(tmp_path_factory: Factory) -> Path:
    folder = tmp_path_factory.mktemp("of_unet")
    save_ether(adapted_unet(), folder)
    return folder


def test_a_pipeline_takes_back_the_adapters_of_unet_and_text_encoder(with_text: Path) -> None:
    fresh, adapted = pipeline(), adapted_pipeline()
    assert (with_text / "text_encoder" / "adapter_model.safetensors").exists()
    report = load_ether(fresh, with_text, adapter_name="dog")
    assert report.components == {"unet": 32, "text_encoder": 2}
    assert exactly_equal(output(fresh.components["unet"]), output(adapted.components["unet"]))
    assert exactly_equal(encoded(fresh), encoded(adapted))
    assert not exactly_equal(encoded(fresh), encoded(pipeline()))


@pytest.mark.parametrize("with_denoiser", [True, False])
def test_every_component_with_the_adapter_is_saved_and_loaded(with_denoiser: bool, tmp_path: Path) -> None:
    forms = [(sides, n) for sides in ("input", "output") for n in (1, 2, 4)]
    adapted = {
        name: adapted_unet(sides=form[0], num_blocks=form[1])
        for name, form in zip(OTHERS, forms, strict=True)
    }
    adapted["transformer"] = adapted_unet() if with_denoiser else small_unet()
    save_ether(SimpleNamespace(components=adapted), tmp_path)
    fresh = {name: small_unet() for name in adapted}
    report = load_ether(SimpleNamespace(components=fresh), tmp_path)
    assert report.components == ({"transformer": 32} if with_denoiser else {}) | dict.fromkeys(OTHERS, 32)
    for part, model in fresh.items():
        assert exactly_equal(output(model), output(adapted[part]))


def test_a_pipeline_without_a_component_refuses_its_adapter_and_a_unet_is_not_saved_over_it(
    with_text: Path, tmp_path: Path
) -> None:
    pipe = pipeline(text_encoder=None)
    before = state(pipe.components["unet"])
    with pytest.raises(ValueError, match="an adapter of text_encoder, which this pipeline lacks"):
        load_ether(pipe, with_text)
    assert state(pipe.components["unet"]) == before
    with pytest.raises(ValueError, match="holds adapters of text_encoder, which 'default' lacks"):
        save_ether(adapted_unet(), with_text)
    for name in OTHERS:
        shutil.copytree(with_text / "text_encoder", tmp_path / name / name)
        for path in with_text.glob("adapter_*"):
            shutil.copy(path, tmp_path / name)
        with pytest.raises(ValueError, match=f"an adapter of {name}, which this pipeline lacks"):
            load_ether(pipe, tmp_path / name)
        with pytest.raises(ValueError, match=f"holds adapters of {name}, which 'default' lacks"):
            save_ether(adapted_unet(), tmp_path / name)


def test_a_bare_unet_is_told_of_the_text_encoders_adapter_that_it_leaves(with_text: Path) -> None:
    with pytest.warns(UserWarning, match="also holds an adapter of text_encoder, which is not loaded"):
        load_ether(small_unet(), with_text)


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
    pipe = pipeline(unet=adapted_unet())
    pipe.components["text_encoder"].add_adapter(LoraConfig(target_modules=["q_proj"]), "default")
    with pytest.raises(ValueError, match="'default' is an adapter of another method in text_encoder"):
        save_ether(pipe, tmp_path)
    assert not list(tmp_path.iterdir())
    save_ether(pipe.components["unet"], tmp_path)


def test_a_model_under_two_names_is_one_part(tmp_path: Path) -> None:
    unet = adapted_unet()
    save_ether(SimpleNamespace(components={"unet": unet, "controlnet": unet}), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_what_holds_no_model_that_can_be_adapted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has none of unet, transformer"):
        save_ether(SimpleNamespace(components={"vae": nn.Linear(2, 2)}), tmp_path)
    with pytest.raises(ValueError, match="str is neither a torch module nor a diffusers pipeline"):
        load_ether("model", tmp_path)  # type: ignore[arg-type]


def test_a_text_encoder_that_does_not_fit_leaves_the_unet_untouched(with_text: Path) -> None:
    pipe = pipeline(text_encoder=small_llama())
    before = state(pipe.components["unet"])
    with pytest.raises(ValueError, match="2 of its 2 projections are not in"):
        load_ether(pipe, with_text)
    assert state(pipe.components["unet"]) == before


def test_a_failure_in_the_text_encoder_takes_it_out_of_the_unet(with_text: Path, monkeypatch: Patch) -> None:
    pipe, layers = pipeline(), iter(range(100))
    before = state(pipe.components["unet"])
    update = EtherLinear.update_layer

    def failing(self: EtherLinear, *arguments: Any) -> None:
        if next(layers) == 33:  # the second of the text encoder's
            raise MemoryError("no memory left")
        update(self, *arguments)

    monkeypatch.setattr(EtherLinear, "update_layer", failing)
    with pytest.raises(MemoryError, match="no memory left"):
        load_ether(pipe, with_text)
    assert state(pipe.components["unet"]) == before
    text_encoder = pipe.components["text_encoder"]
    assert not any(isinstance(module, EtherLinear) for module in text_encoder.modules())
    assert not hasattr(text_encoder, "peft_config")
    assert all(parameter.requires_grad for parameter in text_encoder.parameters())


def test_a_failure_in_a_peft_model_leaves_its_adapter_in_training(of_unet: Path, monkeypatch: Patch) -> None:
    model = get_peft_model(small_unet(), EtherConfig(num_blocks=2))
    before, flags = output(model), [p.requires_grad for p in model.parameters()]
    names = list(model.state_dict())
    monkeypatch.setattr(
        "ether_diffusion.adapters.load.set_peft_model_state_dict",
        lambda *_: (_ for _ in ()).throw(MemoryError("no memory left")),
    )
    with pytest.raises(MemoryError, match="no memory left"):
        load_ether(model, of_unet, adapter_name="dog")
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert exactly_equal(output(model), before)


# adapters of the Hub


@pytest.fixture
def hub_cache(tmp_path: Path, of_unet: Path, monkeypatch: Patch) -> Path:
    """A cache of the Hub as a download leaves it, with the adapter somebody/dog."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--somebody--dog"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(of_unet, repository / "snapshots" / revision)
    return tmp_path / "hub"


@pytest.mark.parametrize("is_offline", [True, False])
def test_an_adapter_of_the_hub_is_read_from_what_was_downloaded(
    is_offline: bool, hub_cache: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
    pipe = pipeline()
    report = load_ether(pipe, "somebody/dog", local_files_only=not is_offline)
    assert report.components == {"unet": 32}
    assert exactly_equal(output(pipe.components["unet"]), output(adapted_unet()))
    with pytest.raises(FileNotFoundError, match="of somebody/cat has not been downloaded"):
        read_adapter("somebody/cat", local_files_only=not is_offline)


def test_a_folder_is_taken_before_the_hub(hub_cache: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(next(hub_cache.glob("*/snapshots/*")), tmp_path / "somebody" / "cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_adapter("somebody/cat").projections()) == 32


@pytest.fixture
def hub(of_unet: Path, monkeypatch: Patch) -> Callable[..., list[str]]:
    """Let a Hub have one model, whose files have the sizes given; return what it gives out."""

    def stand_in(folder: Path = of_unet, **sizes: int) -> list[str]:
        fetched = list[str]()

        def download(
            repo_id: str, filename: str, *, subfolder: str | None, dry_run: bool = False, **_: object
        ) -> str | DryRunFileInfo:
            path = folder / (subfolder or "") / filename
            if not path.exists():
                raise EntryNotFoundError(f"no {filename}")
            if dry_run:
                size = sizes.get(path.stem, path.stat().st_size)
                return DryRunFileInfo(
                    "0" * 40, size, filename, str(path), is_cached=False, will_download=True
                )
            fetched.append(filename)
            return str(path)

        # whatever the variable of this name says where the tests run
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return fetched

    return stand_in


def test_a_file_of_the_hub_that_is_too_large_is_not_downloaded(hub: Callable[..., list[str]]) -> None:
    fetched = hub(adapter_model=10**9)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has 1000000000 bytes"):
        load_ether(small_unet(), "somebody/dog")
    assert fetched == ["adapter_config.json"]


def test_a_hub_lora_is_named(hub: Callable[..., list[str]], tmp_path: Path, monkeypatch: Patch) -> None:
    hub(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.file_exists", lambda _, name, **__: name == "pytorch_lora_weights.safetensors"
    )
    with pytest.raises(ValueError, match=r"this is a LoRA; use pipe\.load_lora_weights"):
        load_ether(small_unet(), "somebody/lora")


def test_a_model_within_several_is_named_rather_than_left_out(tmp_path: Path) -> None:
    base = tiny_sd()
    make = partial(ControlNetModel.from_unet, tiny_sd().unet, conditioning_embedding_out_channels=(8, 16))
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=[make(), make()])
    pipe.unet.add_adapter(EtherConfig(), "default")
    pipe.controlnet.nets[1].add_adapter(EtherConfig(), "default")
    with pytest.raises(ValueError, match=r"carried by a model within controlnet, .* save by itself"):
        save_ether(pipe, tmp_path)
    assert not list(tmp_path.iterdir())
    save_ether(pipe.controlnet.nets[1], tmp_path)
    other = make()
    assert load_ether(other, tmp_path).base_match == "same"

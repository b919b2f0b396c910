"""Any model of Linear layers: text encoders, DiT transformers, a ViT, through the same config."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

from ether_diffusion import EtherConfig, load_ether, save_ether
from ether_diffusion.tuner import EtherLinear

Case = tuple[Callable[[], nn.Module], dict[str, object], list[str], int]


def clip_text() -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return CLIPTextModel(config)


def vit() -> nn.Module:
    return ViTModel(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=32,
        norm_num_groups=4,
    )


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


IMAGE = torch.linspace(-1, 1, 256).view(1, 4, 8, 8)
TEXT = torch.linspace(-1, 1, 160).view(1, 5, 32)
CASES: dict[str, Case] = {
    "clip text": (
        clip_text,
        {"input_ids": torch.arange(6)[None]},
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        8,
    ),
    "vit": (vit, {"pixel_values": torch.ones(1, 3, 16, 16)}, ["q_proj", "v_proj"], 4),
    "sd3": (
        sd3,
        {
            "hidden_states": IMAGE,
            "encoder_hidden_states": TEXT,
            "pooled_projections": torch.ones(1, 16),
            "timestep": torch.ones(1),
        },
        ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"],
        10,
    ),
    "pixart": (
        pixart,
        {
            "hidden_states": IMAGE,
            "encoder_hidden_states": TEXT,
            "timestep": torch.ones(1),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        ["to_q", "to_k", "to_v", "to_out.0"],
        16,
    ),
    "flux": (
        flux,
        {
            "hidden_states": torch.ones(1, 9, 4),
            "encoder_hidden_states": TEXT,
            "pooled_projections": torch.ones(1, 32),
            "timestep": torch.ones(1),
            "img_ids": torch.zeros(9, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        ["to_q", "to_k", "to_v", "to_out.0"],
        7,
    ),
}


def output(model: nn.Module, inputs: dict[str, object]) -> Tensor:
    found: Tensor = model(**inputs)[0]
    return found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
def test_a_model_is_adapted_trained_merged_and_restored(case: Case, variant: str) -> None:
    make, inputs, targets, projections = case
    model = make().eval()
    base = output(model, inputs)
    adapted = get_peft_model(
        model,
        EtherConfig(variant=variant, target_modules=targets, init_weights=False),  # type: ignore[arg-type]
    )
    assert sum(isinstance(module, EtherLinear) for module in adapted.modules()) == projections
    moved = output(adapted, inputs)
    assert (moved - base).norm() > 1e-3 * base.norm()
    moved.square().mean().backward()
    # the last text block of a joint transformer answers to nothing
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    with adapted.disable_adapter(), torch.no_grad():
        assert torch.equal(output(adapted, inputs), base)
    assert_close(output(adapted.merge_and_unload(), inputs), moved, atol=1e-5, rtol=1e-4)


def test_a_model_is_saved_and_loaded_by_name(case: Case, tmp_path: object) -> None:
    make, inputs, targets, projections = case
    torch.manual_seed(3)
    model = make().eval()
    adapted = get_peft_model(model, EtherConfig(target_modules=targets)).eval()
    with torch.no_grad():
        expected = output(adapted, inputs)
    save_ether(adapted, str(tmp_path))
    torch.manual_seed(3)
    fresh = make().eval()
    report = load_ether(fresh, str(tmp_path))
    assert (report.num_projections, report.base_match) == (projections, "same")
    with torch.no_grad():
        assert torch.equal(output(fresh, inputs), expected)

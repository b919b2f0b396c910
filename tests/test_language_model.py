"""ETHER on something that is no image model: a small Llama, through PEFT alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from ether_diffusion import EtherConfig


def tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
        return LlamaForCausalLM(config).eval()


TOKENS = torch.arange(24).view(2, 12) % 40


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(TOKENS).logits
    return found


def trained(variant: str, target_modules: list[str] | str) -> tuple[Any, list[float]]:
    model = get_peft_model(
        tiny_llama(),
        EtherConfig(variant=variant, target_modules=target_modules, task_type="CAUSAL_LM"),  # type: ignore[arg-type]
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    losses = []
    for _ in range(15):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("variant", ["ether", "ether_plus"])
@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear"])
def test_a_language_model_learns_saves_and_loads(
    variant: str, target_modules: list[str] | str, tmp_path: Path
) -> None:
    model, losses = trained(variant, target_modules)
    assert losses[-1] < losses[0] - 0.02
    model.save_pretrained(str(tmp_path))
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))
    assert_close(logits(loaded.merge_and_unload()), logits(model))


def test_a_disabled_adapter_is_the_base(tmp_path: Path) -> None:
    model, _ = trained("ether", ["q_proj"])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))


def test_a_second_adapter_can_be_loaded_and_chosen(tmp_path: Path) -> None:
    model, _ = trained("ether", ["q_proj"])
    model.save_pretrained(str(tmp_path))
    both = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), adapter_name="one")
    both.add_adapter(
        "two", EtherConfig(variant="ether_plus", target_modules=["v_proj"], task_type="CAUSAL_LM")
    )
    both.set_adapter("two")
    assert torch.equal(logits(both), logits(tiny_llama()))  # ETHER+ starts at the base
    both.set_adapter("one")
    assert torch.equal(logits(both), logits(model))

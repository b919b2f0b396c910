"""Adapters of other kinds: recognised, so that the refusal can say what they are and who reads them."""

from collections.abc import Mapping

DIFFUSERS_HINT = "use pipe.load_lora_weights"
PEFT_HINT = "use peft.PeftModel.from_pretrained"

_KINDS = (
    # (parts of a tensor's name, what it is, the axis that is the rank, who reads it)
    (
        ("lora_down.weight", "lora.down.weight", "lora_A", "lora_linear_layer.down"),
        "a LoRA",
        0,
        DIFFUSERS_HINT,
    ),
    (("lora_up.weight", "lora.up.weight", "lora_B", "lora_linear_layer.up"), "a LoRA", 1, DIFFUSERS_HINT),
    (("hada_w1_", "hada_w2_"), "a LoHa", None, DIFFUSERS_HINT),
    (("lokr_w1", "lokr_w2"), "a LoKr", None, DIFFUSERS_HINT),
    (("oft_R", "oft_r", "oft_blocks", "oft_diag"), "an OFT adapter", None, PEFT_HINT),
    (("boft_R", "boft_s"), "a BOFT adapter", None, PEFT_HINT),
    (("hra_u",), "an HRA adapter", None, PEFT_HINT),
    (("ia3_l",), "an IA³ adapter", None, PEFT_HINT),
    (("delora_",), "a DeLoRA adapter", None, PEFT_HINT),
    (("full_weight", "full_bias"), "a full fine-tuning", None, PEFT_HINT),
)


def foreign_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say what kind of adapter tensors of these names and shapes are, and what to use; None if not known."""
    for parts, kind, rank_axis, hint in _KINDS:
        found = [shape for name, shape in shapes.items() if any(part in name for part in parts)]
        if found:
            ranks = {shape[rank_axis] for shape in found if rank_axis is not None and len(shape) > rank_axis}
            return f"this is {kind}{_of_rank(ranks)}; {hint}"
    return None


def foreign_method(peft_type: str, rank: int | None) -> str:
    """Say what an adapter_config.json of another PEFT method is, and what to use."""
    if peft_type == "LORA":
        ranks = set() if rank is None else {rank}
        return f"this is a LoRA{_of_rank(ranks)}; {DIFFUSERS_HINT} or {PEFT_HINT.removeprefix('use ')}"
    return f"this is an adapter of the method {peft_type}; {PEFT_HINT}"


def _of_rank(ranks: set[int]) -> str:
    if not ranks:
        return ""
    return f" of rank {min(ranks)}" if len(ranks) == 1 else f" of ranks {min(ranks)} to {max(ranks)}"

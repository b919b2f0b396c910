"""Run by tests as a process of its own: loads exported LoRA files with diffusers alone and records the UNet.

usage: stock_diffusers.py JOBS.json INPUTS.safetensors OUTPUTS.safetensors
A job is [name, pipeline folder, LoRA folder].
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

SCALES = (0.0, 0.5, 1.0)


def main(jobs: Path, inputs: Path, outputs: Path) -> None:
    x = load_file(inputs)
    recorded = {}
    for name, pipeline_folder, lora_folder in json.loads(jobs.read_text()):
        pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
        kind = type(pipe).__name__
        condition = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]} if "XL" in kind else {}
        context = x["context_xl"] if "XL" in kind else x["context"]
        pipe.load_lora_weights(lora_folder)
        for scale in SCALES:
            with torch.no_grad():
                recorded[f"{name}/{scale}"] = pipe.unet(
                    x["sample"],
                    x["timestep"],
                    context,
                    added_cond_kwargs=condition,
                    cross_attention_kwargs={"scale": scale},
                ).sample
        if hasattr(pipe.text_encoder, "peft_config"):
            with torch.no_grad():
                recorded[f"{name}/text"] = pipe.text_encoder(x["tokens"]).last_hidden_state
        pipe.set_adapters(pipe.get_list_adapters()["unet"], adapter_weights=[0.5])
        with torch.no_grad():
            recorded[f"{name}/set_adapters"] = pipe.unet(
                x["sample"], x["timestep"], context, added_cond_kwargs=condition
            ).sample
    assert "ether_diffusion" not in sys.modules
    save_file(recorded, outputs)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

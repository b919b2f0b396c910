"""Files of studies made up for tests, in the form that the studies write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIKENESS = {
    "full": (0.60, 0.40),
    "lora": (0.62, 0.42),
    "oft": (0.61, 0.42),
    "ether": (0.40, 0.20),
    "ether_plus": (0.66, 0.45),
}
"""object of two subjects, by method."""


def estimate(mean: float, error: float = 0.1) -> dict[str, Any]:
    return {"mean": mean, "standard_error": error, "num_values": 2, "num_groups": 2}


def benchmark(likeness: Mapping[str, tuple[float, ...]] = LIKENESS) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    methods: dict[str, Any] = {"real": {"scores": {"object": estimate(0.9)}, "num_diverged": 0}}
    for number, (method, values) in enumerate(likeness.items()):
        scores = {"object": estimate(sum(values) / len(values)), "tiny_t": estimate(0.5)}
        cost = {"parameters": 1000 - 100 * number, "bytes": 4096, "learning_rate": 0.006}
        methods[method] = {"scores": scores, "num_runs": len(values), "num_diverged": 0, **cost}
        for place, value in enumerate(values):
            run = {"method": method, "subject": f"subject{place}", "seed": 0}
            runs.append({**run, "scores": {"object": value, "tiny_t": 0.5}})
    settings = {
        "base": "tiny_world",
        "training": {"max_train_steps": 200, "train_batch_size": 4, "random_flip": True},
        "num_images": 2,
        "num_inference_steps": 15,
    }
    return {
        "settings": settings,
        "subjects": ["subject0", "subject1"],
        "num_prompts": 8,
        "seeds": [0],
        "num_runs": len(runs),
        "num_done": len(runs),
        "methods": methods,
        "runs": runs,
    }


def learning_rates() -> dict[str, Any]:
    ranges = {"ether_plus": (1e-3, 1e-1), "ether": (1e-3, 1e-2), "oft": (1e-3, 1e-3)}
    distances = {"ether": (0.3, 0.4), "ether_plus": (0.1, 0.5), "oft": (0.01, 3.0)}
    return {
        "steps": 100,
        "subjects": ["panda"],
        "methods": {
            method: {
                rate: {"weight_distance": estimate(value)}
                for rate, value in zip(("0.001", "0.1"), values, strict=True)
            }
            for method, values in distances.items()
        },
        "usable_range": {
            method: {"lowest": low, "highest": high, "best": low, "ratio": high / low}
            | {"missed": [], "is_open": False}
            for method, (low, high) in ranges.items()
        }
        | {"lora": None},
        "range_by_fidelity_alone": {"lora": None},
        "least_prompt": 0.5,
        "seeds": [0],
    }


def photos(method: str = "ether_plus") -> dict[str, Any]:
    def cell(likeness: float, recognised: float) -> dict[str, Any]:
        return {"object": estimate(likeness), "recognised": estimate(recognised), "tiny_t": estimate(0.7)}

    return {
        "method": method,
        "learning_rate": 1e-2,
        "subjects": ["panda"],
        "seeds": [0],
        "base": {"object": 0.3, "recognised": 0.0, "tiny_t": 0.6},
        "least_prompt": 0.54,
        "photos": {
            "1": {"50": cell(0.5, 0.25), "100": cell(0.6, 0.5)},
            "4": {"50": cell(0.79, 0.75), "100": cell(0.8, 1.0)},
        },
        "enough_steps": {"1": 100, "4": 50},
    }


def others() -> dict[str, Any]:
    blocks = {"1": {"object": estimate(0.50)}, "4": {"object": estimate(0.49)}}
    return {
        "blocks": {
            "runs": [
                {"variant": name, "num_blocks": 4, "subject": subject, "seed": 0, "scores": {"object": value}}
                for subject, values in {"fox": (0.60, 0.50), "owl": (0.61, 0.52), "taxi": (0.6, 0.5)}.items()
                for name, value in zip(("ETHER+", "ETHER+ one-sided"), values, strict=True)
            ],
            "variants": {
                "ETHER": blocks,
                "ETHER+": {"4": {"object": estimate(0.6)}},
                "ETHER+ one-sided": {"4": {"object": estimate(0.5)}},
            },
        },
        "energy": {
            "methods": {
                name: {"absolute_change": estimate(value)}
                for name, value in {"ether": 1e-8, "oft": 1e-7, "lora": 1e-3, "ether_plus": 1e-2}.items()
            }
        },
        "transforms": {
            "base": {"recognised": estimate(1.0)},
            "methods": {
                name: {"0.1": {"recognised": estimate(1.0)}, "0.97": {"recognised": estimate(value)}}
                for name, value in {"ether": 0.5, "ether_plus": 0.6, "oft": 0.1}.items()
            },
        },
        "cost": {
            "methods": {
                name: {"parameters": count}
                for name, count in zip(
                    ("ETHER", "ETHER+", "PEFT LoRA r=4", "PEFT OFT 4 blocks"),
                    (99_456, 398_592, 797_184, 11_602_368),
                    strict=True,
                )
            }
        },
        "control": {
            "rows": {
                name: {
                    "scores": {each: estimate(value, 0.02) for each in ("miou", "object_iou", "canny_f1")},
                    "object_iou_of_unseen_concepts": estimate(0.3),
                    "parameters": 1234,
                }
                for name, value in {"none": 0.1, "ether": 0.5, "oft_0.0001": 0.4, "ether_plus": 0.6}.items()
            },
            "seeds": [0, 1],
        },
    }


def write_all(folder: Path, **changed: Any) -> Path:
    """Write a file for each study into docs/results below a folder; None leaves one out."""
    results = folder / "docs" / "results"
    results.mkdir(parents=True, exist_ok=True)
    files = {"benchmark": benchmark(), "learning_rates": learning_rates(), **others(), **changed}
    for name, value in files.items():
        if value is not None:
            (results / f"{name}.json").write_text(json.dumps(value))
    return results

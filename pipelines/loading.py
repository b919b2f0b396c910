"""What our pipelines add to diffusers': ETHER adapters to load, weigh, fuse and choose, and metadata."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters import load_any, load_ether
from ether_diffusion.adapters.format import content_hash
from ether_diffusion.adapters.load import remove_adapter
from ether_diffusion.adapters.methods import quiet
from ether_diffusion.adapters.models import Part, Pipeline, adapter_tensors, find_parts, tuner_layers
from ether_diffusion.bases import decoded_again, fault_of, to_pictures
from ether_diffusion.bases.files import absent_parts
from ether_diffusion.pipelines.metadata import AdapterUse, Call, attach_metadata, bind_call, fingerprint_of
from ether_diffusion.tiny_world import resolve_base
from ether_diffusion.tuner import EtherLayer, chosen_adapters, mixed_adapters
from ether_diffusion.tuner.other_layers import (
    adapters_of,
    check_strengths,
    put_in_force,
    strength_of,
)
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

Strengths = Mapping[str, float]
"""Adapters by name with the strength of each; {} is the base."""
Choice = Strengths | Sequence[str | Strengths | None]
"""For all pictures of a call, or for each of its prompts: a name is at strength 1, None is the base."""
Weight = float | Mapping[str, Any] | None
"""A number, diffusers' dictionary by component and block, or None for 1."""


def loaded_adapters(pipeline: Pipeline) -> dict[str, dict[Part, list[BaseTunerLayer]]]:
    """Return the adapters of a pipeline by name, of any method, with the layers of each part that hold it."""
    found: dict[str, dict[Part, list[BaseTunerLayer]]] = {}
    for part in find_parts(pipeline):
        for layer in tuner_layers(part.model):
            for name in adapters_of(layer):
                found.setdefault(name, {}).setdefault(part, []).append(layer)
    return found


def _others(pipeline: Pipeline) -> dict[str, list[BaseTunerLayer]]:
    """Return the layers of adapters of other methods than ETHER by the names of these."""
    found = {
        name: [layer for layers in parts.values() for layer in layers if not isinstance(layer, EtherLayer)]
        for name, parts in loaded_adapters(pipeline).items()
    }
    return {name: layers for name, layers in found.items() if layers}


def _reaching(name: str) -> Callable[..., Any]:
    """Return diffusers' method of a name, called so that it reaches every part that carries adapters."""

    def method(self: "EtherLoaderMixin", *args: Any, **kwargs: Any) -> Any:
        with self._parts_within_reach():
            return getattr(super(EtherLoaderMixin, self), name)(*args, **kwargs)

    method.__name__ = name
    return method


class EtherLoaderMixin:
    """Stands before a text-to-image pipeline of diffusers among the bases of a class."""

    components: dict[str, Any]
    load_ether_weights = load_ether
    load_adapter_weights = load_any
    # diffusers' own would pass over compiled models and over components that LoRA files do not hold
    fuse_lora = _reaching("fuse_lora")
    unfuse_lora = _reaching("unfuse_lora")
    unload_lora_weights = _reaching("unload_lora_weights")
    delete_adapters = _reaching("delete_adapters")
    enable_lora = _reaching("enable_lora")
    disable_lora = _reaching("disable_lora")
    get_list_adapters = _reaching("get_list_adapters")
    get_active_adapters = _reaching("get_active_adapters")
    _set_adapters = _reaching("set_adapters")
    _lora_loadable_modules: list[str]
    _fingerprinted: tuple[nn.Module, str | None] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load a pipeline as diffusers does; the name of an embedded base stands for its folder."""
        folder = resolve_base(pretrained_model_name_or_path)
        if (Path(folder) / "model_index.json").is_file():
            kwargs = absent_parts(Path(folder), cls) | kwargs
        return super().from_pretrained(folder, **kwargs)  # type: ignore[misc]  # diffusers'

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Load a LoRA as diffusers does; it alone is then active, also where ETHER was."""
        before = loaded_adapters(self)
        with quiet():  # PEFT warns of the adapters that are there
            super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]  # diffusers'
        new = [name for name in loaded_adapters(self) if name not in before]
        for parts in before.values() if new else ():
            for layer in (each for layers in parts.values() for each in layers):
                if isinstance(layer, EtherLayer):  # which diffusers passes over
                    layer.set_adapter(new)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in force, fused ones included, in the order of loading."""
        return [use.name for use in self.adapters_in_use]

    @property
    def adapters_in_use(self) -> tuple[AdapterUse, ...]:
        """The adapters in force with their strengths and hashes."""
        return self._uses()

    @property
    def _is_fused(self) -> bool:
        return any(layer.merged for part in find_parts(self) for layer in tuner_layers(part.model))

    def _uses(self, chosen: Strengths | None = None, *, scale: float = 1.0) -> tuple[AdapterUse, ...]:
        """Return the adapters in force, at `scale` times their strengths, or as if some were chosen."""
        loaded, uses = loaded_adapters(self), list[AdapterUse]()
        for name in loaded if chosen is None else chosen:
            layers = [layer for layers in loaded[name].values() for layer in layers]
            strengths = {chosen[name]} if chosen else {_strength(each, name, scale) for each in layers}
            if strengths != {0.0}:
                own = {part.name: adapter_tensors(part.model, name) for part in loaded[name]}
                # sequential offloading keeps the values elsewhere
                there = {part: t for part, t in own.items() if not any(v.is_meta for v in t.values())}
                hashes = {part: content_hash(tensors) for part, tensors in there.items()}
                uses.append(AdapterUse(name, strengths.pop() if len(strengths) == 1 else None, hashes))
        return tuple(uses)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] = None
    ) -> None:
        """Activate adapters by name with weights, W + Σ sᵢ (W'ᵢ − W); as diffusers, and checked first."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        single = adapter_weights is None or isinstance(adapter_weights, float | int | Mapping)
        weights: Any = adapter_weights if single else list(adapter_weights)  # type: ignore[arg-type]
        if not all(map(math.isfinite, _numbers(weights))):
            raise ValueError(f"the weights of {listed(names)} must be finite numbers; found {weights}")
        if self._is_fused:
            raise ValueError("adapters are fused into the base; call unfuse before set_adapters")
        others = _others(self)
        unweighable = [n for n, found in others.items() if not all(isinstance(e, LoraLayer) for e in found)]
        if not unweighable:
            self._set_adapters(names, weights)  # which weighs LoRA as it does ETHER
            return
        self._checked_names(names)
        listing = [weights] * len(names) if single else weights
        if len(listing) != len(names):
            raise ValueError(f"found {len(listing)} weights for {listed(names)}; give one for each")
        each = dict(zip(names, listing, strict=True))
        fixed = [name for name in names if name in unweighable and any(w != 1 for w in _numbers(each[name]))]
        if fixed or any(isinstance(weight, Mapping) for weight in each.values()):
            raise ValueError(
                f"{listed(fixed or unweighable)} has no strength that could be set for all calls; leave the "
                f"weights out, or choose for a call with adapters={{{names[0]!r}: 1.0}}, or {{}} for the base"
            )
        for layer in (layer for part in find_parts(self) for layer in tuner_layers(part.model)):
            put_in_force(layer, names)
            for name in names if isinstance(layer, LoraLayer | EtherLayer) else ():
                layer.set_scale(name, 1.0 if each[name] is None else each[name])

    def fuse(self, *, scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Merge the active adapters, or those named, into the weights, at `scale` times their strengths."""
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale} is not a finite number; 1 is as set and 0 is the base")
        if self._is_fused:
            raise ValueError("adapters are fused already; call unfuse first")
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        loaded = self._checked_names(names)
        if not names:
            raise ValueError(f"found no active adapter to fuse; loaded are {listed(loaded) or 'none'}")
        others = [name for name in names if name in _others(self)]
        if others:
            raise ValueError(
                f"{listed(others)} is not of ETHER, and the base's weights would not come back bit for bit; "
                "draw with it as it is"
            )
        components = list({part.name: None for name in names for part in loaded[name]})
        self.fuse_lora(components=components, lora_scale=scale, adapter_names=names)

    def unfuse(self) -> None:
        """Put the base's own weights back, bit for bit; the adapters are active again as before `fuse`."""
        if self._is_fused:
            carrying = {part.name: None for parts in loaded_adapters(self).values() for part in parts}
            self.unfuse_lora(components=list(carrying))

    def unload(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Take adapters out, by default all of them, which leaves the base as it was, bit for bit."""
        given = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = list(given or loaded_adapters(self))
        self._checked_names(names)
        self.unfuse()
        for part in find_parts(self):
            remove_adapter(part.model, names)

    def _checked_names(self, names: Sequence[str]) -> dict[str, dict[Part, list[BaseTunerLayer]]]:
        """Return what is loaded, of which all these names must be."""
        loaded = loaded_adapters(self)
        unknown = [name for name in names if name not in loaded]
        if unknown:
            raise ValueError(f"no adapter named {listed(unknown)}; loaded are {listed(loaded) or 'none'}")
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the base as diffusers does; plain diffusers loads it."""
        loaded = listed(loaded_adapters(self))
        if loaded:
            raise ValueError(f"{loaded} would not be saved; use save_ether or export_merged, or unload first")
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]  # diffusers'

    def to_json_string(self) -> str:
        """Return the configuration, which names diffusers' own class so that diffusers finds it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]  # diffusers'
        stock = (kind for kind in type(self).__mro__ if kind.__module__.startswith("diffusers."))
        return json.dumps(config | {"_class_name": next(stock).__name__}, indent=2, sort_keys=True) + "\n"

    def __call__(
        self,
        *args: Any,
        adapters: Choice | None = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make pictures as diffusers does, whose arguments all apply; each carries its metadata.

        Args:
            adapters: for this call alone: None as set, {} the base, {"fox": 0.8} these and no others, or a
                list with a name, such a dictionary or None for each prompt.
            seed: of the first picture, the next has seed + 1 and so on; or one per picture. Without `seed`
                and `generator`, torch's global generator draws it.
        """
        return self._draw(self._bind(args, kwargs, seed), adapters)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int | Sequence[int] | None) -> Call:
        return bind_call(super().__call__, args, kwargs, seed=seed)  # type: ignore[misc]  # diffusers'

    def _draw(self, call: Call, adapters: Choice | None) -> Any:
        choice = None if adapters is None else self._checked_choice(adapters, call.num_prompts)
        if call.scale != 1.0:
            others = _others(self)
            if not all(isinstance(layer, LoraLayer) for layers in others.values() for layer in layers):
                raise ValueError(f"cross_attention_kwargs' scale does not reach {listed(others)}")
            if isinstance(choice, list):
                raise ValueError("cross_attention_kwargs' scale does not reach adapters by prompt")
        with self.chosen(choice, call.images_per_prompt):
            if isinstance(choice, list):
                uses = [self._uses(one) for one in choice for _ in range(call.images_per_prompt)]
            else:
                uses = [self._uses(scale=call.scale)] * len(call.seeds)
            wants_pictures = call.arguments["output_type"] == "pil"
            arguments = {**call.arguments, **({"output_type": "np"} if wants_pictures else {})}
            with decoded_again(self.components["vae"]):
                output = super().__call__(**arguments)  # type: ignore[misc]
        return self._pictures(output, call, uses) if wants_pictures else output

    def _pictures(self, output: Any, call: Call, uses: Sequence[tuple[AdapterUse, ...]]) -> Any:
        """Return an output of arrays (b, height, width, 3) as pictures with metadata, and name faults."""
        images = to_pictures(output[0], output[1] if len(output) > 1 else None)
        denoiser = find_parts(self)[0].model
        if self._fingerprinted is None or self._fingerprinted[0] is not denoiser:  # reads all of the weights
            self._fingerprinted = denoiser, fingerprint_of(denoiser)
        describe = call.describe(self, fingerprint=self._fingerprinted[1])
        for index, (image, adapters) in enumerate(zip(images, uses, strict=True)):
            try:
                attach_metadata(image, describe(index, image, adapters))
            except ValueError as error:  # a finished picture is worth more than what it says
                logger.warning("%s", error)
            fault = fault_of(image)
            if fault is not None:
                logger.warning("the picture of seed %s %s", call.seeds[index], fault)
        if isinstance(output, tuple):
            return images, *output[1:]
        output.images = images
        return output

    def _checked_choice(self, choice: Choice, num_prompts: int) -> Strengths | list[Strengths]:
        """Return a choice as strengths, for all pictures or a list by prompt."""
        if isinstance(choice, str):
            raise ValueError(f"adapters={choice!r} is text; give strengths, as adapters={{{choice!r}: 1.0}}")
        each = [
            {one: 1.0} if isinstance(one, str) else {name: float(s) for name, s in (one or {}).items()}
            for one in ([choice] if isinstance(choice, Mapping) else choice)
        ]
        self._checked_names([name for one in each for name in one])
        for name, strength in (pair for one in each for pair in one.items()):
            if not math.isfinite(strength):
                raise ValueError(f"the strength of {printable(name)} is {strength}; use a finite number")
        for part in find_parts(self):
            for one in each:
                check_strengths(part.model, one)
        if self._is_fused:
            raise ValueError("adapters are fused into the base; call unfuse before choosing some")
        if isinstance(choice, Mapping):
            return each[0]
        if len(each) != num_prompts:
            raise ValueError(f"found {len(each)} adapters for {num_prompts} prompts; give one per prompt")
        unmixed = {name: None for one in each for name in one} & _others(self).keys()
        if unmixed:
            raise ValueError(f"{listed(unmixed)} is not of ETHER, so not for one prompt alone")
        several = next((one for one in each if len(one) > 1), None)
        if several is not None:
            raise ValueError(f"found {listed(several)} for one prompt; each takes at most one")
        return list(each)

    @contextmanager
    def chosen(self, choice: Strengths | Sequence[Strengths] | None, images_each: int = 1) -> Iterator[None]:
        """Put a checked choice in force on all parts, and take it back after, whatever happens."""
        with ExitStack() as stack:
            for part in () if choice is None else find_parts(self):
                layers = tuner_layers(part.model)
                names = {name for layer in layers for name in adapters_of(layer)}
                if isinstance(choice, Mapping):
                    here = {name: strength for name, strength in choice.items() if name in names}
                    stack.enter_context(chosen_adapters(part.model, here))
                elif any(isinstance(layer, EtherLayer) for layer in layers):
                    # the text encoders see each prompt once, the denoiser once for each of its pictures
                    repeats = 1 if part.name.startswith("text_encoder") else images_each
                    each = [one for one in choice or () for _ in range(repeats)]
                    pairs = [next(iter(one.items()), ("", 0.0)) for one in each]
                    rows = [name if name in names else None for name, _ in pairs]
                    stack.enter_context(chosen_adapters(part.model, {}))
                    stack.enter_context(mixed_adapters(part.model, rows, scales=[s for _, s in pairs]))
            yield

    @contextmanager
    def _parts_within_reach(self) -> Iterator[None]:
        """Put compiled models themselves in the place of their wrappers, and name all parts with adapters."""
        wrapped = {part.name: part.model for part in find_parts(self)}
        carrying = [part.name for parts in loaded_adapters(self).values() for part in parts]
        before = self._lora_loadable_modules
        # past __setattr__, which would write to the pipeline's configuration
        self.__dict__ |= {name: getattr(model, "_orig_mod", model) for name, model in wrapped.items()}
        self.__dict__["_lora_loadable_modules"] = list(dict.fromkeys([*before, *carrying]))
        try:
            yield
        finally:
            self.__dict__ |= wrapped | {"_lora_loadable_modules": before}


def check_clip_skip(clip_skip: object, most: int) -> None:
    """Refuse to leave out what are no layers of the text encoders, of which `most` can be left out.

    Raises:
        ValueError: as said.
    """
    if not isinstance(clip_skip, int) or isinstance(clip_skip, bool) or not 0 <= clip_skip <= most:
        raise ValueError(f"clip_skip is from 0 to {most} with this base; found {clip_skip!r}")


def _strength(layer: BaseTunerLayer, name: str, scale: float) -> float:
    if not isinstance(layer, EtherLayer):
        return 1.0 if name in layer.merged_adapters else strength_of(layer, name) * scale
    if layer.merged:
        return layer.scale(name) if name in layer.merged_adapters else 0.0
    return 0.0 if layer.disable_adapters else layer.active_scales().get(name, 0.0) * scale


def _numbers(weights: object) -> list[float]:
    """Return the numbers in diffusers' weights, however deep in dictionaries and lists."""
    if isinstance(weights, Mapping):
        return _numbers(list(weights.values()))
    if isinstance(weights, list | tuple):
        return [number for weight in weights for number in _numbers(weight)]
    return [weights] if isinstance(weights, int | float) else []

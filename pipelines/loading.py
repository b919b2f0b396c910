"""What both pipelines add to diffusers': ETHER adapters to load, weigh, fuse and choose, and metadata."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Unpack

from peft.tuners.lora import LoraLayer
from torch import nn

from ether_diffusion.adapters import Adapter, LoadReport, load_any, load_ether
from ether_diffusion.adapters.load import Loading, remove_adapter
from ether_diffusion.adapters.models import find_parts
from ether_diffusion.bases import decoded_again, fault_of, to_pictures
from ether_diffusion.pipelines.call import Call, bind_call, fingerprint_of
from ether_diffusion.pipelines.in_use import (
    Choice,
    adapters_in_use,
    check_choice,
    chosen_for_call,
    is_fused,
    loaded_adapters,
    of_other_methods,
    set_others,
    use_of,
)
from ether_diffusion.pipelines.metadata import AdapterUse, attach_metadata
from ether_diffusion.tiny_world import resolve_base
from ether_diffusion.wording import listed

logger = logging.getLogger(__name__)

Weight = float | Mapping[str, Any] | None
"""A number, diffusers' dictionary by component and block, or None for 1."""


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
        """Load a pipeline as diffusers does; the alias "tiny_world" is the embedded base's folder."""
        return super().from_pretrained(resolve_base(pretrained_model_name_or_path), **kwargs)  # type: ignore[misc]  # diffusers'

    def load_ether_weights(self, path_or_hub_id: str | Path, **how: Unpack[Loading]) -> LoadReport:
        """Load an adapter from a folder or the Hub, as `load_ether` does; it alone is then active.

        Raises:
            FileNotFoundError: there is no such folder, model or file.
            ValueError: the file is not a whole ETHER adapter, or not one of this base.
        """
        return load_ether(self, path_or_hub_id, **how)

    def load_adapter_weights(self, adapter: str | Path | Adapter, **how: Unpack[Loading]) -> LoadReport:
        """Load an adapter of any method that training saves, as `load_any` does, or one that was read.

        It alone is then active.

        Raises:
            FileNotFoundError: there is no such folder, model or file.
            ValueError: the file is not a whole adapter of such a method, or not one of this base.
        """
        return load_any(self, adapter, **how)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in force, fused ones included, in the order of loading."""
        return [use.name for use in self.adapters_in_use]

    @property
    def adapters_in_use(self) -> tuple[AdapterUse, ...]:
        """The adapters in force with their strengths and hashes."""
        return adapters_in_use(self)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] = None
    ) -> None:
        """Activate adapters by name with weights, W + Σ sᵢ (W'ᵢ − W); as diffusers, and checked first.

        Raises:
            ValueError: a name is unknown, a weight is not finite, adapters are fused, or one of a method
                without strengths is to have one.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        single = adapter_weights is None or isinstance(adapter_weights, float | int | Mapping)
        weights: Any = adapter_weights if single else list(adapter_weights)  # type: ignore[arg-type]
        if not all(map(math.isfinite, _numbers(weights))):
            raise ValueError(f"the weights of {listed(names)} must be finite numbers; found {weights}")
        if is_fused(self):
            raise ValueError("adapters are fused into the base; call unfuse before set_adapters")
        if not set_others(self, names, _numbers(weights)):
            self._set_adapters(names, weights)

    def fuse(self, *, scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Merge the active adapters, or those named, into the weights, at `scale` times their strengths.

        Raises:
            ValueError: the scale is not finite, adapters are fused already, or none is there.
        """
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale} is not a finite number; 1 is as set and 0 is the base")
        if is_fused(self):
            raise ValueError("adapters are fused already; call unfuse first")
        loaded = loaded_adapters(self)
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        unknown = [name for name in names if name not in loaded]
        if unknown or not names:
            found = f"no adapter named {listed(unknown)}" if unknown else "no active adapter"
            raise ValueError(f"found {found} to fuse; loaded are {listed(loaded) or 'none'}")
        others = [name for name in names if name in of_other_methods(self)]
        if others:
            raise ValueError(
                f"{listed(others)} is not of ETHER, and the base's weights would not come back bit for bit; "
                "draw with it as it is"
            )
        self.fuse_lora(components=self._components(names), lora_scale=scale, adapter_names=names)

    def unfuse(self) -> None:
        """Put the base's own weights back, bit for bit; the adapters are active again as before `fuse`."""
        if is_fused(self):
            self.unfuse_lora(components=self._components(list(loaded_adapters(self))))

    def unload(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Take adapters out, by default all of them, which leaves the base as it was, bit for bit.

        Raises:
            ValueError: a name is unknown.
        """
        loaded = loaded_adapters(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or loaded)
        unknown = [name for name in names if name not in loaded]
        if unknown:
            raise ValueError(f"no adapter named {listed(unknown)}; loaded are {listed(loaded) or 'none'}")
        self.unfuse()
        for part in find_parts(self):
            remove_adapter(part.model, names)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the base as diffusers does; plain diffusers loads it.

        Raises:
            ValueError: adapters are loaded, which would be saved as layers that nothing reads back.
        """
        loaded = loaded_adapters(self)
        if loaded:
            raise ValueError(
                f"{listed(loaded)} would not be saved; use save_ether for adapters, export_merged for a "
                "merged model, or unload them first"
            )
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]  # diffusers'

    def to_json_string(self) -> str:
        """Return the configuration, which names diffusers' own class so that diffusers finds it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]  # diffusers'
        config["_class_name"] = next(
            kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("diffusers.")
        )
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

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

        Raises:
            ValueError: an adapter is unknown or fused, a strength is not finite, or both `seed` and
                `generator` are given.
        """
        call = bind_call(super().__call__, args, kwargs, seed=seed)  # type: ignore[misc]  # diffusers'
        choice = None if adapters is None else check_choice(self, adapters, call.num_prompts)
        others = of_other_methods(self) if call.scale != 1.0 else {}
        if not all(isinstance(layer, LoraLayer) for layers in others.values() for layer in layers):
            raise ValueError(
                f"cross_attention_kwargs' scale does not reach {listed(others)}; leave it out, or choose a "
                "strength with adapters="
            )
        if isinstance(choice, list) and call.scale != 1.0:
            raise ValueError("cross_attention_kwargs' scale does not reach adapters by prompt; leave it out")
        with nullcontext() if choice is None else chosen_for_call(self, choice, call.images_per_prompt):
            if isinstance(choice, list):
                uses = [use_of(self, one) for one in choice for _ in range(call.images_per_prompt)]
            else:
                uses = [adapters_in_use(self, scale=call.scale)] * len(call.seeds)
            wants_pictures = call.arguments["output_type"] == "pil"
            arguments = {**call.arguments, **({"output_type": "np"} if wants_pictures else {})}
            with decoded_again(self.components["vae"]):
                output = super().__call__(**arguments)  # type: ignore[misc]
        return self._pictures(output, call, uses) if wants_pictures else output

    def _pictures(self, output: Any, call: Call, uses: Sequence[tuple[AdapterUse, ...]]) -> Any:
        """Return an output of arrays (b, height, width, 3) as pictures with their metadata.

        What is wrong with one is said.
        """
        images = to_pictures(output[0], output[1] if len(output) > 1 else None)
        unet = self.components["unet"]
        if self._fingerprinted is None or self._fingerprinted[0] is not unet:  # reads all of the weights
            self._fingerprinted = unet, fingerprint_of(unet)
        common = call.describe(self, fingerprint=self._fingerprinted[1])
        for index, (image, adapters) in enumerate(zip(images, uses, strict=True)):
            try:
                attach_metadata(image, call.describe_picture(common, index, image, adapters))
            except ValueError as error:  # a finished picture is worth more than what it says
                logger.warning("%s", error)
            fault = fault_of(image)
            if fault is not None:
                logger.warning("the picture of seed %s %s", call.seeds[index], fault)
        if isinstance(output, tuple):
            return images, *output[1:]
        output.images = images
        return output

    @contextmanager
    def _parts_within_reach(self) -> Iterator[None]:
        """Put compiled models themselves in the place of their wrappers, and name all parts with adapters."""
        wrapped = {part.name: part.model for part in find_parts(self)}
        carrying = [part.name for parts in loaded_adapters(self).values() for part in parts]
        reached = list(dict.fromkeys([*self._lora_loadable_modules, *carrying]))
        before = self._lora_loadable_modules
        # past __setattr__, which would write to the pipeline's configuration
        self.__dict__ |= {name: getattr(model, "_orig_mod", model) for name, model in wrapped.items()}
        self.__dict__["_lora_loadable_modules"] = reached
        try:
            yield
        finally:
            self.__dict__ |= wrapped | {"_lora_loadable_modules": before}

    def _components(self, adapter_names: Iterable[str]) -> list[str]:
        loaded = loaded_adapters(self)
        return list({part.name: None for name in adapter_names for part in loaded[name]})


def _numbers(weights: object) -> list[float]:
    """Return the numbers in diffusers' weights, however deep in dictionaries and lists."""
    if isinstance(weights, Mapping):
        return _numbers(list(weights.values()))
    if isinstance(weights, list | tuple):
        return [number for weight in weights for number in _numbers(weight)]
    return [weights] if isinstance(weights, int | float) else []

"""An adapter that was chosen in another tab, as the request that the tab Create is filled with."""

from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.studio import Studio


def request_with(studio: Studio, adapter_id: str, prompt: str) -> Restored:
    """Return a request of a prompt with one adapter, and all else as the form begins with."""
    engine = studio.engine
    request = GenerateRequest(
        prompt=prompt,
        adapters={adapter_id: 1.0},
        steps=engine.default_steps,
        guidance_scale=engine.default_guidance,
        width=engine.native_size,
        height=engine.native_size,
    )
    name = studio.library.card(adapter_id).name
    return Restored(request, (), heading=f"{name} is chosen; write what it should do, and generate.")

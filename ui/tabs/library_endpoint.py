"""The endpoint /adapters for scripts: what the library holds, by the ids that /generate takes."""

from typing import Any

import gradio as gr

from ether_diffusion.ui.cards import Card
from ether_diffusion.ui.errors import handler, without_paths
from ether_diffusion.ui.studio import Studio


def add_endpoint(studio: Studio) -> None:
    """Add /adapters to the API of the page."""

    @handler
    def adapters() -> list[dict[str, Any]]:
        """List the adapters of the library, the newest first; num_bytes are those of their files.

        kind is "subject" or "control"; why_not says why one cannot be used with this base.
        """
        studio.keep_finished()
        return [_facts(card) for card in studio.library.cards()]

    gr.api(adapters, api_name="adapters")


def _facts(card: Card) -> dict[str, Any]:
    return {
        "id": card.id,
        "name": card.name,
        "kind": card.kind,
        "method": card.method,
        "fits_base": card.fits_base,
        "why_not": without_paths(card.why_not),
        "trigger": card.trigger,
        "num_bytes": card.num_bytes,
    }

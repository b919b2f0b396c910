"""Training data: from checked photos to batches, each a pure function of the seed and the visits' numbers."""

from ether_diffusion.training.data.batch import Batch
from ether_diffusion.training.data.batch_source import BatchSource
from ether_diffusion.training.data.controls import with_controls
from ether_diffusion.training.data.items import Item, Items, gather_class_items, gather_items
from ether_diffusion.training.data.latents import Codec
from ether_diffusion.training.data.order import VisitOrder
from ether_diffusion.training.data.plan import Needs, VisitPlan, plan_visits

__all__ = [
    "Batch",
    "BatchSource",
    "Codec",
    "Item",
    "Items",
    "Needs",
    "VisitOrder",
    "VisitPlan",
    "gather_class_items",
    "gather_items",
    "plan_visits",
    "with_controls",
]

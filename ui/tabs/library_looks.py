"""What the page shows of the adapters in a library as HTML: a card each, and all facts of one."""

from collections.abc import Sequence
from html import escape

from ether_diffusion.ui.cards import Card
from ether_diffusion.ui.facts import facts_html
from ether_diffusion.ui.thumbnails import Thumbnails

EMPTY = '<div class="empty"><p>No adapters yet. Train one, or add one that you have.</p></div>'
KINDS = {"subject": "Subject", "control": "Control"}


def cards_html(cards: Sequence[Card], chosen: str, thumbnails: Thumbnails, *, is_small: bool) -> str:
    """Return all cards as buttons that bear the ids of their adapters; the chosen one is marked."""
    look = "cards sharp" if is_small else "cards"
    return (
        f'<div class="{look}">{"".join(_card(card, card.id == chosen, thumbnails) for card in cards)}</div>'
    )


def _card(card: Card, is_chosen: bool, thumbnails: Thumbnails) -> str:
    address = None if card.thumbnail is None else thumbnails.address(card.thumbnail)
    picture = escape(card.name[:1].upper()) if address is None else f'<img alt="" src="{address}">'
    pressed = "true" if is_chosen else "false"
    lines = "".join(f'<span class="line">{escape(line)}</span>' for line in _lines(card))
    return (
        f'<button type="button" class="card" data-adapter="{escape(card.id)}" aria-pressed="{pressed}">'
        f'<span class="look-of" aria-hidden="true">{picture}</span><span class="words">'
        f'<span class="name">{escape(card.name)}</span>{lines}{_mark(card)}</span></button>'
    )


def _lines(card: Card) -> list[str]:
    """Return what stands on a card under the name."""
    size, day = kilobytes(card.num_bytes), f"{card.created.astimezone():%d %b %Y}"
    if not card.method:
        return [f"{size} · {day}"]
    method = card.method if card.steps is None else f"{card.method} · {card.steps} steps"
    call = [f"“{card.trigger}”"] if card.trigger else []
    base = [card.base_name, size] if _names_base(card) else [size]
    return [method, *call, " · ".join(base), f"{day} · {card.hash[:8]}"]


def _names_base(card: Card) -> bool:
    """Say whether the adapter knows its base; a control encoder alone does not."""
    return card.base_name != "unknown"


def _mark(card: Card) -> str:
    if not card.fits_base:
        return f'<span class="mark unfit">{_unfit(card)}</span>'
    return '<span class="mark">Control</span>' if card.kind == "control" else ""


def _unfit(card: Card) -> str:
    if not card.method:
        return "Cannot be read"
    return "For other weights" if card.match == "other weights" else "For another base"


def card_facts(card: Card) -> str:
    """Return everything that is known of an adapter."""
    facts = [("Kind", KINDS[card.kind])]
    if card.method:
        facts.append(("Method", card.method))
    if card.method and _names_base(card):
        facts.append(("Base", card.base_name))
    if card.trigger:
        facts.append(("Call it by", card.trigger))
    if card.steps is not None:
        facts.append(("Steps", str(card.steps)))
    facts.append(("Size", kilobytes(card.num_bytes)))
    if card.num_parameters:
        facts.append(("Numbers in it", f"{card.num_parameters:,}"))
    if card.hash:
        facts.append(("Hash", card.hash[:16]))
    return facts_html([*facts, ("Added", f"{card.created.astimezone():%d %b %Y, %H:%M}")])


def kilobytes(num_bytes: int) -> str:
    """Return a size in words: 412 kB, 3.4 MB."""
    if num_bytes < 1e6:
        return f"{max(1, round(num_bytes / 1e3))} kB"
    return f"{num_bytes / 1e6:.1f} MB"

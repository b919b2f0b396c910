"""The tab History: everything drawn in this folder, to look through, star, compare, fetch and delete."""

import secrets
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from markupsafe import Markup

from ether_diffusion.ui.jobs import SavedPicture
from ether_diffusion.ui.outputs import STARRED
from ether_diffusion.ui.requests import MAX_PROMPT
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.tabs.page import EMPTY, LOOK, DeleteButton, Page, Panel, Updates, told_by
from ether_diffusion.ui.words import (
    MAX_CHARACTERS,
    counted,
    facts_html,
    notes_html,
    picture_facts,
    quiet_html,
)
from ether_diffusion.wording import printable

PAGE, MAX_BESIDE = 48, 8
"""Pictures that are shown at first, and that each press of the button adds; and that are compared at most."""
ANY, ALL = "Any adapter", "All pictures"
CHOSEN = {
    "star": "★ Star", "compare": "Compare", "fetch": "Download", "off": "Take off this board",
    "none": "Choose none",
}  # fmt: skip
"""What can be done with the chosen pictures: the labels of buttons by name."""
NOTHING = EMPTY.format("Nothing here yet. What you draw is kept, and shown here.")
NOT_FOUND = EMPTY.format("No picture is like that. Change what you look for.")
KEYS = quiet_html("← → look through, S stars, Del deletes, Esc closes. Shift chooses a range.")
_SHOTS = Markup('<ul class="shots" data-render="{}">{}</ul>')  # another one each time: boxes are reset
_SHOT = Markup(
    '<li><button type="button" data-picture="{id}" aria-label="{called}" title="{called}">'
    '<img alt="" loading="lazy" src="gradio_api/file={path}"></button>'  # relative, as behind a proxy
    '<input type="checkbox" data-choose="{id}" aria-label="Choose {called}"{checked}>{star}</li>'
)
_STAR = Markup('<span class="star" aria-hidden="true">★</span>')
_BESIDE = Markup('<figure><img alt="{}" src="gradio_api/file={}"><figcaption>{}</figcaption></figure>')
ON_GRID = files("ether_diffusion.ui").joinpath("gallery.js").read_text(encoding="utf-8")


class PictureDetail(Panel):
    """One picture shown large, with what it says of itself, to fetch and to draw again; hidden at first.

    One looks through others by `step`; `changed` are the events after which stars or pictures are others.
    """

    def __init__(self, page: Page, prefix: str) -> None:
        super().__init__(page, prefix)
        self._history, small = page.studio.history, {"size": "sm", "min_width": 60}
        with gr.Column(scale=2, min_width=300, visible=False, elem_classes="results") as self.block:
            with gr.Row(elem_classes="tool-row looks"):
                self.previous = self.button("previous", "‹ Previous", **small)
                self.next = self.button("next", "Next ›", **small)
                self.star = self.button("star", "☆ Star", **small)
                close = self.button("close", "Close", **small)
            self.picture = gr.Image(elem_id=f"{prefix}-picture", **LOOK)
            self.facts = self.html("facts")
            with gr.Row(elem_classes="tool-row"):
                self.use = self.button("use", "Use these settings", variant="primary")
                self.fetch = gr.DownloadButton("Download PNG", elem_id=f"{prefix}-download")
                control = self.button("control", "Use as control")
            self.delete = DeleteButton(prefix, "Delete this picture …")
            self.selected, self.ids = gr.State(""), gr.State(())
        self.elsewhere.append(self.block)
        self.sends(self.use.click, self._take, [self.selected])
        self.sends(control.click, self._follow, [self.selected])
        for button, by in ((self.previous, -1), (self.next, 1)):
            self.on(button.click, partial(self._step, by), [self.selected, self.ids])
        self.on(close.click, self.hide)
        ask = "Delete this picture? Its file is gone then."
        self.changed = [
            self.on(self.star.click, self._star, [self.selected]),
            self.delete.tie(self, lambda _: ask, self._delete, self.selected),
        ]

    def show(self, picture: SavedPicture, ids: Sequence[str]) -> Updates:
        """Show a picture of these with all that it says of itself."""
        said, place = picture.metadata, ids.index(picture.id)
        nothing = notes_html("This picture does not say how it was made")
        facts = nothing if said is None else facts_html(picture_facts(said))
        return {
            self.block: gr.update(visible=True),
            self.picture: picture.path,
            self.facts: Markup('<div data-shown="{}">{}</div>').format(picture.id, facts),
            self.fetch: gr.update(value=picture.path),
            self.use: gr.update(interactive=said is not None),
            self.selected: picture.id,
            self.ids: tuple(ids),
            self.previous: gr.update(interactive=place > 0),
            self.next: gr.update(interactive=place + 1 < len(ids)),
            **self._starred(picture.id),
            **self.delete.hide(),
        }

    def hide(self) -> Updates:
        """Show nothing."""
        return {self.block: gr.update(visible=False), self.picture: None, self.facts: "", self.selected: ""}

    def _step(self, by: int, picture_id: str, ids: Sequence[str]) -> Updates:
        place = ids.index(picture_id) + by if picture_id in ids else -1
        return self.show(self._history.picture(ids[place]), ids) if place in range(len(ids)) else {}

    def _starred(self, picture_id: str) -> Updates:
        words = "★ Starred" if self._history.is_starred(picture_id) else "☆ Star"
        return {self.star: gr.update(value=words)}

    def _star(self, picture_id: str) -> Updates:
        self._history.put(STARRED, [picture_id], is_on=not self._history.is_starred(picture_id))
        return self._starred(picture_id)

    def _delete(self, picture_id: str) -> Updates:
        self._history.delete([picture_id])
        return self.hide()

    def _take(self, picture_id: str) -> Restored:
        return restore(self._history.picture(picture_id).path, self.studio)

    def _follow(self, picture_id: str) -> Restored:
        path = self._history.picture(picture_id).path
        return Restored(None, (), followed_control=True, control_picture=path)


class HistoryTab(Panel):
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, page: Page, prefix: str) -> None:
        super().__init__(page, prefix)
        self._history, narrow, wide = page.studio.history, {"min_width": 150}, {"min_width": 200, "scale": 3}
        with gr.Row(elem_classes="search-row"):
            said = {"max_length": MAX_PROMPT, "elem_id": "history-text"}
            text = gr.Textbox(label="Words in the prompt", **said, **wide)
            self.adapter = gr.Dropdown([ANY], value=ANY, label="Adapter", elem_id="history-adapter", **narrow)
            self.board = gr.Dropdown([ALL], value=ALL, label="Board", elem_id="history-board", **narrow)
            base = gr.Checkbox(False, label="Pictures of the base, too", elem_id="history-base", **narrow)
        self.empty = self.html("empty", NOTHING)
        with gr.Column(visible=False, elem_id="history-tools", elem_classes="tools") as self.tools:
            self.said = self.html("chosen")
            with gr.Row(elem_classes="tool-row"):
                star, beside, fetch, self.off, none = (
                    self.button(f"chosen-{name}", label, size="sm") for name, label in CHOSEN.items()
                )
            with gr.Row(elem_classes="tool-row"):
                kept = {"max_length": MAX_CHARACTERS, "max_lines": 1, "min_width": 160, "container": False}
                words = dict.fromkeys(("label", "placeholder"), "Name of a board")
                name = gr.Textbox(show_label=False, elem_id="history-chosen-board", **words, **kept)
                put = self.button("chosen-put", "Put on board", size="sm")
            self.delete = DeleteButton("history-chosen", "Delete them …")
        self.beside = self.html("beside", visible=False)
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=3, min_width=300):
                self.gallery = self.html("gallery", js_on_load=ON_GRID)
                self.more = self.button("more", "Show more", visible=False)
                self.keys = gr.HTML(KEYS, visible=False)
            self.detail = PictureDetail(page, "history")
        self.all = self.button("all", "Download all", visible=False)
        self.ids, self.count, self.chosen = gr.State(()), gr.State(PAGE), gr.State(())
        wanted = [text, self.adapter, base, self.board]
        listed = [*wanted, self.count, self.chosen]
        # opening the tab and typing are one event, of which the last is answered last: a tab that was opened
        # a moment ago does not show everything again when a word was typed since
        asked = [self.block.select, text.change, self.adapter.input, base.input, self.board.input]
        self.on(asked, lambda *w: self._list(*w, PAGE, ()), wanted, trigger_mode="always_last")
        for event in (*self.detail.changed, self.delete.tie(self, self._ask, self._remove, self.chosen)):
            self.on(event.success, self._list, listed)
        self.on(self.more.click, lambda *w: self._list(*w[:-2], w[-2] + PAGE, w[-1]), listed)
        self.on(none.click, lambda *w: self._list(*w[:-1], ()), listed)
        self.on(self.gallery.click, self._open, [self.ids])
        self.on(self.gallery.select, self._choose, [self.board])
        for pressed, where in (
            ([star.click], "star"),
            ([self.off.click], "off"),
            ([put.click, name.submit], "put"),
        ):
            self.on(pressed, partial(self._put, where), [*listed, name])
        self.on(beside.click, self._compare, [self.chosen])
        for button, is_all in ((self.all, True), (fetch, False)):
            self.downloads(button, partial(self._zip, is_all), [*wanted, self.chosen])

    def _list(self, *listed: Any) -> Updates:
        """Show the pictures that are looked for; offer the adapters any was drawn with, and the boards."""
        text, adapter, with_base, board, count, chosen = listed
        found = self._find(text, adapter, with_base, board)
        boards, shown = self._history.boards(), found[:count]
        ids = tuple(picture.id for picture in shown)
        shots = Markup("").join(
            _SHOT.format(
                id=each.id, called=_called(each), path=quote(str(each.path)),
                checked=" checked" * (each.id in chosen), star=_STAR * (each.id in boards.get(STARRED, ())),
            ) for each in shown
        )  # fmt: skip
        nothing = NOT_FOUND if text or adapter != ANY or board != ALL else NOTHING
        words = f"Download {counted(len(found), 'picture')} as a zip"
        return {
            self.adapter: gr.update(choices=[ANY, *self._history.adapters()]),
            self.board: gr.update(choices=[ALL, *dict.fromkeys([STARRED, *boards, *({board} - {ALL})])]),
            self.empty: gr.update(value=nothing, visible=not found),
            self.gallery: _SHOTS.format(secrets.token_hex(4), shots) if shots else "",
            self.more: gr.update(visible=len(found) > count),
            self.keys: gr.update(visible=bool(found)),
            self.all: gr.update(visible=bool(found), value=words),
            self.ids: ids,
            self.count: count,
            **self._chosen([each for each in chosen if each in ids], board),
            **({} if found else self.detail.hide()),
        }

    def _find(self, text: str, adapter: str, with_base: bool, board: str) -> list[SavedPicture]:
        name, on = "" if adapter == ANY else adapter, "" if board == ALL else board
        return self._history.pictures(text=text, adapter=name, with_base=with_base, board=on)

    def _chosen(self, chosen: Sequence[str], board: str) -> Updates:
        """Show what can be done with the chosen pictures, if there are any."""
        return {
            self.chosen: tuple(chosen),
            self.tools: gr.update(visible=bool(chosen)),
            self.said: quiet_html(f"{counted(len(chosen), 'picture')} chosen"),
            self.off: gr.update(visible=board != ALL),
            self.beside: gr.update(visible=False),
            **self.delete.hide(),
        }

    def _choose(self, event: gr.EventData, board: str) -> Updates:
        chosen = told_by(event).get("chosen")
        ids = [each for each in chosen if isinstance(each, str)] if isinstance(chosen, list) else []
        return self._chosen(ids, board)

    def _open(self, event: gr.EventData, ids: Sequence[str]) -> Updates:
        picture_id = str(told_by(event).get("picture"))
        return self.detail.show(self._history.picture(picture_id), ids) if picture_id in ids else {}

    def _put(self, where: str, *values: Any) -> Updates:
        """Star the chosen pictures, put them on the board of a name, or take them off the one on show."""
        *listed, name = values
        board = {"star": STARRED, "off": listed[3], "put": name}[where]
        self._history.put(board, listed[-1], is_on=where != "off")
        return self._list(*listed)

    def _ask(self, chosen: Sequence[str]) -> str:
        return f"Delete {counted(len(chosen), 'picture')}? Their files are gone then."

    def _remove(self, chosen: Sequence[str]) -> Updates:
        self._history.delete(chosen)
        return {self.chosen: (), **self.detail.hide()}

    def _compare(self, chosen: Sequence[str]) -> Updates:
        if not 2 <= len(chosen) <= MAX_BESIDE:
            raise ValueError(f"found {counted(len(chosen), 'picture')}; choose 2 to {MAX_BESIDE} to compare")
        pictures = [self._history.picture(each) for each in chosen]
        return {self.beside: gr.update(value=beside_html(pictures), visible=True)}

    def _zip(self, is_all: bool, *values: Any) -> Path:
        *wanted, chosen = values
        pictures = self._find(*wanted) if is_all else self._history.pictures()
        target = Path(self.all.GRADIO_CACHE) / secrets.token_hex(16) / "pictures.zip"
        return self._history.write_zip([p for p in pictures if is_all or p.id in chosen], target)


def _called(picture: SavedPicture) -> str:
    """Return what a picture is called for people: its prompt and its seed."""
    said = picture.metadata
    if said is None:
        return "a picture that says nothing of itself"
    by = " by the base" * picture.is_base
    return f"{printable(said.prompt or 'no prompt', 60)}, seed {said.seed}{by}"


def beside_html(pictures: Sequence[SavedPicture]) -> Markup:
    """Return pictures side by side, under each what only it says, and once what all say."""
    said = [{} if each.metadata is None else dict(picture_facts(each.metadata)) for each in pictures]
    names = list(dict.fromkeys(name for facts in said for name in facts))
    same = [name for name in names if len({facts.get(name) for facts in said}) == 1]
    figures = Markup("").join(
        _BESIDE.format(
            _called(picture), quote(str(picture.path)),
            facts_html([(name, facts.get(name, "none")) for name in names if name not in same]),
        )
        for picture, facts in zip(pictures, said, strict=True)
    )  # fmt: skip
    shared = facts_html([(name, said[0][name]) for name in same])
    return Markup('<div class="beside">{}</div><p class="quiet">The same in all</p>{}').format(
        figures, shared
    )

"""The tab History: everything drawn in this folder, to look through, star, compare, fetch and delete."""

import secrets
from collections.abc import Callable, Sequence
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
from ether_diffusion.ui.tabs.page import EMPTY, LOOK, QUIET, SAVE_AS, DeleteButton, Page, Updates
from ether_diffusion.ui.words import (
    MAX_CHARACTERS,
    counted,
    facts_html,
    handler,
    notes_html,
    picture_facts,
    quiet_html,
)
from ether_diffusion.wording import printable

PAGE, MAX_BESIDE = 48, 8
"""Pictures that are shown at first, and that each press of the button adds; and that are compared at most."""
ANY, ALL = "Any adapter", "All pictures"
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


class PictureDetail:
    """One picture shown large, with what it says of itself, to fetch and to draw again; hidden at first.

    One looks through others by `step`; `changed` are the events after which stars or pictures are others.
    """

    def __init__(self, prefix: str, page: Page) -> None:
        """Lay out a column inside a row and tie its events; ids begin with `prefix`."""
        self._history, self._studio = page.studio.history, page.studio
        small: dict[str, Any] = {"size": "sm", "min_width": 60}
        with gr.Column(scale=2, min_width=300, visible=False, elem_classes="results") as self.column:
            with gr.Row(elem_classes="tool-row looks"):
                self.previous = gr.Button("‹ Previous", elem_id=f"{prefix}-previous", **small)
                self.next = gr.Button("Next ›", elem_id=f"{prefix}-next", **small)
                self.star = gr.Button("☆ Star", elem_id=f"{prefix}-star", **small)
                close = gr.Button("Close", elem_id=f"{prefix}-close", **small)
            self.picture = gr.Image(elem_id=f"{prefix}-picture", **LOOK)
            self.facts = gr.HTML(elem_id=f"{prefix}-facts")
            with gr.Row(elem_classes="tool-row"):
                self.use = gr.Button("Use these settings", variant="primary", elem_id=f"{prefix}-use")
                self.fetch = gr.DownloadButton("Download PNG", elem_id=f"{prefix}-download")
                control = gr.Button("Use as control", elem_id=f"{prefix}-control")
            self.delete = DeleteButton(prefix, "Delete this picture …")
        self.selected, self.ids = gr.State(""), gr.State(())
        self.shown: list[Any] = [
            self.column, self.picture, self.facts, self.fetch, self.use, self.selected, self.ids, self.star,
            self.previous, self.next, self.delete.box,
        ]  # fmt: skip
        page.sendings += [
            self.use.click(handler(self._take), [self.selected], [page.restored], **QUIET),
            control.click(handler(self._follow), [self.selected], [page.restored], **QUIET),
        ]
        walked = [self.selected, self.ids]
        for button, by in ((self.previous, -1), (self.next, 1)):
            button.click(handler(partial(self._step, by)), walked, self.shown, **QUIET)
        close.click(handler(self.hide), None, self.shown, **QUIET)
        ask = "Delete this picture? Its file is gone then."
        self.changed = [
            self.star.click(handler(self._star), [self.selected], [self.star], **QUIET),
            self.delete.tie(lambda _: ask, self._delete, self.selected, self.shown),
        ]

    def show(self, picture: SavedPicture, ids: Sequence[str]) -> Updates:
        """Show a picture of these with all that it says of itself."""
        said, place = picture.metadata, ids.index(picture.id)
        nothing = notes_html("This picture does not say how it was made")
        facts = nothing if said is None else facts_html(picture_facts(said))
        return {
            self.column: gr.update(visible=True),
            self.picture: picture.path,
            self.facts: Markup('<div data-shown="{}">{}</div>').format(picture.id, facts),
            self.fetch: gr.update(value=picture.path),
            self.use: gr.update(interactive=said is not None),
            self.selected: picture.id,
            self.ids: tuple(ids),
            self.star: self._starred(picture.id),
            self.previous: gr.update(interactive=place > 0),
            self.next: gr.update(interactive=place + 1 < len(ids)),
            self.delete.box: gr.update(visible=False),
        }

    def hide(self) -> Updates:
        """Show nothing."""
        return {self.column: gr.update(visible=False), self.picture: None, self.facts: "", self.selected: ""}

    def _step(self, by: int, picture_id: str, ids: Sequence[str]) -> Updates:
        place = ids.index(picture_id) + by if picture_id in ids else -1
        return self.show(self._history.picture(ids[place]), ids) if place in range(len(ids)) else {}

    def _starred(self, picture_id: str) -> Any:
        return gr.update(value="★ Starred" if self._history.is_starred(picture_id) else "☆ Star")

    def _star(self, picture_id: str) -> Any:
        self._history.put(STARRED, [picture_id], is_on=not self._history.is_starred(picture_id))
        return self._starred(picture_id)

    def _delete(self, picture_id: str) -> Updates:
        self._history.delete([picture_id])
        return self.hide()

    def _take(self, picture_id: str) -> Restored:
        return restore(self._history.picture(picture_id).path, self._studio)

    def _follow(self, picture_id: str) -> Restored:
        path = self._history.picture(picture_id).path
        return Restored(None, (), followed_control=True, control_picture=path)


def build(page: Page) -> None:
    """Lay out the tab and tie its events."""
    with gr.Tab("History", id="history") as tab:
        HistoryTab(page, tab)


class HistoryTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, page: Page, tab: gr.Tab) -> None:
        self._history = page.studio.history
        narrow: dict[str, Any] = {"min_width": 150}
        with gr.Row(elem_classes="search-row"):
            words: dict[str, Any] = {"scale": 3, "min_width": 200, "elem_id": "history-text"}
            text = gr.Textbox(label="Words in the prompt", max_length=MAX_PROMPT, **words)
            self.adapter = gr.Dropdown([ANY], value=ANY, label="Adapter", elem_id="history-adapter", **narrow)
            self.board = gr.Dropdown([ALL], value=ALL, label="Board", elem_id="history-board", **narrow)
            of_base = {"label": "Pictures of the base, too", "elem_id": "history-base"}
            base = gr.Checkbox(False, **of_base, **narrow)
        self.empty = gr.HTML(NOTHING, elem_id="history-empty")
        with gr.Column(visible=False, elem_id="history-tools", elem_classes="tools") as self.tools:
            self.said = gr.HTML(elem_id="history-chosen")
            with gr.Row(elem_classes="tool-row"):
                star = gr.Button("★ Star", elem_id="history-chosen-star", size="sm")
                beside = gr.Button("Compare", elem_id="history-chosen-compare", size="sm")
                fetch = gr.Button("Download", elem_id="history-chosen-fetch", size="sm")
                self.off = gr.Button("Take off this board", elem_id="history-chosen-off", size="sm")
                none = gr.Button("Choose none", elem_id="history-chosen-none", size="sm")
            with gr.Row(elem_classes="tool-row"):
                kept: dict[str, Any] = {"max_length": MAX_CHARACTERS, "max_lines": 1, "min_width": 160}
                name = gr.Textbox(
                    show_label=False, label="Name of a board", placeholder="Name of a board", container=False,
                    elem_id="history-chosen-board", **kept,
                )  # fmt: skip
                put = gr.Button("Put on board", elem_id="history-chosen-put", size="sm")
            self.delete = DeleteButton("history-chosen", "Delete them …")
        self.beside = gr.HTML(visible=False, elem_id="history-beside")
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=3, min_width=300):
                self.gallery = gr.HTML(js_on_load=ON_GRID, elem_id="history-gallery")
                self.more = gr.Button("Show more", visible=False, elem_id="history-more")
                self.keys = gr.HTML(KEYS, visible=False)
            self.detail = PictureDetail("history", page)
        self.all = gr.Button("Download all", visible=False, elem_id="history-all")
        self.archive = gr.DownloadButton(visible="hidden")
        self.ids, self.count, self.chosen = gr.State(()), gr.State(PAGE), gr.State(())
        wanted: list[Any] = [text, self.adapter, base, self.board]
        listed: list[Any] = [*wanted, self.count, self.chosen]
        found: list[Any] = [
            self.adapter, self.board, self.empty, self.gallery, self.more, self.keys, self.all, self.ids,
            self.count, self.chosen, self.tools, self.said, self.off, self.beside, self.delete.box,
            *self.detail.shown,
        ]  # fmt: skip
        # opening the tab and typing are one event, of which the last is answered last: a tab that was opened
        # a moment ago does not show everything again when a word was typed since
        asked: list[Any] = [tab.select, text.change, self.adapter.input, base.input, self.board.input]
        search: dict[str, Any] = {"inputs": wanted, "outputs": found, **QUIET}
        gr.on(asked, handler(lambda *w: self._list(*w, PAGE, ())), trigger_mode="always_last", **search)
        gone = [self.chosen, *self.detail.shown]
        deleted = self.delete.tie(self._ask, self._remove, self.chosen, gone)
        for event in (*self.detail.changed, deleted):
            event.success(handler(self._list), listed, found, **QUIET)
        relisted: list[tuple[Any, Callable[..., Updates]]] = [
            (self.more.click, lambda *w: self._list(*w[:-2], w[-2] + PAGE, w[-1])),
            (none.click, lambda *w: self._list(*w[:-1], ())),
        ]
        for press, show in relisted:
            press(handler(show), listed, found, **QUIET)
        self.gallery.click(handler(self._open), [self.ids], self.detail.shown, **QUIET)
        self.gallery.select(handler(self._choose), [self.board], found, **QUIET)
        for asked, where in (
            ([star.click], "star"),
            ([self.off.click], "off"),
            ([put.click, name.submit], "put"),
        ):
            gr.on(asked, handler(partial(self._put, where)), [*listed, name], found, **QUIET)
        beside.click(handler(self._compare), [self.chosen], [self.beside], **QUIET)
        for button, is_all in ((self.all, True), (fetch, False)):
            zipped = button.click(
                handler(partial(self._zip, is_all)), [*wanted, self.chosen], [self.archive],
                api_visibility="private",
            )  # fmt: skip
            zipped.success(None, [self.archive], None, js=SAVE_AS, api_visibility="private")

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
        there = [each for each in chosen if each in ids]
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
            **self._chosen(there, board),
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
            self.delete.box: gr.update(visible=False),
        }

    def _choose(self, event: gr.EventData, board: str) -> Updates:
        said = event._data if isinstance(event._data, dict) else {}
        chosen = said.get("chosen")
        ids = [each for each in chosen if isinstance(each, str)] if isinstance(chosen, list) else []
        return self._chosen(ids, board)

    def _open(self, event: gr.EventData, ids: Sequence[str]) -> Updates:
        picture_id = str(event._data.get("picture")) if isinstance(event._data, dict) else ""
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
        target = Path(self.archive.GRADIO_CACHE) / secrets.token_hex(16) / "pictures.zip"
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

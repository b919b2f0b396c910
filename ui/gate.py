"""What stands before Gradio: who may ask, from which page, how much, and for nothing from other places."""

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ether_diffusion.serving.keys import is_from_page_of_another
from ether_diffusion.wording import printable

MAX_QUESTION, MAX_LOGIN = 16 << 20, 64 << 10
"""Bytes of what is no upload (a drawing of 4096 px is among it), and of a login."""
MAX_UPLOADS = 2 << 30
"""Bytes in Gradio's cache, where uploads are deleted after a day; more are refused."""
FREE_FAILURES, PAUSE = 5, 3.0
"""After so many wrong logins of a client in a row, each of its next takes so many seconds."""
MAX_IN_PAUSE, MAX_CLIENTS = 4, 10_000
"""Logins of one client that wait at a time, and clients whose wrong logins are remembered."""
_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_CALLED = re.compile(r"/(?:call|api|run)/(\w+)$")
_ELSEWHERE = re.compile(r"(file[=/]|proxy=)\s*[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
_FETCHES_NOTHING = "The studio fetches nothing from other places"
_OTHER_NAME = "The studio answers as localhost and 127.0.0.1 only; start it with --auth for another name."
_TOLD = ("application/json", "text/event-stream", "text/html")
_HEADERS: Final = {
    "X-Frame-Options": "SAMEORIGIN",
    "Content-Security-Policy": "frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
}


class Gate:
    """A middleware of Gradio's app that lets through what its pages, and scripts, have a reason to ask.

    Without a login, only names of this machine are answered, so that no other name can be made to lead here
    (DNS rebinding). With one, what must not be asked without it is not even read. What another site's page
    sends is refused, and so is every address that Gradio would fetch.
    """

    def __init__(self, app: ASGIApp, *, has_login: bool, uploads: Path, folder: Path) -> None:
        self._app, self._has_login, self._uploads = app, has_login, uploads
        self._inside, self._outside = str(folder).encode(), b"/studio-files"
        self._spelled = {self._inside, quote(str(folder)).encode(), json.dumps(str(folder))[1:-1].encode()}
        self._failures, self._pausing = dict[str, int](), Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_text = False

        async def sending(message: Message) -> None:
            nonlocal is_text
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                is_text = headers.get("content-type", "").startswith(_TOLD)
                if is_text and "content-length" in headers:
                    del headers["content-length"]  # of the text with the server's paths in it
            elif is_text:
                for spelled in self._spelled:
                    message["body"] = message.get("body", b"").replace(spelled, self._outside)
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._pass(scope, receive, sending)
        except HTTPException as refusal:
            said = {"detail": refusal.detail, "error": refusal.detail}
            await JSONResponse(said, refusal.status_code)(scope, receive, sending)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["path"] = scope["path"].replace(self._outside.decode(), self._inside.decode(), 1)
        headers, path = Headers(scope=scope), scope["path"].rstrip("/")
        if not self._has_login and _host_of(headers) not in _HOSTS:
            raise HTTPException(403, _OTHER_NAME)
        if _ELSEWHERE.search(path):
            raise HTTPException(403, f"{_FETCHES_NOTHING}.")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if is_from_page_of_another(headers):
            raise HTTPException(403, "This comes from a page of another site; open the studio itself.")
        if path == "/login":
            _, again = await _read(_counted(headers, receive, MAX_LOGIN))
            await self._log_in(scope, again, send)
        elif self._has_login and not _is_known(scope, headers):
            raise HTTPException(401, "Log in first.")
        elif path.endswith("/upload"):
            room = MAX_UPLOADS - await asyncio.to_thread(_size, self._uploads)
            await self._app(scope, _counted(headers, receive, room), send)
        else:
            body, again = await _read(_counted(headers, receive, MAX_QUESTION), self._outside, self._inside)
            asked: Any = None
            with suppress(ValueError, RecursionError):  # no JSON, which Gradio says itself
                asked = json.loads(body)
            _check_files(asked, self._uploads.resolve())
            if called := _CALLED.search(path):
                _check_values(asked, called[1], scope["app"].get_blocks().fns.values())
            await self._app(scope, again, send)

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let Gradio answer a login, after a pause where many of this client's were wrong.

        Guessing is slow for whoever guesses: nobody else waits, and the right password is never refused.
        """
        client = (scope.get("client") or ("",))[0]
        failures = self._failures.pop(client, 0)
        self._failures[client] = failures  # the last one to be forgotten
        if len(self._failures) > MAX_CLIENTS:
            del self._failures[next(iter(self._failures))]

        async def listening(message: Message) -> None:
            if message["type"] == "http.response.start":
                is_wrong = message["status"] >= 400
                self._failures[client] = self._failures.get(client, 0) + 1 if is_wrong else 0
            await send(message)

        if failures >= FREE_FAILURES:
            if self._pausing[client] >= MAX_IN_PAUSE:
                raise HTTPException(429, "Too many logins at once; wait a moment and try again.")
            self._pausing[client] += 1
            try:
                await asyncio.sleep(PAUSE * self._pausing[client])  # one after the other
            finally:
                self._pausing[client] -= 1
        await self._app(scope, receive, listening)


def _host_of(headers: Headers) -> str | None:
    with suppress(ValueError):
        return urlsplit(f"//{headers.get('host', '')}").hostname
    return None


def _is_known(scope: Scope, headers: Headers) -> bool:
    """Say whether a cookie is that of a login, as Gradio's own check does after it has read everything."""
    app, cookies = scope["app"], cookie_parser(headers.get("cookie", ""))
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(cookies.get(name) in app.tokens for name in names)


def _check_files(asked: Any, uploads: Path) -> None:
    """Refuse files that were not uploaded: Gradio would fetch them before any handler is asked."""
    left = [asked]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            path: Any = value.get("path")
            is_uploaded = not isinstance(path, str)
            with suppress(OSError, ValueError, TypeError):  # no path at all
                is_uploaded |= os.path.isabs(path) and Path(path).resolve().is_relative_to(uploads)  # noqa: PTH117
            if not is_uploaded:
                message = f"{_FETCHES_NOTHING}; upload the file first."
                said = {"is_valid": False, "parameter_name": "file", "message": message}
                raise HTTPException(422, [{"__type__": "validate", **said}])  # type: ignore[arg-type]  # as Gradio's


def _check_values(asked: Any, name: str, functions: Iterable[Any]) -> None:
    """Refuse a call with too few or too many values, or no text for a text: Gradio is silent."""
    function = next((each for each in functions if each.api_name == name), None)
    values = asked.get("data") if isinstance(asked, dict) else None
    if function is None or not isinstance(values, list):  # which Gradio says itself
        return
    inputs = [each for each in function.inputs if not each.skip_api]
    if len(values) != len(inputs):
        found = f"{len(inputs)} values and found {len(values)}"
        raise HTTPException(422, f"/{name} takes {found}; see /gradio_api/info.")
    for component, value in zip(inputs, values, strict=True):
        if component.get_block_name() == "textbox" and not isinstance(value, str | None):
            raise HTTPException(422, f"{component.label} is a text; found {printable(json.dumps(value))}.")


def _counted(headers: Headers, receive: Receive, room: int) -> Receive:
    """Give what is received, and refuse it when it is, or says it is, more than there is room for."""
    declared, received = headers.get("content-length", ""), 0

    def check(num_bytes: int) -> None:
        if num_bytes > room:
            most = f"This is more than the {max(0, room) >> 20} MiB that the studio takes now"
            rest = "send less, or wait until older uploads are deleted after a day."
            raise HTTPException(413, f"{most}; {rest}")

    async def counting() -> Message:
        nonlocal received
        message = await receive()
        check(received := received + len(message.get("body", b"")))
        return message

    check(int(declared) if declared.isdecimal() else 0)
    return counting


async def _read(receive: Receive, old: bytes = b"", new: bytes = b"") -> tuple[bytes, Receive]:
    """Return a whole body with `new` for `old`, and what gives it once more and then what else comes."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    whole = b"".join(message.get("body", b"") for message in messages)
    whole = whole.replace(old, new) if old else whole
    left = [{**messages[-1], "body": whole}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return whole, again


def _size(folder: Path) -> int:
    """Return the bytes of the files below a folder, which others add to and delete from meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total

"""API keys: a file of their hashes, and who may ask for how much at a time."""

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ether_diffusion.durable_files import write_files
from ether_diffusion.wording import printable

_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}) (?P<digest>[0-9a-f]{64})(?: (?P<limit>[1-9]\d{0,3}))?")


@dataclass
class Caller:
    """Who asks: at most `limit` of their requests wait or are drawn at a time."""

    name: str
    limit: int
    num_open: int = 0


@dataclass(frozen=True)
class Keys:
    """Callers by the SHA-256 of their keys; without any, everybody is one caller.

    Attributes:
        callers: by digest; None where no key is asked for.
    """

    callers: dict[str, Caller] | None
    anybody: Caller = field(default_factory=lambda: Caller("anybody", 10**6))

    @classmethod
    def read(cls, path: Path, limit: int) -> "Keys":
        """Read a file of lines "name sha256 [limit]"; `limit` is that of those that say none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line is something else.
        """
        callers = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = _LINE.fullmatch(line.strip())
            if line.strip() and match is None:
                raise ValueError(
                    f"line {number} of {path} is not NAME SHA256 [LIMIT]; make keys by ether serve --new_key"
                )
            if match is not None:
                callers[match["digest"]] = Caller(match["name"], int(match["limit"] or limit))
        return cls(callers)

    def caller(self, authorization: str | None) -> Caller | None:
        """Return whose key a header "Bearer KEY" holds, None where nobody's."""
        if self.callers is None:
            return self.anybody
        key = (authorization or "").removeprefix("Bearer ").strip()
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = None
        for each, caller in self.callers.items():  # all of them: the time tells nothing
            if hmac.compare_digest(each, digest):
                found = caller
        return found


def new_key(path: Path, name: str) -> str:
    """Make a key for a name, add its hash to the file, and return it: it is nowhere else.

    Raises:
        ValueError: the name cannot stand in the file, or has a key there.
    """
    key = f"ether-{secrets.token_urlsafe(32)}"
    line = f"{name} {hashlib.sha256(key.encode()).hexdigest()}"
    if _LINE.fullmatch(line) is None:
        raise ValueError(f"{printable(name)} is no name of a key; use up to 64 letters, digits and _.-")
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if any(each.split(" ")[0] == name for each in before):
        raise ValueError(f"{name} has a key in {path}; delete its line first, or use another name")
    write_files(path.parent, {path.name: "\n".join([*before, line, ""]).encode()})
    return key


def is_loopback(host: str) -> bool:
    """Say whether an address is this machine's own, which no other reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_from_page_of_another(headers: Mapping[str, str]) -> bool:
    """Say whether a request comes from the page of another site; programs say neither site nor origin."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")

"""The login of a studio that listens to the network: one name, one password, few tries."""

import hmac
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ether_diffusion.adapter_file.wording import printable

MIN_PASSWORD_LENGTH = 8
MAX_FAILURES = 5
PAUSE = 30.0
"""Seconds without a login after that many wrong ones in a row; who is logged in stays so."""


@dataclass
class Doorkeeper:
    """Answers whether a name and password are the right ones, and nothing for a while after many wrong ones.

    Raises:
        ValueError: there is no name, or the password is shorter than 8 characters.
    """

    name: str
    password: str = field(repr=False)
    _failures: int = field(default=0, init=False)
    _closed_until: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.name or len(self.password) < MIN_PASSWORD_LENGTH:
            raise ValueError(
                f"auth needs a name and a password of {MIN_PASSWORD_LENGTH} characters or more; "
                "give it as NAME:PASSWORD"
            )

    def __call__(self, name: str, password: str) -> bool:
        """Say whether to let them in."""
        with self._lock:
            if time.monotonic() < self._closed_until:
                return False
            right = hmac.compare_digest(name.encode(), self.name.encode())
            right &= hmac.compare_digest(password.encode(), self.password.encode())
            self._failures = 0 if right else self._failures + 1
            if self._failures >= MAX_FAILURES:
                self._failures, self._closed_until = 0, time.monotonic() + PAUSE
            return right


def read_login(text: str) -> Doorkeeper:
    """Read NAME:PASSWORD, or @FILE that holds it, which no list of processes shows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no colon, no name, or the password is short.
    """
    if text.startswith("@"):
        file = Path(text[1:]).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {printable(file)}; auth is NAME:PASSWORD or @FILE")
        text = file.read_text(encoding="utf-8").partition("\n")[0]
    name, _, password = text.partition(":")
    return Doorkeeper(name.strip(), password)

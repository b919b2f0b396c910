"""The login of a studio that listens to the network: one name and one password."""

import hmac
from dataclasses import dataclass, field
from pathlib import Path

from ether_diffusion.wording import printable

MIN_PASSWORD_LENGTH = 8


@dataclass(frozen=True)
class Doorkeeper:
    """Answers whether a name and password are the right ones; `ui.gate` slows down who guesses.

    Raises:
        ValueError: there is no name, or the password is shorter than 8 characters.
    """

    name: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.name or len(self.password) < MIN_PASSWORD_LENGTH:
            raise ValueError(
                f"auth needs a name and a password of {MIN_PASSWORD_LENGTH} characters or more; "
                "give it as NAME:PASSWORD"
            )

    def __call__(self, name: str, password: str) -> bool:
        """Say whether to let them in."""
        right = hmac.compare_digest(name.encode(), self.name.encode())
        return right & hmac.compare_digest(password.encode(), self.password.encode())


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

"""Words for what was found in a file: escaped, so that no name in it can write to a terminal."""

from collections.abc import Iterable


def printable(text: object, limit: int = 120) -> str:
    """Return text with control, bidirectional and other invisible characters escaped, cut at `limit`."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return escaped if len(escaped) <= limit else f"{escaped[:limit]}…"


def listed(names: Iterable[object], limit: int = 5, separator: str = ", ") -> str:
    """Return the first names, or sentences with "; " between, and how many more there are."""
    shown = [printable(name, 120 if separator == ", " else 500) for name in names]
    if len(shown) == limit + 1:  # "and 1 more" would be as long as the name
        limit += 1
    rest = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return separator.join(shown[:limit]) + rest

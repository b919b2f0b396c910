"""What a tokenizer makes of a prompt: where it is cut off, and how a trigger word is read."""

from dataclasses import dataclass
from typing import Protocol

from ether_diffusion.wording import printable

_UNBOUNDED = 100_000
"""transformers gives a tokenizer that names no limit a limit of about 1e30."""
_WHOLE_LANGUAGE = 30_000
"""Byte-pair vocabularies stand in the order of merging, common words first; in those learned from a smaller
world, rank says little."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    model_max_length: int

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, verbose: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True)
class PromptCut:
    """A prompt too long for its text encoder; kept and lost are its halves as the tokenizer spells them."""

    kept: str
    lost: str
    num_tokens: int
    max_tokens: int

    def __str__(self) -> str:
        """One sentence that shows the cut."""
        return (
            f"the prompt has {self.num_tokens} tokens and {self.max_tokens} are read: "
            f'"…{printable(self.kept[-60:])}" ✂ "{printable(self.lost)}" is lost; write it shorter'
        )


def find_cut(prompt: str, tokenizer: Tokenizer) -> PromptCut | None:
    """Return where a prompt is cut, None where all of it is read.

    Counts include the tokens that mark start and end, as the text encoder's limit does (77 for CLIP).
    """
    token_ids, limit = tokenizer.encode(prompt, verbose=False), tokenizer.model_max_length
    if limit > _UNBOUNDED or len(token_ids) <= limit:
        return None
    return PromptCut(
        kept=tokenizer.decode(token_ids[1 : limit - 1]).strip(),
        lost=tokenizer.decode(token_ids[limit - 1 : -1]).strip(),
        num_tokens=len(token_ids),
        max_tokens=limit,
    )


def doubt_token(token: str, tokenizer: Tokenizer, *, max_tokens: int = 3) -> str | None:
    """Return a warning where a trigger word is long in tokens, or a word that already means something.

    Common is a single token in the first half of a vocabulary of a whole language, as CLIP's.
    """
    token_ids = tokenizer.encode(token, verbose=False)[1:-1]
    shown = printable(token)
    if len(token_ids) > max_tokens:
        return f'the trigger word "{shown}" is read as {len(token_ids)} tokens; use a shorter one'
    vocab_size = tokenizer.vocab_size
    if len(token_ids) == 1 and vocab_size > _WHOLE_LANGUAGE and token_ids[0] < vocab_size // 2:
        return f'the trigger word "{shown}" is common, and its meaning will change; use a rare one like sks'
    return None

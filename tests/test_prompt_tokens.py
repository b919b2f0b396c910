"""Where a prompt is cut and how a trigger word is read, by a stand-in and by a real tokenizer."""

from ether_diffusion.training.prompt_tokens import doubt_token, find_cut
from recipes.tiny_world.tokenizer import IDENTIFIERS, train_tokenizer

CLIP_RANKS = {
    "a": 320,
    "photo": 1125,
    "of": 539,
    "dog": 1929,
    "on": 525,
    "the": 518,
    "beach": 2117,
    "sks": 48136,
}
START, END, NUM_WORDS = 49406, 49407, 49408


class WordTokenizer:
    """A stand-in with a token per word, numbered as CLIP numbers them."""

    vocab_size = NUM_WORDS

    def __init__(self, limit: int = 8) -> None:
        self.model_max_length = limit

    def encode(self, text: str, *, verbose: bool) -> list[int]:
        return [START, *(CLIP_RANKS[word] for word in text.split()), END]

    def decode(self, token_ids: list[int]) -> str:
        words = {rank: word for word, rank in CLIP_RANKS.items()}
        return " ".join(words[token_id] for token_id in token_ids)


def test_a_prompt_is_shown_with_the_place_of_its_cut() -> None:
    assert find_cut("a photo of sks dog on", WordTokenizer()) is None
    cut = find_cut("a photo of sks dog on the beach", WordTokenizer())
    assert cut is not None
    assert (cut.kept, cut.lost) == ("a photo of sks dog on", "the beach")
    expected = 'the prompt has 10 tokens and 8 are read: "…a photo of sks dog on" ✂ "the beach" is lost'
    assert str(cut).startswith(expected)


def test_a_tokenizer_without_a_limit_cuts_nothing() -> None:
    assert find_cut("a photo", WordTokenizer(limit=10**30)) is None


def test_a_common_or_long_trigger_word_is_doubted() -> None:
    assert doubt_token("sks", WordTokenizer()) is None
    assert 'the trigger word "dog" is common' in str(doubt_token("dog", WordTokenizer()))
    assert 'the trigger word "sks on the beach" is read as 4' in str(
        doubt_token("sks on the beach", WordTokenizer())
    )


def test_a_clip_tokenizer_loses_what_lies_past_its_limit() -> None:
    tokenizer = train_tokenizer(["a photo of a dog"] * 10, ["dog"])
    room = tokenizer.model_max_length - 2
    assert find_cut(" ".join(["dog"] * room), tokenizer) is None
    cut = find_cut(" ".join(["dog"] * room + ["photo", "of"]), tokenizer)
    assert cut is not None
    assert (cut.num_tokens, cut.max_tokens, cut.lost) == (room + 4, room + 2, "photo of")


def test_the_identifiers_of_tiny_world_are_not_doubted() -> None:
    tokenizer = train_tokenizer(["a photo of a dog"] * 10, ["dog"])
    assert [doubt_token(identifier, tokenizer) for identifier in IDENTIFIERS] == [None] * 3

"""The tokenizer of Tiny World: a CLIPTokenizer learned from the world's captions and names."""

import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from ether_diffusion.tiny_world.concepts import load_concepts

VOCABULARY_SIZE = 2_048
MAX_TOKENS = 24
# Rare words that stand for a subject in DreamBooth prompts; each is one token.
IDENTIFIERS = ("sks", "zwx", "ohwx")


def _words_of_the_world(emoji_names: Iterable[str]) -> list[str]:
    """The words of emoji names, without those of the held-out concepts."""
    text = " ".join(emoji_names).lower()
    hidden = {word for concept in load_concepts("held_out") for word in concept.name.split()}
    shown = {word for concept in load_concepts("trained") for word in concept.name.split()}
    return [word for word in re.findall(r"[a-z]+", text) if word not in hidden - shown]


def train_tokenizer(captions: Iterable[str], emoji_names: Iterable[str]) -> CLIPTokenizer:
    """Learn byte-pair merges from captions and emoji names; every identifier becomes one token."""
    blank = CLIPTokenizer(vocab=None, merges=None).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2 * len(alphabet) - 2, end_of_word_suffix="</w>", show_progress=False
    )
    corpus = [*captions, *_words_of_the_world(emoji_names) * 3, *IDENTIFIERS * 10_000]
    learner.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(character + "</w>" for character in alphabet)]
    tokens += ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)

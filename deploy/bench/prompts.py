"""Prompts of given lengths: as token ids, or as text of exactly so many tokens.

The values of the tokens come from `seed`, which is another one in every run unless the user fixes it: a prompt that an
earlier run has sent would come from the server's prefix cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...cluster.errors import ConfigError

LOWEST_TOKEN = 16
"""Special tokens usually stand below."""
MAX_WORDS = 4000
_WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work number night point home water room mother area money story
fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city name team minute idea kid body back parent face level office door health person
art war history party result change morning reason girl guy moment air teacher force order
"""
PLAIN_WORDS = tuple(_WORDS.split())
"""Short words that are one token with most tokenizers, for when the tokenizer is not known."""


class TokenPrompts:
    """Prompts as lists of token ids, uniform between `LOWEST_TOKEN` and `vocab_size`."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        if vocab_size <= LOWEST_TOKEN:
            raise ConfigError(f"--vocab-size {vocab_size}: must be more than {LOWEST_TOKEN}")
        self._vocab_size = vocab_size
        self._seed = seed

    def draw(self, length: int, *key: int) -> list[int]:
        """`length` tokens that are a function of the seed and `key`."""
        generator = np.random.default_rng([self._seed, *key])
        return generator.integers(LOWEST_TOKEN, self._vocab_size, length).tolist()

    def finish(self, tokens: list[int]) -> list[int] | str:
        """The prompt as it is sent."""
        return tokens


class TextPrompts:
    """Prompts as text, made of words that are one token each.

    Args:
        words: each begins with a space.
        special_tokens: how many tokens the tokenizer adds to every text; the prompts are shorter by so many.
    """

    def __init__(self, words: Sequence[str], seed: int, special_tokens: int = 0) -> None:
        self._words = words
        self._seed = seed
        self._special_tokens = special_tokens

    def draw(self, length: int, *key: int) -> list[int]:
        """Indices of `length` words that are a function of the seed and `key`."""
        return np.random.default_rng([self._seed, *key]).integers(0, len(self._words), length).tolist()

    def finish(self, tokens: list[int]) -> list[int] | str:
        """The prompt as it is sent."""
        return "".join(self._words[index] for index in tokens[: max(1, len(tokens) - self._special_tokens)])


PromptSource = TokenPrompts | TextPrompts


def text_prompts(tokenizer: Path | None, seed: int) -> TextPrompts:
    """Texts for the tokenizer in a model folder, exact to the token; without a folder about one token per word.

    Raises:
        ConfigError: no `tokenizer.json` there, or no words that are one token.
    """
    if tokenizer is None:
        return TextPrompts([f" {word}" for word in PLAIN_WORDS], seed)
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.exists():
        raise ConfigError(f"--tokenizer {tokenizer}: no tokenizer.json there; name a folder in Hugging Face format")
    loaded = Tokenizer.from_file(str(file))
    words = single_token_words(loaded)
    if len(words) < 2:
        raise ConfigError(f"--tokenizer {tokenizer}: no entry is a word of one token; use --prompt-form tokens")
    return TextPrompts(words, seed, loaded.num_special_tokens_to_add(False))


def single_token_words(tokenizer: object) -> list[str]:
    """Words that stay one token each wherever they stand in a text made of such words.

    Entries that are letters after a space; where a tokenizer has none, as one with a token per byte, single characters.
    """
    from tokenizers import Tokenizer

    assert isinstance(tokenizer, Tokenizer)
    texts = [tokenizer.decode([index]) for index in range(tokenizer.get_vocab_size())]
    spaced = [f" {text.strip()}" for text in texts if text.strip().isascii() and text.strip().isalpha()]
    for candidates in (spaced, [text for text in texts if len(text) == 1 and text.isascii() and text.isalpha()]):
        words = [word for word in dict.fromkeys(candidates) if _count(tokenizer, word) == 1]
        random.Random(0).shuffle(words)
        words = words[:MAX_WORDS]
        if len(words) > 1 and _count(tokenizer, "".join(words)) == len(words):
            return words
    return []


def _count(tokenizer: object, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)  # type: ignore[attr-defined]

"""Exercise 2: show a model's text while it is being written."""

from collections.abc import Iterable, Iterator

import fastgpt


def stream_text(tokenizer: fastgpt.Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of token ids that arrive one after the other, in parts that can be shown at once.

    After each id, yields the whole characters that have become complete with it; nothing (not an empty string) where
    none has. A character's bytes may be spread over several tokens (`tokenizer.decode_bytes([id])` gives a token's
    bytes), and one token may hold the end of one character and the beginning of the next. Must not wait for an id
    longer than that: `ids` may be a model that is thinking.

    If the ids end within a character, yields one U+FFFD for what is left of it. The parts joined are then
    `tokenizer.decode(all the ids)`.
    """
    # Your code goes here.

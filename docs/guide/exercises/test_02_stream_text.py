"""Exercise 2: python -m pytest docs/guide/exercises/test_02_stream_text.py"""

import pytest

import fastgpt


@pytest.fixture
def stream_text(answer):
    return answer("02_stream_text", "stream_text")


@pytest.fixture(scope="module")
def tokenizer():
    return fastgpt.Tokenizer.train(texts=["to be or not to be, that is the question: à la carte"] * 3, vocab_size=300)


@pytest.mark.parametrize("text", ["to be", "naïve 猫 🙂🙂!", "été", "\N{FAMILY}\r\n\0", ""])
def test_the_parts_joined_are_the_text(stream_text, tokenizer, text):
    parts = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert "".join(parts) == text
    assert "" not in parts, "an empty part is nothing to show"


def test_each_part_comes_with_the_id_that_completes_it(stream_text, tokenizer):
    ids = tokenizer.encode("to 🙂 be猫")
    taken = []

    def slowly():
        for id_ in ids:
            taken.append(id_)
            yield id_

    shown = ""
    for part in stream_text(tokenizer, slowly()):
        shown += part
        complete = tokenizer.decode_bytes(taken).decode("utf-8", "ignore")
        assert shown == complete, f"after the tokens of {complete!r} it had shown {shown!r}"


def test_it_never_shows_half_a_character(stream_text, tokenizer):
    for text in ("🙂", "猫と犬", "a🙂b"):
        assert all("\N{REPLACEMENT CHARACTER}" not in part for part in stream_text(tokenizer, tokenizer.encode(text)))


def test_a_token_with_the_end_of_one_character_and_the_beginning_of_the_next(stream_text):
    class Bytes:
        """As a tokenizer whose tokens are these."""

        tokens = (b"a\xc3", b"\xa9\xf0\x9f", b"\x99\x82", b"!")

        def decode_bytes(self, ids):
            return b"".join(self.tokens[i] for i in ids)

    assert list(stream_text(Bytes(), [0, 1, 2, 3])) == ["a", "é", "🙂", "!"]


def test_what_is_left_at_the_end_is_shown_as_broken(stream_text, tokenizer):
    ids = tokenizer.encode("be 🙂")[:-1]
    parts = list(stream_text(tokenizer, ids))
    assert parts[-1] == "\N{REPLACEMENT CHARACTER}"
    assert "".join(parts) == tokenizer.decode(ids)

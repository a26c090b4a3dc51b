"""Events come out of the stream whole and in order, wherever the bytes are cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from raytroupe.deploy.bench.sse import EventParser

payloads = st.lists(
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=6
)


def feed(stream: bytes, cuts: list[int]) -> list[bytes]:
    parser = EventParser()
    events: list[bytes] = []
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    for start, end in itertools.pairwise(places):
        events += parser.feed(stream[start:end])
    return events


@given(payloads, st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 400)))
def test_any_cut_gives_the_same_events(texts: list[str], end: str, cuts: list[int]) -> None:
    stream = "".join(f": note{end}event: x{end}data: {text}{end}{end}" for text in texts).encode()
    assert feed(stream, cuts) == [text.encode() for text in texts]


def test_a_character_may_be_divided() -> None:
    stream = "data: 🙂\n\n".encode()
    for cut in range(len(stream)):
        assert feed(stream, [cut]) == ["🙂".encode()]


def test_lines_of_one_event_are_joined() -> None:
    assert feed(b"data: a\ndata:b\ndata:\n\n", []) == [b"a\nb\n"]


def test_space_after_the_colon_is_optional_and_only_one() -> None:
    assert feed(b"data:a\n\ndata:  b\n\n", []) == [b"a", b" b"]


def test_an_event_without_its_empty_line_is_not_given() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]


def test_comments_alone_make_no_event() -> None:
    assert feed(b": ping\n\n: ping\n\ndata: a\n\n", []) == [b"a"]

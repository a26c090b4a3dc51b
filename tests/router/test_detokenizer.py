"""Text comes out token by token, whole characters only, and equal to what the tokenizer says of all tokens."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from raytroupe.router.detokenizer import Detokenizer, StopStrings
from raytroupe.router.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "deploy" / "demo_models" / "demo-large" / "tokenizer.json"


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    backend.train_from_iterator(["hello world, hello wide world"] * 5, trainer)
    backend.add_tokens(["added word"])  # a space is not in the byte alphabet
    return backend


def sentencepiece(strip: bool = True) -> Backend:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrd", "▁hello", "▁world"]
    backend = Backend(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)] if strip else parts)
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


def metaspace() -> Backend:
    pieces = ["<unk>", "▁", *"helowrd", "▁hello", "▁world"]
    backend = Backend(models.WordLevel(vocab={p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def wordpiece() -> Backend:
    pieces = ["[UNK]", "hello", "##wo", "##rld", "world", ",", "."]
    backend = Backend(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return backend


def undecorated() -> Backend:
    return Backend(models.WordLevel(vocab={"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))


BACKENDS = {
    "demo": Backend.from_file(str(DEMO)),
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece_unstripped": sentencepiece(strip=False),
    "metaspace": metaspace(),
    "wordpiece": wordpiece(),
    "undecorated": undecorated(),
}
TEXTS = [
    "hello world",
    "👩‍👩‍👧 世界 é\u0301 \U0001f1e9\U0001f1ea",
    "  two  spaces\n\ttab",
    "naïve – “quoted”",
    "�",
    "\x00",
]


def pieces(backend: Backend, tokens: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(Tokenizer(backend), **options)
    return [detokenizer.push(token) for token in tokens]


@pytest.mark.parametrize("name", ["demo", "byte_level", "sentencepiece", "sentencepiece_unstripped"])
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(name: str, text: str) -> None:
    backend = BACKENDS[name]
    tokens = backend.encode(text, add_special_tokens=False).ids
    found = "".join(pieces(backend, tokens))
    assert found == backend.decode(tokens)
    assert found.strip() == text.strip()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
def test_random_tokens_give_the_tokenizers_own_text(name: str, skip: bool, data: st.DataObject) -> None:
    backend = BACKENDS[name]
    ids = st.integers(0, backend.get_vocab_size() - 1)
    tokens = data.draw(st.lists(ids, max_size=12))
    whole = backend.decode(tokens, skip_special_tokens=skip)
    if "\ufffd" not in whole:  # of broken characters the decoders make different numbers of U+FFFD
        assert "".join(pieces(backend, tokens, skip_special_tokens=skip)) == whole


def test_a_character_comes_out_when_its_last_byte_arrives() -> None:
    backend = BACKENDS["byte_level"]
    tokens = backend.encode("a👩b", add_special_tokens=False).ids
    assert pieces(backend, tokens) == ["a", "", "", "", "👩", "b"]


def test_broken_bytes_become_replacement_characters_at_once() -> None:
    backend = BACKENDS["byte_level"]
    first, second, *_ = backend.encode("👩", add_special_tokens=False).ids
    (letter,) = backend.encode("x", add_special_tokens=False).ids
    assert pieces(backend, [second, second, first, second, letter]) == ["�", "�", "", "", "�x"]


def test_a_sent_character_is_not_taken_back_when_later_fallback_bytes_are_broken() -> None:
    backend = BACKENDS["sentencepiece"]
    complete = [backend.token_to_id("<0xC3>"), backend.token_to_id("<0xA9>")]
    tokens = [*complete, backend.token_to_id("<0xC3>"), backend.token_to_id("h")]
    assert pieces(backend, tokens) == ["", "é", "", "�h"]


def test_a_leading_space_is_dropped_only_at_the_start_of_a_text() -> None:
    backend = BACKENDS["sentencepiece"]
    tokenizer = Tokenizer(backend)
    hello, bos = backend.token_to_id("▁hello"), backend.token_to_id("<s>")
    assert Detokenizer(tokenizer, [bos]).push(hello) == "hello"
    assert Detokenizer(tokenizer, [bos, hello]).push(hello) == " hello"


def test_special_tokens_are_skipped_unless_wanted() -> None:
    backend = BACKENDS["byte_level"]
    tokens = [backend.token_to_id("<|end|>"), backend.token_to_id("added word")]
    assert pieces(backend, tokens) == ["", "added word"]
    assert pieces(backend, tokens, skip_special_tokens=False) == ["<|end|>", "added word"]


def test_ids_without_a_token_have_no_text() -> None:
    assert pieces(BACKENDS["byte_level"], [100_000]) == [""]


def scan(stops: list[str], parts: list[str], include: bool = False) -> tuple[list[str], str | None]:
    scanner = StopStrings(stops, include=include)
    shown = []
    for part in parts:
        shown.append(scanner.push(part))
        if scanner.found is not None:
            return shown, scanner.found
    return [*shown, scanner.flush()], None


def test_text_is_held_back_only_while_a_stop_string_could_begin() -> None:
    assert scan(["###"], ["a#", "b", "##", "c"]) == (["a", "#b", "", "##c", ""], None)
    assert scan(["###"], ["a", "##", "#x"]) == (["a", "", ""], "###")
    assert scan(["###"], ["a##"]) == (["a", "##"], None)


def test_a_found_stop_string_can_stay() -> None:
    assert scan(["lo w"], ["hel", "lo", " wide"], include=True) == (["he", "l", "lo w"], "lo w")


@given(
    text=st.text(alphabet="ab", max_size=24),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 24)),
    include=st.booleans(),
)
def test_how_text_is_cut_does_not_matter(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, found = scan(stops, parts, include)
    # Oracle: the shortest prefix that ends in a stop string, and the longest one it ends in.
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    if not ends:
        assert ("".join(shown), found) == (text, None)
    else:
        stop = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert found == stop
        assert "".join(shown) == text[: ends[0] if include else ends[0] - len(stop)]

"""Features of prompts: the same everywhere, bounded, and about form rather than about particular numbers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from zlib import crc32

from hypothesis import given
from hypothesis import strategies as st

from raytroupe.router.prompt_features import COUNTS, EDGE, EDGE_WORDS, Features, PromptFacts, prompt_features


def features(text: str, **fields: int) -> Features:
    return prompt_features(PromptFacts(text=text, **{"chars": len(text), "prompt_tokens": 7, **fields}))


def count(text: str, name: str) -> int:
    return round(math.expm1(features(text).counts[COUNTS.index(name)]))


def test_counts_say_what_stands_in_the_text() -> None:
    text = "Is 12 + 345 = 357?\nYes, (a) or `b`! é"
    expected = {
        "lines": 2,
        "digits": 8,
        "distinct_digits": 6,
        "numbers": 3,
        "longest_number": 3,
        "shortest_number": 2,
        "operators": 2,
        "brackets": 2,
        "commas": 1,
        "stops": 1,
        "questions": 1,
        "code_signs": 2,
        "non_ascii": 1,
        "message_chars": len(text),
        "prompt_tokens": 7,
    }
    assert {name: count(text, name) for name in expected} == expected


def test_sums_of_the_same_form_have_the_same_phrases() -> None:
    assert set(features("What is 12 + 345?").phrases) == set(features("what is 67 + 890?").phrases)
    assert set(features("What is 12 + 345?").phrases) != set(features("What is 12 + 34?").phrases)


def test_a_phrase_is_the_documented_checksum() -> None:
    words = [b"\x02\n", b"add\n", b"00\n", b"\x03\n"]
    expected = {crc32(b"".join(words[i : i + n])) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
    expected -= {crc32(words[0]), crc32(words[-1])}
    assert set(features("Add 12").phrases) == expected


def test_phrases_do_not_depend_on_the_process() -> None:
    program = (
        "from raytroupe.router.prompt_features import *\n"
        "print(sorted(prompt_features(PromptFacts(text='Sort 3, 1', chars=9, prompt_tokens=7)).phrases))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert output.stdout.strip() == str(sorted(features("Sort 3, 1").phrases))


def test_only_the_edges_of_a_long_message_are_looked_at() -> None:
    head, tail = "a " * (EDGE // 2), " b" * (EDGE // 2)
    assert features(head + "x " * 5000 + tail, chars=0).phrases == features(head + "y " * 5000 + tail, chars=0).phrases
    assert len(features("1+a-" * 10_000).phrases) <= 3 * (2 * EDGE_WORDS + 2)


@given(st.text(max_size=80) | st.binary(max_size=80).map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_any_text_has_features(text: str) -> None:
    found = features(text)
    assert len(found.counts) == len(COUNTS)
    assert all(math.isfinite(number) and number >= 0 for number in found.counts)
    assert len(set(found.phrases)) == len(found.phrases)
    assert all(0 <= phrase < 1 << 32 for phrase in found.phrases)

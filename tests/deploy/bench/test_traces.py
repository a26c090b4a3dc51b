"""Recorded loads of both formats are read as they were recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.bench.prompts import TextPrompts, TokenPrompts
from raytroupe.deploy.bench.traces import TraceEntry, read_trace, scale_trace
from raytroupe.deploy.bench.workload import recorded

MOONCAKE = [
    {"timestamp": 27482, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 48]},
    {"timestamp": 30535, "input_length": 1030, "output_length": 26, "hash_ids": [46, 47, 57]},
    {"timestamp": 30535, "input_length": 700, "output_length": 3, "hash_ids": [46]},
    {"timestamp": 31000, "input_length": 600, "output_length": 9, "hash_ids": [7, 47]},
]
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
120,GPT-4,1360,145,1505,API log
"""


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(map(json.dumps, MOONCAKE)) + "\n\n")
    return path


@pytest.fixture
def burstgpt(tmp_path: Path) -> Path:
    path = tmp_path / "burstgpt.csv"
    path.write_text("\ufeff" + BURSTGPT, encoding="utf-8")
    return path


def test_mooncake_times_are_seconds_after_the_first(mooncake: Path) -> None:
    entries = read_trace(mooncake)
    assert [entry.arrival for entry in entries] == pytest.approx([0.0, 3.053, 3.053, 3.518])
    assert entries[1] == TraceEntry(entries[1].arrival, 1030, 26, (46, 47, 57))


def test_burstgpt_leaves_failed_requests_out(burstgpt: Path) -> None:
    assert read_trace(burstgpt) == [TraceEntry(0.0, 472, 18), TraceEntry(40.5, 1087, 230), TraceEntry(115.0, 1360, 145)]


def test_limit_takes_the_first(mooncake: Path) -> None:
    assert len(read_trace(mooncake, limit=2)) == 2


def test_equal_hash_ids_are_equal_blocks(mooncake: Path) -> None:
    first, second, third, fourth = (
        r.prompt for r in recorded(TokenPrompts(30_000, 5), read_trace(mooncake), variant=1)
    )
    assert [len(prompt) for prompt in (first, second, third, fourth)] == [1200, 1030, 700, 600]
    assert first[:1024] == second[:1024], "blocks 46 and 47"
    assert first[1024:1030] != second[1024:1030], "blocks 48 and 57"
    assert third[:512] == first[:512]
    assert third[512:600] != first[512:600], "beyond its ids a prompt is its own"
    assert fourth[:88] != first[:88]
    assert fourth[512:600] == first[512:600], "block 47, though at another place of no use to a prefix cache"


def test_blocks_of_text_are_equal_too(mooncake: Path) -> None:
    prompts = TextPrompts([" a", " b", " c"], 5)
    first, second = (request.prompt for request in list(recorded(prompts, read_trace(mooncake), variant=1))[:2])
    assert isinstance(first, str)
    assert isinstance(second, str)
    assert len(first.split()) == 1200
    assert first.split()[:1024] == second.split()[:1024]


def test_another_variant_has_other_prompts_of_the_same_structure(mooncake: Path) -> None:
    prompts, entries = TokenPrompts(30_000, 5), read_trace(mooncake)
    one, other = (list(recorded(prompts, entries, variant=variant)) for variant in (1, 2))
    assert one[0].prompt[:16] != other[0].prompt[:16]
    assert other[0].prompt[:1024] == other[1].prompt[:1024]


def test_scaling_keeps_the_shared_part(mooncake: Path) -> None:
    entries = scale_trace(read_trace(mooncake), time_scale=0.5, length_scale=0.1)
    assert entries[1].arrival == pytest.approx(1.5265)
    assert [(entry.prompt_len, entry.output_len) for entry in entries[:2]] == [(120, 5), (103, 3)]
    first, second = (r.prompt for r in list(recorded(TokenPrompts(999, 0), entries, variant=1, length_scale=0.1))[:2])
    assert first[:102] == second[:102]
    assert first[102:103] != second[102:103] or first[102:] != second[102:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a BurstGPT trace"),
        ("Timestamp,Request tokens\n1,2\n", "no column 'Response tokens'"),
        ("Timestamp,Request tokens,Response tokens\n", "no requests"),
        ("Timestamp,Request tokens,Response tokens\n1,2,3\n1,x,3\n", ":3: not a time and two counts"),
        ("Timestamp,Request tokens,Response tokens\n1,2\n", ":2: not a time and two counts"),
        ('{"timestamp": 1}\n', ":1: not a line of a Mooncake trace"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [-1]}', ":1: not a line"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 5}', "no requests"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


def test_missing_file_and_unknown_format(tmp_path: Path, burstgpt: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="choose auto, mooncake or burstgpt"):
        read_trace(burstgpt, "azure")
    with pytest.raises(ConfigError, match="not a line of a Mooncake trace"):
        read_trace(burstgpt, "mooncake")

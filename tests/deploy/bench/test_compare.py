"""The comparison with peers: sides take turns, figures are medians, and a side that cannot run says why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_models import VOCAB_SIZE, make_tiny_model

from raytroupe.cluster.errors import ConfigError, EngineError
from raytroupe.deploy.bench import compare
from raytroupe.deploy.bench.compare import Side, parse_counts, parse_peer, rows, run_side
from raytroupe.deploy.bench.peers.points import Point, batches, figures, prompts

STAND_IN = """
import json, sys
print("loading", flush=True)
for count in (1, 4):
    print(json.dumps({"peer": "stand-in", "concurrency": count, "decode_tok_s": 10.0 * count,
                      "prefill_tok_s": 100.0, "total_tok_s": 5.0}))
"""


def test_speeds_follow_from_the_two_times() -> None:
    speeds = figures(Point(8, 128, 64), total_s=5.0, prefill_s=1.0)
    assert speeds == {"prefill_tok_s": 1024.0, "decode_tok_s": 126.0, "total_tok_s": 102.4}


def test_prompts_are_new_at_every_call() -> None:
    first, second = prompts(3, 16), prompts(3, 16)
    assert [len(prompt) for prompt in first] == [16, 16, 16]
    assert first != second
    assert all(10 <= token < 100 for prompt in prompts(4, 64, 100) for token in prompt)


def test_batches_cover_all_requests_once() -> None:
    assert [list(group) for group in batches(5, 2)] == [[0, 1], [2, 3], [4]]


def test_ratio_is_of_medians_to_the_best_peer() -> None:
    def run(decode: float) -> dict[int, dict[str, float]]:
        return {8: {"decode_tok_s": decode, "prefill_tok_s": 1.0, "total_tok_s": 2.0}}

    runs = {
        "troupe": [run(30.0), run(90.0), run(60.0)],
        "vllm": [run(20.0), run(20.0), run(1000.0)],
        "openvino": [run(40.0), run(41.0), run(39.0)],
    }
    decode = rows(runs, [8])[0]
    assert decode == {
        "what": "decode",
        "concurrency": 8,
        "troupe": 60.0,
        "vllm": 20.0,
        "openvino": 40.0,
        "best_peer": "openvino",
        "ratio": 1.5,
    }


def test_without_peers_there_is_no_ratio() -> None:
    runs = {"troupe": [{1: {"decode_tok_s": 3.0, "prefill_tok_s": 1.0, "total_tok_s": 2.0}}]}
    assert all("ratio" not in row for row in rows(runs, [1]))


def test_a_side_is_run_and_its_lines_are_read() -> None:
    lines = run_side(Side("stand-in", (sys.executable, "-c", STAND_IN)))
    assert [(line["concurrency"], line["decode_tok_s"]) for line in lines] == [(1, 10.0), (4, 40.0)]


def test_a_side_that_fails_says_what_it_said() -> None:
    program = "import sys; print('no such instruction', file=sys.stderr); sys.exit(3)"
    with pytest.raises(EngineError, match=r"(?s)peer ended with code 3.*no such instruction"):
        run_side(Side("peer", (sys.executable, "-c", program)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("vllm", "write NAME=PYTHON:MODEL"),
        ("vllm=python", "write NAME=PYTHON:MODEL"),
        (f"sglang={sys.executable}:.", "unknown peer; known: llama.cpp, openvino, vllm, transformers"),
        ("vllm=/no/python:.", "/no/python is not an interpreter"),
        (f"vllm={sys.executable}:/no/model", "/no/model does not exist"),
    ],
)
def test_a_peer_that_cannot_be_run_is_refused(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_peer(given, [])


@pytest.mark.parametrize("text", ["", "1,", "0", "eight", "1,-2"])
def test_bad_concurrency_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--concurrency"):
        parse_counts(text)


def test_troupe_beside_transformers_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_model("llama", tmp_path / "tiny")
    compare.main(
        model=model,
        peer=[f"transformers={sys.executable}:{model}"],
        concurrency="1,2",
        prompt=16,
        output_len=4,
        threads=1,
        repeats=1,
        vocab_size=VOCAB_SIZE,
        field=["max_model_len=64"],
        json_file=tmp_path / "compare.json",
    )
    written = json.loads((tmp_path / "compare.json").read_text())
    assert [(row["what"], row["concurrency"]) for row in written["rows"][:2]] == [("decode", 1), ("decode", 2)]
    for row in written["rows"]:
        assert row["ratio"] == pytest.approx(row["troupe"] / row["transformers"])
    assert "troupe / best peer" in capsys.readouterr().out

"""Reported log-probabilities against the reference's."""

import numpy as np
import pytest
import torch

from raytroupe.kernels import sampling as reference
from raytroupe.kernels.gpu.logprobs import LogProbabilities, Reported


def expected_reports(logits: torch.Tensor, wanted: np.ndarray, tokens: list[int]):
    asked = np.flatnonzero(wanted >= 0)
    logprobs = reference._log_probabilities(logits[torch.from_numpy(asked)])
    return reference._report(logprobs, asked, tokens, wanted)


def reports(logits: torch.Tensor, wanted: np.ndarray, tokens: list[int]):
    asked = torch.from_numpy(np.flatnonzero(wanted >= 0).astype(np.int32))
    logprobs = LogProbabilities(logits, asked)
    chosen = logprobs.chosen(torch.tensor(tokens), asked)
    return Reported(wanted, chosen, *logprobs.top(min(logits.shape[1], int(wanted.max())))).entries()


def assert_same(got, expected):
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine[0] == pytest.approx(other[0], abs=1e-5)
            assert [token for token, _ in mine[1]] == [token for token, _ in other[1]]
            assert [value for _, value in mine[1]] == pytest.approx([value for _, value in other[1]], abs=1e-5)


@pytest.mark.launches(
    "split_log_sum_kernel", "split_top_logprobs_kernel", "merge_top_logprobs_kernel", "chosen_logprobs_kernel"
)
@pytest.mark.parametrize("vocab_size", [3, 257, 9000])
def test_alternatives_are_those_of_the_reference(vocab_size):
    rng = np.random.default_rng(vocab_size)
    # Multiples of a sixteenth: what differs does so by more than rounding, and ties are everywhere.
    logits = torch.from_numpy((np.round(rng.normal(0, 3, (5, vocab_size)) * 16) / 16).astype(np.float32))
    wanted = np.array([0, -1, 20, 1, 3])
    tokens = rng.integers(0, vocab_size, 5).tolist()
    assert_same(reports(logits, wanted, tokens), expected_reports(logits, wanted, tokens))


@pytest.mark.launches("split_log_sum_kernel", "all_logprob_keys_kernel", "chosen_logprobs_kernel")
@pytest.mark.parametrize("alternatives", [33, 600, 5000])
def test_many_alternatives(alternatives, monkeypatch):
    monkeypatch.setattr("raytroupe.kernels.gpu.logprobs._GROUP_KEYS", 2 * 5000)  # two rows at a time, and one
    rng = np.random.default_rng(2)
    logits = torch.from_numpy((np.round(rng.normal(0, 3, (4, 5000)) * 16) / 16).astype(np.float32))
    wanted = np.array([alternatives, -1, 2, alternatives])
    assert_same(reports(logits, wanted, [0, 1, 4999, 3]), expected_reports(logits, wanted, [0, 1, 4999, 3]))


@pytest.mark.launches("chosen_logprobs_kernel")
def test_the_chosen_token_alone():
    logits = torch.tensor([[0.0, 1.0], [3.0, 3.0]])
    got = reports(logits, np.array([0, -1]), [1, 0])
    assert got == [(pytest.approx(-0.3132617), []), None]


@pytest.mark.launches("merge_top_logprobs_kernel")
def test_what_is_certain_has_zero_and_what_is_impossible_the_least_log_probability():
    logits = torch.tensor([[-torch.inf, 5.0, torch.nan, -torch.inf]])
    (chosen, top), = reports(logits, np.array([4]), [2])  # fmt: skip
    assert chosen == -9999.0
    assert top == [(1, 0.0), (0, -9999.0), (2, -9999.0), (3, -9999.0)]
    assert str(top[0][1]) == "0.0"

"""The policy prefers little work, and spreads what is equal."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from raytroupe.router.load_book import LoadBook
from raytroupe.router.policy import Candidate, fewest_outstanding_tokens

candidates = st.lists(
    st.builds(Candidate, st.text(alphabet="abcdef", min_size=1, max_size=3), st.integers(0, 5), st.integers(0, 5)),
    unique_by=lambda candidate: candidate.replica,
    max_size=8,
)


@given(candidates, st.text(max_size=4), st.randoms())
def test_the_ranking_is_complete_ordered_and_independent_of_input_order(found, salt, random) -> None:
    ranked = fewest_outstanding_tokens(found, salt)
    by_name = {candidate.replica: candidate for candidate in found}
    assert sorted(ranked) == sorted(by_name)
    keys = [(by_name[name].outstanding_tokens, by_name[name].last_routed) for name in ranked]
    assert keys == sorted(keys)
    random.shuffle(found)
    assert fewest_outstanding_tokens(found, salt) == ranked


@given(st.integers(1, 6), st.integers(1, 30), st.text(max_size=3))
def test_equal_requests_are_dealt_out_evenly(replicas: int, requests: int, salt: str) -> None:
    book, names = LoadBook(), [f"replica-{index}" for index in range(replicas)]
    placed = Counter()
    for request in range(requests):
        best = fewest_outstanding_tokens(map(book.candidate, names), salt)[0]
        book.place(str(request), best, 10)
        placed[best] += 1
    assert max(placed.values()) - min(placed[name] for name in names) <= 1


def test_requests_that_come_one_after_another_go_round() -> None:
    book, names, order = LoadBook(), ["a", "b", "c"], []
    for request in range(6):
        best = fewest_outstanding_tokens(map(book.candidate, names))[0]
        book.place(str(request), best, 10)
        book.remove(str(request), best)
        order.append(best)
    assert sorted(order[:3]) == names
    assert order[3:] == order[:3]


def test_ingresses_with_different_salts_begin_at_different_replicas() -> None:
    idle = [Candidate(f"replica-{index}", 0) for index in range(4)]
    first = {fewest_outstanding_tokens(idle, f"ingress-{index}")[0] for index in range(40)}
    assert len(first) == 4


places = st.tuples(st.just("place"), st.sampled_from("abc"), st.sampled_from("XYZ"), st.integers(0, 9))
removals = st.tuples(st.just("remove"), st.sampled_from("abc"), st.sampled_from(["X", "Y", "Z", None]), st.just(0))


@given(st.lists(places | removals, max_size=30))
def test_the_books_agree_with_a_plain_list_of_requests(history) -> None:
    book, placed = LoadBook(), {}
    for action, request, replica, tokens in history:
        if action == "place":
            book.place(request, replica, tokens)
            placed[request] = (replica, tokens)
        else:
            book.remove(request, replica)
            if request in placed and replica in (None, placed[request][0]):
                del placed[request]
        for name in "XYZ":
            expected = sum(size for where, size in placed.values() if where == name)
            assert book.candidate(name).outstanding_tokens == expected
    book.keep(set())
    assert {name for name in "XYZ" if book.candidate(name).last_routed} <= {where for where, _ in placed.values()}

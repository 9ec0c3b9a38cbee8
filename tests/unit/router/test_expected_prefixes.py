"""Prompts on their way, by what they will leave in a cache."""

from hypothesis import given
from hypothesis import strategies as st

from router.expected_prefixes import KEPT_S, MAX_PROMPTS, ExpectedPrefixes


def chain(name, size):
    return [f"{name}{index:06}".encode() for index in range(size)]


def test_a_prompt_on_its_way_counts_until_its_worker_has_had_time_to_tell():
    expected = ExpectedPrefixes()
    expected.add("r", "w", chain("a", 10))
    assert expected.match(chain("a", 4), 0.0) == {"w": 4}
    assert expected.match([*chain("a", 6), *chain("b", 3)], 0.0) == {"w": 6}
    expected.answered("r", 5.0)
    assert expected.match(chain("a", 10), 5.0 + KEPT_S - 0.01) == {"w": 10}
    assert expected.match(chain("a", 10), 5.0 + KEPT_S) == {}
    assert len(expected) == 0


def test_a_prompt_that_failed_is_expected_no_more_and_others_like_it_are():
    expected = ExpectedPrefixes()
    expected.add("r1", "w", chain("a", 10))
    expected.add("r2", "w", chain("a", 10))
    expected.add("r3", "v", chain("a", 5))
    expected.remove("r1")
    assert expected.match(chain("a", 10), 0.0) == {"w": 10, "v": 5}
    expected.remove("r2")
    assert expected.match(chain("a", 10), 0.0) == {"v": 5}


def test_an_answer_of_one_attempt_does_not_end_the_next():
    expected = ExpectedPrefixes()
    expected.add("r", "w", chain("a", 3))
    expected.answered("r", 0.0)
    expected.add("r", "v", chain("a", 3))
    assert expected.match(chain("a", 3), 10.0) == {"v": 3}


@given(st.integers(1, 3_000), st.integers(1, 3_000))
def test_a_long_prompt_is_matched_to_a_few_blocks_and_never_beyond(sent, asked):
    expected = ExpectedPrefixes()
    expected.add("r", "w", chain("a", sent))
    found = expected.match(chain("a", asked), 0.0).get("w", 0)
    shared = min(sent, asked)
    assert shared * 7 // 8 - 1 <= found <= shared


def test_expected_prompts_are_bounded():
    expected = ExpectedPrefixes()
    for number in range(MAX_PROMPTS + 5):
        expected.add(f"r{number}", "w", chain(f"p{number}-", 1))
    assert len(expected) == MAX_PROMPTS
    assert expected.match(chain("p4-", 1), 0.0) == {} and expected.match(chain("p5-", 1), 0.0)

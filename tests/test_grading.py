"""Grading of completions against reference answers, and the interval of a share."""

from __future__ import annotations

import threading

import pytest
from scipy.stats import binomtest

from osd.data import grading

RIGHT = [
    ("17 * 24 = 408. The answer is: 408", "408"),
    ("The final answer is: **408**", "408"),
    ("So the answer is = 408", "408"),
    (r"The answer is \(408\).", "408"),
    ("The answer is 408, since 17 * 24 = 408.", "408"),
    ("408, since there are 17 boxes of 24.", "408"),
    ("That makes 408 clips, altogether.", "408"),
    ("The answer is \u2212408.", "-408"),
    (r"\boxed{1\,408}", "1408"),
    ("**Answer:** 408", "408"),
    ("#### 408", "408"),
    ("$408$", "408"),
    ("$$408$$", "408"),
    ("**408**", "408"),
    ("408.0", "408"),
    ("The answer is $408.00.", "408"),
    ("The answer is 1,024.", "1024"),
    ("1024", "1,024"),
    ("The answer is 408 clips.", "408"),
    ("The answer to 17 * 24 is 408.", "408"),
    ("The answer is:\n\n$$408$$\n\nI hope this helps 1 or 2 people!", "408"),
    ("Answer: 408\n\nExplanation: 17 boxes of 24.", "408"),
    ("The answer is 17 * 24 = 408.", "408"),
    ("The answer is x = 5.", "5"),
    ("The answer is 408. Wait, no: the answer is 409.", "409"),
    ("The answer is not 408, it is 409.", "409"),
    ("It is 408. Hope this helps!", "408"),
    ("The answer is 3/4.", "0.75"),
    ("The area is 408 cm^2.", "408"),
    ("The answer is 50%.", "50"),
    ("(B).", "B"),
    ("The answer is (B).", "B"),
    ("The answer is B) Paris", "B"),
    ("The answer is B) Paris", "Paris"),
    ("The correct option is B.", "(B)"),
    ("The answer is option B, because A is wrong.", "B"),
    ("Answer: b", "B"),
    ("The capital of France is Paris.", "Paris"),
    ("Paris is the capital of France.", "Paris"),
    ("The answer is Paris, the capital of France.", "Paris"),
    ("The answer is **Paris**!", "paris"),
    ('The answer is "Paris".', "Paris"),
    ("It is the Eiffel Tower.", "Eiffel Tower"),
    ("Yes, because 17 > 4.", "yes"),
    ("The answer is no.", "No"),
    ("<think>The answer is 400.</think>\nThe answer is 408.", "408"),
    ("<answer>\nParis\n</answer>", "Paris"),
    ('{"answer": "Paris"}', "Paris"),
    ("The answer is not 408 but 409.", "409"),
    ("It is 408 (not 409).", "408"),
    ("The answer is A, not B.", "A"),
    ("Answer: 408. The answer is found by multiplying 17 by 24.", "408"),
    ("The answer is 408, altogether.", "408"),
    ("答案是408。", "408"),
    (r"So \boxed{\frac{1}{2}}", "0.5"),
    (r"The answer is $2\sqrt{2}$.", r"\sqrt{8}"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\text{Paris}}", "Paris"),
]
WRONG = [
    ("The answer is not 408", "408"),
    ("It isn't 408.", "408"),
    ("The answer is not 408, it is 409.", "408"),
    ("The answer is more than 408.", "408"),
    ("4080", "408"),
    ("The answer is 4080.", "408"),
    ("The answer is 408.5", "408"),
    ("-408", "408"),
    ("It is 409.", "408"),
    ("The answer is 408 or 409.", "408"),
    ("First 408, then 409", "408"),
    ("The answer is A, not B.", "B"),
    ("The answer is 408, 409.", "408"),
    ("The answer is 408, or 409.", "408"),
    ("The answer is (408, 409).", "408"),
    ("The answer is red, blue and green.", "red"),
    ("The answer is B, C.", "B"),
    ("The answer is not 408 but 409.", "408"),
    ("<think>The answer is 408.</think>\nThe answer is 409.", "408"),
    ("The answer is not B.", "B"),
    ("A dog barks", "A"),
    ("The answer is C because B is wrong.", "B"),
    ("The capital is not Paris.", "Paris"),
    ("The capital of France is London, not Paris.", "Paris"),
    ("I would say Paris, but London is close", "Paris"),
    ("The answer is Parisian.", "Paris"),
    ("No, 4 < 17.", "yes"),
    (r"\boxed{\frac{1}{3}}", "0.5"),
    (r"\boxed{}", "408"),
    ("", "408"),
    ("no idea", "408"),
    ("3 pears", "3 apples"),
]


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_right_answers_in_everyday_endings(completion, answer):
    assert grading.matches(completion, answer)


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_wrong_answers_are_not_judged_right(completion, answer):
    assert not grading.matches(completion, answer)


@pytest.mark.parametrize(
    ("how", "completion", "answer", "right"),
    [
        ("exact", " Paris\n", "Paris", True),
        ("exact", "Paris.", "Paris", False),
        ("contains", "I would say Paris, but London is close", "Paris", True),
        ("contains", "4080", "408", False),
        ("math", r"The answer is $\frac{2}{4}$.", r"\frac{1}{2}", True),
        ("math", "The answer is not 408", "408", False),
        ("math", r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
        ("regex", "room 12b", r"\d+[a-c]", True),
        ("regex", "room 12", r"\d+[a-c]", False),
        ("tests.test_grading:longer", "abc", "ab", True),
        ("tests.test_grading:longer", "a", "ab", False),
    ],
)
def test_ways_to_match(how, completion, answer, right):
    assert grading.matcher(how)(completion, answer) is right


def longer(completion, answer):
    return len(completion) > len(answer)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fuzzy", "answer_match='fuzzy' is unknown; use final, exact, contains, math, regex, or module:function"),
        ("no.such:thing", "'no.such:thing' cannot be imported"),
        ("tests.test_grading:absent", "cannot be imported"),
        ("tests.test_grading:RIGHT", "is not a function"),
    ],
)
def test_unknown_matchers_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        grading.matcher(how)


def test_mathematics_is_compared_in_any_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(grading.math(r"\boxed{\frac{2}{4}}", "0.5")))
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_function_that_raises_is_named():
    with pytest.raises(ValueError, match=r"answer_match='operator:add' raised TypeError"):
        grading.matcher("operator:add")("a", None)


def test_a_reference_that_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match="not a regular expression"):
        grading.check_reference("(", "regex")
    grading.check_reference("(", "final")


@pytest.mark.parametrize(("right", "total"), [(0, 8), (8, 8), (3, 10), (1, 1000)])
def test_wilson_intervals_are_scipys(right, total):
    expected = binomtest(right, total).proportion_ci(method="wilson")
    assert grading.wilson(right, total) == pytest.approx([expected.low, expected.high], abs=1e-6)

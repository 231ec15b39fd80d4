"""Which of the given answers follows a question."""

from collections import Counter

from lightning_moevlm.data.text.annotations import choose_answer

GIVEN = ("red",) * 2 + ("dark red",) * 6 + ("brown",) * 2


def test_evaluation_takes_the_most_frequent_answer_and_training_draws_by_frequency() -> None:
    assert choose_answer(GIVEN, "", "key") == "dark red"
    drawn = Counter(choose_answer(GIVEN, f"0/{epoch}/set", "key") for epoch in range(500))
    assert 0.5 < drawn["dark red"] / 500 < 0.7 and drawn["red"] > 60 and drawn["brown"] > 60
    assert choose_answer(("two",), "0/1/set", "key") == "two" and choose_answer((), "0/1/set", "key") == ""

"""The choice among texts, on known answers."""

from collections import Counter

import pytest

from mdm.generate.candidates import most_typical, similarity

RED, SIX, TWO, OF, LEFT = range(5)


def test_similarity_is_the_f1_of_shared_tokens():
    # 2 of 3 and of 4 tokens: precision 2/3, recall 2/4, so F1 = 4/7; a repeated one counts twice.
    assert similarity(Counter([RED, SIX, SIX]), Counter([SIX, SIX, TWO, OF])) == pytest.approx(
        4 / 7
    )
    assert similarity(Counter([RED, SIX, SIX]), Counter([SIX, TWO])) == pytest.approx(2 / 5)
    assert similarity(Counter(), Counter()) == 1.0
    assert similarity(Counter(), Counter([RED])) == 0.0


def test_the_most_typical_text_shares_most_with_the_others():
    whole, other, mixed = [RED, SIX, LEFT, OF, TWO], [SIX, LEFT, OF, TWO], [RED, LEFT, LEFT, TWO]
    assert most_typical([mixed, other, whole]) == 2
    assert most_typical([mixed, other, other]) == 1  # of equals the first
    assert most_typical([[RED], [TWO], [TWO], [RED], [TWO]]) == 1  # a majority
    assert most_typical([mixed]) == 0
    assert most_typical([[], []]) == 0

import random

from mdm.first_stage import corpus

TEXTS = [f"line number {i}" for i in range(2000)]


def test_order_of_the_input_does_not_matter_and_the_output_is_shuffled(tmp_path):
    first = corpus.build(TEXTS, tmp_path / "a")
    second = corpus.build(random.Random(0).sample(TEXTS, len(TEXTS)), tmp_path / "b")
    train = list(first.lines("train.txt"))
    assert train == list(second.lines("train.txt"))
    assert train != sorted(train)
    held_out = list(first.lines("held_out.txt"))
    assert sorted(train + held_out) == sorted(TEXTS)
    assert 60 < len(held_out) < 140
    assert (first.train_lines, first.held_out_lines) == (len(train), len(held_out))


def test_dropped_lines_are_counted_by_reason(tmp_path):
    texts = ["one", "  one ", "ONE", "x", "?!", "", "two\n  words\t", "two words", "7"]
    made = corpus.build(texts, tmp_path / "c")
    assert sorted([*made.lines("train.txt"), *made.lines("held_out.txt")]) == ["ONE", "two words"]
    assert made.dropped == {
        "duplicate": 3,
        "shorter than 2 characters": 3,
        "no letter or digit": 1,
    }
    assert made.read == len(texts)


def test_repeated_lines_are_kept_on_request(tmp_path):
    texts = ["one", "ONE", "two words", "two words", "x"]
    made = corpus.build(texts, tmp_path / "e", repeats=True)
    lines = [*made.lines("train.txt"), *made.lines("held_out.txt")]
    assert sorted(lines) == ["ONE", "one", "two words", "two words"]
    assert made.dropped == {"shorter than 2 characters": 1}


def test_long_texts_are_cut_between_words_without_loss(tmp_path):
    text = " ".join(f"wörd{i}" for i in range(2000)) + " " + "".join(f"é{i}" for i in range(2000))
    made = corpus.build([text], tmp_path / "d")
    pieces = [*made.lines("train.txt"), *made.lines("held_out.txt")]
    assert all(len(piece.encode()) <= corpus.MAX_BYTES for piece in pieces)
    assert sum(len(piece.replace(" ", "")) for piece in pieces) == len(text.replace(" ", ""))
    words = {word for piece in pieces for word in piece.split()}
    assert {f"wörd{i}" for i in range(2000)} <= words

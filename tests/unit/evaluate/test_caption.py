import pytest

from mdm.evaluate.caption import NO_CLASS, ClassNames, caption_accuracy, pair_agreement

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NAMES = ClassNames.parse(f"{w}, digit {w}, handwritten {w}" for w in WORDS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("handwritten seven", 7),
        ("Digit Seven.", 7),
        ("seven", 7),
        ("a handwritten three, dark on white", 3),
        ("seventeen", NO_CLASS),
        ("seven or nine", NO_CLASS),
        ("seven handwritten seven", 7),
        ("handwritten", NO_CLASS),
        ("", NO_CLASS),
        ("7", NO_CLASS),
    ],
)
def test_a_text_names_the_only_class_whose_name_it_contains(text: str, wanted: int) -> None:
    assert NAMES.named(text) == wanted


def test_exact_requires_one_of_the_names_word_for_word() -> None:
    assert NAMES.exact("Handwritten seven", 7)
    assert not NAMES.exact("seven handwritten", 7)
    assert not NAMES.exact("handwritten seven", 8)


def test_a_text_concerns_the_classes_by_a_common_word_or_only_class_words() -> None:
    assert NAMES.concerns("handwritten apple")
    assert NAMES.concerns("three")
    assert NAMES.concerns("seven nine")
    assert not NAMES.concerns("three o'clock")
    assert not NAMES.concerns("red apple")
    assert not NAMES.concerns("")


def test_caption_accuracy_counts_named_and_exact_captions() -> None:
    named, exact = caption_accuracy(NAMES, ["digit one", "the two", "six", "dog"], [1, 2, 9, 0])
    assert (named, exact) == (0.5, 0.25)


def test_pairs_of_other_things_do_not_count_but_mixed_pairs_count_as_wrong() -> None:
    captions = ["digit one", "digit two", "red apple", "red apple", "handwritten dog"]
    shown = [1, 3, 10, 4, 10]
    agreed, counted = pair_agreement(NAMES, captions, shown)
    assert (agreed, counted) == (0.25, 0.8)
    # A caption of no class beside an image of no class is not an agreement either.
    assert pair_agreement(NAMES, ["handwritten"], [-1]) == (0.0, 1.0)
    assert pair_agreement(NAMES, ["apple"], [10]) == (0.0, 0.0)


def test_a_class_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has no name"):
        ClassNames.parse(["one", " , "])

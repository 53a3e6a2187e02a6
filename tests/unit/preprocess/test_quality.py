import pytest

from mdm.preprocess.quality import text_problem


@pytest.mark.parametrize(
    "text",
    [
        "A man riding a wave on top of a surfboard.",
        "no",
        "C++ (2nd ed.), 20 $",
        "Ein Hund läuft über die Straße",
        "一只猫坐在桌子上",
        "Photo: https://example.org/cat.jpg of a cat",
        "that that is is that that is not is not is that it it is",
    ],
)
def test_plain_texts_are_kept(text: str) -> None:
    assert text_problem(text, 2) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" a\n", "too short text"),
        ("?!...", "no letter or digit"),
        ("☀☀☀", "no letter or digit"),
        ("a ~~##//\\\\||>><<==", "mostly symbols"),
        ("https://example.org/cat.jpg", "an address alone"),
        ("buy " * 20, "one word over and over"),
        ("caf\ufffd on the \ufffd corner", "broken characters"),
    ],
)
def test_low_quality_texts_get_a_reason(text: str, reason: str) -> None:
    assert text_problem(text, 2).endswith(reason)

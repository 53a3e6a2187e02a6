"""The corpus of `make learn-text`: prose alone, no text twice, no file on both sides."""

import numpy as np
import pytest

from examples.text import corpus, data
from examples.text.corpus import Document, without_repeats
from examples.text.data import ROW, wrap
from examples.text.prose import paragraphs
from mdm.first_stage.tokenizer import ASSISTANT, EOS, USER, Tokenizer, train_model

PAGE = """Compute the thing that you asked for.

Parameters
----------
x : array_like, shape (n, m)
    The values whose mean is taken over the ``axis`` that you give.
    It must be finite.

Notes
-----
See :func:`numpy.linalg.norm` and the `guide <https://example.org/guide>`_ for the
reasons why it is done in this way and not in any other [1]_.

>>> mean_of_things([1, 2, 3], axis=0)
2.0

+------+-------+
| name | value |
+------+-------+

This code is subject to the terms of the License that you will find in the file of that name.
"""


def test_only_sentences_of_a_page_are_kept_without_their_markup():
    assert list(paragraphs(PAGE)) == [
        "The values whose mean is taken over the axis that you give. It must be finite.",
        "See norm and the guide for the reasons why it is done in this way and not in any other.",
    ]


def test_a_paragraph_that_nearly_repeats_an_earlier_one_is_left_out():
    words = (
        "when the file is closed all of its lines are written to the disk in the order of the calls"
    )
    one, other = words.capitalize() + ".", words.capitalize() + " that came before."
    new = "Nothing of this has been said before, and so it is a text of its own that shall stay."
    documents = [
        Document("a", "1", (one,)),
        Document("a", "2", (other + "\n" + new,)),
        Document("b", "1", (one.upper(),)),
    ]
    kept = list(without_repeats(documents))
    assert kept == [Document("a", "1", (one,)), Document("a", "2", (new,))]


def test_all_documents_of_a_file_are_on_one_side():
    sides = {
        (file, Document("a", str(file), (text,)).is_held_out)
        for file in range(600)
        for text in ("one", "two")
    }
    assert len(sides) == 600
    held_out = sum(held_out for _, held_out in sides)
    assert 20 < held_out < 80  # of 50 expected


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = list(paragraphs(PAGE)) * 20 + ["How are you? I am fine."] * 20
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model(texts, 60))
    return Tokenizer(path)


def test_rows_hold_all_tokens_in_order_and_count_the_characters_of_their_text(tokenizer):
    prose = "\n".join(paragraphs(PAGE))
    documents = [
        Document("a", f"{i % 3}", (prose,) if i % 2 else ("How are you?", "I am fine."))
        for i in range(12)
    ]
    rows, unknown = wrap(documents, tokenizer)
    stream = [token for doc in documents for token in data.encode_document(doc, tokenizer)]
    assert unknown == 0
    assert rows.tokens.shape == (len(stream) // ROW, ROW)
    assert rows.tokens.ravel().tolist() == stream[: rows.tokens.size]
    assert stream[:1] == [USER]
    assert ASSISTANT in stream[:20]
    # Each text's characters, and those of the part of the last text that is in a row.
    ends = np.flatnonzero(rows.tokens.ravel() == EOS)
    texts = np.split(rows.tokens.ravel(), ends + 1)
    assert rows.characters.sum() == sum(len(tokenizer.decode(text.tolist())) for text in texts)
    assert rows.files[0] == 0
    first = rows.tokens[0].tolist()
    until = first[: first.index(EOS)]
    assert rows.characters[0] >= len(tokenizer.decode(until))


def test_a_text_that_the_tokenizer_cannot_write_is_left_out(tokenizer):
    strange = Document("a", "1", ("How are you, Zoë?",))
    rows, unknown = wrap([strange] * 3, tokenizer)
    assert (len(rows.tokens), unknown) == (0, 3)


def test_every_source_names_its_version_and_licence():
    documents = [Document(source, "x", ("words",)) for source in ("python", *corpus.PACKAGES)]
    summary = corpus.summary(documents)
    assert len(summary) == 1 + len(corpus.PACKAGES)
    for row in summary:
        assert row["version"][0].isdigit()
        assert row["licence"] != "not stated"
        assert row["train"]["characters"] + row["held_out"]["characters"] == 5

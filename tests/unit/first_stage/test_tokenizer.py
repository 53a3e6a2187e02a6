import hashlib
import itertools
import random
from collections import Counter

import pytest
import sentencepiece as spm
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm.first_stage.tokenizer import ASSISTANT, EOS, PAD, UNK, USER, Tokenizer, train_model

SYLLABLES = ["ba", "ke", "di", "lo", "mu", "sen", "tar", "red", "cat", "dog", "win", "pol"]
WORDS = ["red", "cat", "dog", *map("".join, itertools.permutations(SYLLABLES, 2))]


def lines(seed=0, count=400):
    pick = random.Random(seed)
    return [" ".join(pick.choices(WORDS, k=6)) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model(lines(), 60))
    return Tokenizer(path)


def test_training_is_deterministic():
    first, again, other = (train_model(lines(seed), 60) for seed in (0, 0, 1))
    assert hashlib.sha256(first).digest() == hashlib.sha256(again).digest()
    assert first != other


def test_special_pieces_have_the_first_ids(tokenizer):
    assert (UNK, PAD, EOS, USER, ASSISTANT) == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == 60
    assert [tokenizer._model.id_to_piece(i) for i in (USER, ASSISTANT)] == ["<user>", "<assistant>"]
    assert len(tokenizer.sha256) == 64


def test_decoding_restores_an_encoded_text(tokenizer):
    for line in lines(7, 20):
        ids = tokenizer.encode(line)
        assert UNK not in ids
        assert tokenizer.decode([*ids, EOS, *ids, PAD]) == line
    assert tokenizer.decode([PAD, *tokenizer.encode("red cat"), PAD, PAD]) == "red cat"
    assert tokenizer.decode([]) == tokenizer.decode([EOS]) == ""


@pytest.mark.parametrize("text", ["<user>", "<assistant>", "</s>", "<pad>", "a<user>b <assistant>"])
def test_no_text_becomes_a_control_piece(tokenizer, text):
    assert not {PAD, EOS, USER, ASSISTANT} & set(tokenizer.encode(text))
    assert not {PAD, EOS, USER, ASSISTANT} & set(tokenizer.encode(f"red {text} cat\n{text}"))


def test_a_dialogue_marks_each_turn_and_ends_with_eos(tokenizer):
    ask, answer, more, end = (tokenizer.encode(t) for t in ("cat", "red dog", "bake", "lomu"))
    ids, prompt = tokenizer.encode_dialogue(["cat", "red dog", "bake", "lomu"])
    assert ids == [USER, *ask, ASSISTANT, *answer, USER, *more, ASSISTANT, *end, EOS]
    assert ids[prompt:] == [*end, EOS]
    assert tokenizer.encode_prompt(["cat", "red dog", "bake"]) == ids[:prompt]
    assert tokenizer.decode(ids[prompt:]) == "lomu"
    for turns in ([], ["cat"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="does not end with a reply"):
            tokenizer.encode_dialogue(turns)


CODE = "def f(x):\n    return {x: '<image>'}\n\n\tif x:\n            pass  # \u2581 odd\n"


@pytest.fixture(scope="module")
def of_code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "tokenizer.model"
    words = "".join(sorted({*CODE, *"<newline> <tab> <8 spaces> <space> </s> café1"} - {"\u2581"}))
    path.write_bytes(train_model([*lines(0, 50), *[" ".join(words)] * 50], 70))
    return Tokenizer(path)


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        "def f():\n    return 1\n\n\tx",
        " a",
        "a ",
        "\n",
        " \t \n ",
        "",
        "a  b   c",
        "\u2581 a\u2581b \u2581\u2581\n\u2581",
        "<tab> <8 spaces> </s>",
        "café",
        " " * 31 + "a",
        "\n" * 7,
    ],
)
def test_decoding_restores_the_layout(of_code, text):
    ids = of_code.encode(text)
    assert UNK not in ids
    assert of_code.decode(ids) == text
    turns, prompt = of_code.encode_dialogue(["a", text])
    assert of_code.decode(turns[prompt:]) == text


@given(st.text(alphabet=st.sampled_from(sorted({*CODE, *"\n\t  \u2581"})), max_size=60))
def test_any_text_of_known_characters_is_restored(of_code, text):
    assert of_code.decode(of_code.encode(text)) == text


@pytest.mark.parametrize("end", ["\r\n", "\r", "\x0c", "\u2028"])
def test_every_line_end_is_a_line_feed(of_code, end):
    assert of_code.decode(of_code.encode(f"a{end}  b{end}{end}c{end}")) == "a\n  b\n\nc\n"


@pytest.mark.parametrize("space", ["\xa0", "\u2003", "\u202f", "\u3000"])
def test_indentation_by_other_spaces_is_indentation(of_code, space):
    """As web pages and editors write code: SentencePiece's normalization would drop these."""
    text = f"{space}a:\n{space * 4}b {space}c\n\t{space}c"
    assert of_code.decode(of_code.encode(text)) == text.replace(space, " ")


def test_prose_has_the_same_pieces_with_and_without_layout(of_code, tmp_path):
    """A line of prose costs nothing, a paragraph one piece; captions have no layout at all."""
    plain = of_code._model.encode
    for line in lines(3, 50):
        assert of_code.encode(line) == plain(line)
    assert len(of_code.encode("red cat\n\nred dog")) == len(plain("red cat red dog")) + 1
    assert of_code.encode_caption(" red\n\n  cat\t") == plain("red cat")


def test_models_without_layout_pieces_encode_layout_as_a_space(tmp_path):
    """So do those of earlier versions, whose data sets and checkpoints hold such tokens."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_model(lines(), 60, layout=False))
    tokenizer = Tokenizer(path)
    assert tokenizer.encode(" red\n\n\tcat  dog\r\n") == tokenizer.encode("red cat dog")
    assert tokenizer.decode(tokenizer.encode("red\ncat")) == "red cat"
    small = tmp_path / "small.model"
    small.write_bytes(train_model(["one two three"] * 50 + ["net wore"], 16))
    assert Tokenizer(small).decode(Tokenizer(small).encode("one\ntwo")) == "one two"


def test_a_vocabulary_too_large_for_the_corpus_names_the_largest():
    with pytest.raises(ValueError, match=r"vocab_size 5000 is too large .* at most \d+"):
        train_model(lines(), 5000)
    with pytest.raises(ValueError, match=r"too small: the characters alone need \d+"):
        train_model(lines(), 10)


def test_the_largest_vocabulary_that_is_named_works_without_layout_pieces_too():
    few = ["one two three"] * 50 + ["net wore"]
    with pytest.raises(ValueError, match=r"at most \d+") as raised:
        train_model(few, 1000)
    largest = int(str(raised.value).rpartition(" ")[2])
    assert train_model(few, largest)
    with pytest.raises(ValueError, match=f"at most {largest}"):
        train_model(few, largest + 1)


def test_wrong_files_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path / "gone.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "text.model")
    with (tmp_path / "plain.model").open("wb") as model:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines()), model_writer=model, vocab_size=60, minloglevel=2
        )
    with pytest.raises(ValueError, match="make it with pipelines/train_tokenizer"):
        Tokenizer(tmp_path / "plain.model")


def test_a_common_word_is_one_piece_though_no_other_word_begins_with_it(tmp_path):
    path = tmp_path / "tokenizer.model"
    words = ["above", "about", "abode", "bottom", "bottle", "five", "live", "give"]
    path.write_bytes(train_model([" ".join(words)] * 50 + ["abandon", "botch", "fig"], 30))
    pieces = Tokenizer(path)
    assert [len(pieces.encode(word)) for word in words] == [1] * len(words)


def test_the_log_unigram_follows_the_corpus(tmp_path):
    path = tmp_path / "tokenizer.model"
    corpus = ["sun"] * 800 + ["moon"] * 150 + ["star"] * 50
    path.write_bytes(train_model(corpus, 17))
    pieces = Tokenizer(path)
    log_p = torch.from_numpy(pieces.log_unigram())
    assert log_p.shape == (17,)
    assert log_p.logsumexp(0) == pytest.approx(0, abs=1e-5)
    counts = Counter(itertools.chain.from_iterable(map(pieces.encode, corpus)))
    used = torch.tensor(list(counts))
    shares = torch.tensor([float(n) for n in counts.values()])
    torch.testing.assert_close(log_p[used].softmax(0), shares / shares.sum(), rtol=0, atol=0.05)
    assert log_p[EOS] == log_p[PAD] == log_p.max() == log_p[counts.most_common(1)[0][0]]
    assert log_p[UNK] == log_p.min()

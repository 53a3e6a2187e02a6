import hashlib
import itertools
import random

import pytest
import sentencepiece as spm

from mdm.data.tokenizer import ASSISTANT, EOS, PAD, UNK, USER, Tokenizer, train_model

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


def test_special_ids_and_size(tokenizer):
    assert (UNK, PAD, EOS, USER, ASSISTANT) == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == 60
    assert [tokenizer.piece(i) for i in (USER, ASSISTANT)] == ["<user>", "<assistant>"]
    assert len(tokenizer.sha256) == 64


def test_round_trip(tokenizer):
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


def test_dialogue_layout(tokenizer):
    ask, answer, more, end = (tokenizer.encode(t) for t in ("cat", "red dog", "bake", "lomu"))
    ids, prompt = tokenizer.encode_dialogue(["cat", "red dog", "bake", "lomu"])
    assert ids == [USER, *ask, ASSISTANT, *answer, USER, *more, ASSISTANT, *end, EOS]
    assert ids[prompt:] == [*end, EOS]
    assert tokenizer.encode_prompt(["cat", "red dog", "bake"]) == ids[:prompt]
    assert tokenizer.decode(ids[prompt:]) == "lomu"
    for turns in ([], ["cat"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="does not end with a reply"):
            tokenizer.encode_dialogue(turns)


def test_vocabulary_that_the_corpus_cannot_support_names_the_largest():
    with pytest.raises(ValueError, match=r"vocab_size 5000 is too large .* at most \d+"):
        train_model(lines(), 5000)
    with pytest.raises(ValueError, match=r"too small: the characters alone need \d+"):
        train_model(lines(), 10)


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

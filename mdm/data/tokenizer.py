"""SentencePiece unigram tokenizer (Appendix D) and the control pieces of a dialogue."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece as spm

UNK, PAD, EOS, USER, ASSISTANT = range(5)

# Control pieces: no text encodes to them, so that nobody can write a turn's mark into a turn.
_CONTROLS = ("<user>", "<assistant>")


def train_model(lines: Iterable[str], vocab_size: int) -> bytes:
    """A unigram model of `vocab_size` pieces trained on `lines`: the bytes of a `.model` file.

    The settings are Appendix D's; the seed and the special pieces are ours. The same lines in the
    same order give the same bytes. ValueError where the corpus cannot support the vocabulary.
    """
    model = io.BytesIO()
    spm.set_random_generator_seed(0)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=0.9995,
            num_threads=8,
            input_sentence_size=1_000_000,
            shuffle_input_sentence=True,
            unk_id=UNK,
            pad_id=PAD,
            eos_id=EOS,
            bos_id=-1,
            control_symbols=list(_CONTROLS),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this corpus; at most {found.group(1)}"
    if found := re.search(r"required_chars\D*\d+ vs (\d+)", message):
        return f"vocab_size {vocab_size} is too small: the characters alone need {found.group(1)}"
    return f"SentencePiece cannot train on this corpus: {message}"


def read_model(path: str | Path) -> bytes:
    """The bytes of a `.model` file; ValueError where it cannot be read."""
    try:
        if (place := Path(path)).exists() and not (place.is_file() or place.is_dir()):
            raise ValueError(f"tokenizer {path}: not a file")  # a pipe would be waited for
        return place.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {(error.strerror or '').lower()}") from None


class Tokenizer:
    """A trained model: text <-> ids. Ids 0 to 4 are UNK, PAD, EOS, USER and ASSISTANT."""

    def __init__(self, path: str | Path) -> None:
        """Load a `.model` file; ValueError where it is missing or not one of ours."""
        self._data = data = read_model(path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._model = spm.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except RuntimeError:
            raise ValueError(f"tokenizer {path}: not a SentencePiece model") from None
        found = [self._model.unk_id(), self._model.pad_id(), self._model.eos_id()]
        found += [self._model.piece_to_id(piece) for piece in _CONTROLS]
        if found != [UNK, PAD, EOS, USER, ASSISTANT]:
            raise ValueError(
                f"tokenizer {path}: its unknown, pad, end, user and assistant pieces are {found}, "
                f"not {[UNK, PAD, EOS, USER, ASSISTANT]}; make it with pipelines/train_tokenizer.py"
            )
        self.vocab_size = int(self._model.vocab_size())

    def model(self) -> bytes:
        """The `.model` file."""
        return self._data

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS; never PAD, EOS, USER or ASSISTANT, whatever the text."""
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_dialogue(self, turns: Sequence[str]) -> tuple[list[int], int]:
        """`USER u ASSISTANT a ... EOS`, and the length of what precedes the last reply.

        The prompt reaches up to and including the last ASSISTANT. ValueError unless the turns
        alternate user and assistant and end with a reply.
        """
        if not turns or len(turns) % 2:
            raise ValueError(f"a dialogue of {len(turns)} turns does not end with a reply")
        ids: list[int] = []
        prompt = 0
        for number, turn in enumerate(turns):
            ids.append(ASSISTANT if number % 2 else USER)
            prompt = len(ids)
            ids += self.encode(turn)
        return [*ids, EOS], prompt

    def encode_prompt(self, turns: Sequence[str]) -> list[int]:
        """The ids that ask for a reply to the last of `turns`: a dialogue's prompt."""
        ids, prompt = self.encode_dialogue([*turns, "-"])
        return ids[:prompt]

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first EOS, without PAD and turn marks."""
        kept: list[int] = []
        for token in ids:
            if token == EOS:
                break
            if token not in (PAD, USER, ASSISTANT):
                kept.append(int(token))
        text: str = self._model.decode(kept)
        return text

    def piece(self, token: int) -> str:
        """The piece with this id, as the vocabulary has it."""
        text: str = self._model.id_to_piece(int(token))
        return text

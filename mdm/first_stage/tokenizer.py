"""SentencePiece unigram tokenizer (Appendix D) and the control pieces of a dialogue.

SentencePiece encodes words and single spaces, and turns any other white space into one space. Here,
line breaks, tabs and further spaces are control pieces between what it encodes, so that decoding
restores the layout of any text.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from pathlib import Path

import numpy as np
import sentencepiece as spm
from numpy.typing import NDArray

UNK, PAD, EOS, USER, ASSISTANT = range(5)

# Control pieces: no text encodes to them, so that no turn can contain the mark of a turn.
_CONTROLS = ("<user>", "<assistant>")
# The pieces of layout; U+2581 is one because SentencePiece represents a space by it.
_LAYOUT = {
    "<line>": "\n",
    "<paragraph>": "\n\n",
    "<tab>": "\t",
    "<space>": " ",
    "<2 spaces>": "  ",
    "<4 spaces>": "    ",
    "<8 spaces>": "        ",
    "<lower block>": "\u2581",
}
_MOST_WORDS = 1_000_000  # different ones that are counted
_MIN_LAYOUT_VOCAB = 48  # pieces; a smaller vocabulary has no room for these
# Unicode's other spaces, which SentencePiece's normalization turns into a space.
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# All white space except single spaces between words, which SentencePiece encodes.
_IS_LAYOUT = re.compile(r"([\n\t\u2581]+|\A +| +\Z| {2,}| +(?=[\n\t\u2581])|(?<=[\n\t\u2581]) +)")
_PIECES = re.compile("|".join(sorted(_LAYOUT.values(), key=len, reverse=True)))


def train_model(lines: Iterable[str], vocab_size: int, *, layout: bool = True) -> bytes:
    """Train a unigram model (Eq. 63) of `vocab_size` pieces; the bytes of its `.model` file.

    Without `layout`, or with fewer than 48 pieces, line breaks, tabs and runs of spaces have no
    pieces and are encoded as one space: short captions do not need them. The settings are those of
    Appendix D, except for the seed, the special pieces and whole words. The same lines in the same
    order give the same bytes. Raises ValueError if the corpus cannot support the vocabulary.
    """
    model = io.BytesIO()
    controls = [*_CONTROLS, *(_LAYOUT if layout and vocab_size >= _MIN_LAYOUT_VOCAB else ())]
    spm.set_random_generator_seed(0)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_with_whole_words(lines),
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
            control_symbols=controls,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(_explain(str(error), vocab_size, len(controls))) from None
    return model.getvalue()


def _with_whole_words(lines: Iterable[str]) -> Iterator[str]:
    """The lines, and then every repeated word with its last letter doubled.

    SentencePiece considers as pieces what two different words share. Without the second form, a
    word that begins no other one is cut up, however common: "above" into "abo", as in "about", and
    "ve". Lines are shuffled, so that their first million words hold the common ones.
    """
    counts = Counter[str]()
    for line in lines:
        counts.update(word for word in line.split() if len(counts) < _MOST_WORDS or word in counts)
        yield line
    yield from (word + word[-1] for word, count in sorted(counts.items()) if count > 1)


def _explain(message: str, vocab_size: int, controls: int) -> str:
    if match := re.search(r"value <= (\d+)", message):
        limit = int(match[1])
        if limit < _MIN_LAYOUT_VOCAB:  # as small a vocabulary has no layout pieces
            limit -= controls - len(_CONTROLS)
        return f"vocab_size {vocab_size} is too large for this corpus; at most {limit}"
    if match := re.search(r"required_chars\D*\d+ vs (\d+)", message):
        return f"vocab_size {vocab_size} is too small: the characters alone need {match[1]}"
    return f"SentencePiece cannot train on this corpus: {message}"


def read_model(path: str | Path) -> bytes:
    """The bytes of a `.model` file; ValueError if it cannot be read."""
    try:
        if (place := Path(path)).exists() and not (place.is_file() or place.is_dir()):
            raise ValueError(f"tokenizer {path}: not a file")  # reading a pipe would block
        return place.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {(error.strerror or '').lower()}") from None


class Tokenizer:
    """A trained model: text <-> ids. Ids 0 to 4 are UNK, PAD, EOS, USER and ASSISTANT."""

    def __init__(self, path: str | Path) -> None:
        """Load a `.model` file; ValueError where it is missing or not one of ours."""
        self.file = read_model(path)  # the bytes of the `.model` file
        self.sha256 = hashlib.sha256(self.file).hexdigest()
        self._model = spm.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self.file)
        except RuntimeError:
            raise ValueError(f"tokenizer {path}: not a SentencePiece model") from None
        ids = [self._model.unk_id(), self._model.pad_id(), self._model.eos_id()]
        ids += [self._model.piece_to_id(piece) for piece in _CONTROLS]
        if ids != [UNK, PAD, EOS, USER, ASSISTANT]:
            raise ValueError(
                f"tokenizer {path}: its unknown, pad, end, user and assistant pieces are {ids}, "
                f"not {[UNK, PAD, EOS, USER, ASSISTANT]}; make it with pipelines/train_tokenizer.py"
            )
        self.vocab_size = int(self._model.vocab_size())
        # Models of earlier versions, and of captions, lack these.
        layout = {self._model.piece_to_id(piece): text for piece, text in _LAYOUT.items()}
        self._layout = {} if UNK in layout else layout
        self._layout_ids = {text: token for token, text in self._layout.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS; never PAD, EOS, USER or ASSISTANT, whatever the text.

        `decode` restores the text, except that Unicode is normalised (NFKC), line endings become LF
        and other spaces plain ones. A model without layout pieces turns all white space into one
        space.
        """
        if not self._layout:
            return list(self._model.encode(text))
        ids: list[int] = []
        # Words and layout alternate.
        text = _SPACE.sub(" ", _LINE_END.sub("\n", text))
        for number, part in enumerate(_IS_LAYOUT.split(text)):
            if number % 2:
                ids += (self._layout_ids[piece] for piece in _PIECES.findall(part))
            else:
                ids += self._model.encode(part)
        return ids

    def encode_caption(self, text: str) -> list[int]:
        """Ids as of `encode`, for a text whose layout does not matter."""
        return self.encode(" ".join(text.split()))

    def encode_dialogue(self, turns: Sequence[str]) -> tuple[list[int], int]:
        """Ids `USER u ASSISTANT a ... EOS`, and the length of the prompt before the last reply.

        The prompt includes the last ASSISTANT. Raises ValueError unless the turns end with a reply.
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
        """The prompt for a reply to the last of `turns`."""
        ids, prompt = self.encode_dialogue([*turns, "-"])
        return ids[:prompt]

    def log_unigram(self) -> NDArray[np.float32]:
        """Log share of each piece in the corpus that the tokenizer was trained on, f32 [V].

        SentencePiece keeps them as scores. Pieces that it does not count get a bound: the marks of
        ends, turns and layout the commonest piece's, the unknown piece the rarest's.
        """
        every = [self._model.GetScore(token) for token in range(self.vocab_size)]
        scores: NDArray[np.float64] = np.array(every)
        counted = scores < 0
        highest = scores[counted].max()
        scores[~counted] = highest
        scores[UNK] = scores[counted].min()
        total = float(highest + np.log(np.exp(scores - highest).sum()))
        log_shares: NDArray[np.float32] = (scores - total).astype(np.float32)
        return log_shares

    def text_ids(self, ids: Iterable[int]) -> list[int]:
        """The tokens before the first EOS, without PAD, USER and ASSISTANT."""
        before = takewhile(lambda token: token != EOS, ids)
        return [int(token) for token in before if token not in (PAD, USER, ASSISTANT)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first EOS, without PAD, USER and ASSISTANT."""
        parts: list[str] = []
        for is_layout, run in groupby(self.text_ids(ids), self._layout.__contains__):
            if is_layout:
                parts += (self._layout[token] for token in run)
            else:
                parts.append(self._model.decode(list(run)))
        return "".join(parts)

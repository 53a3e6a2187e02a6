"""SentencePiece unigram tokenizer (Appendix D) and the control pieces of a dialogue.

SentencePiece sees words and single spaces alone; to it, all other white space is one space. Here
line breaks, tabs and further spaces are control pieces of their own, put between what it encodes:
a text comes back with all of its layout, whatever characters it holds.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import sentencepiece as spm

UNK, PAD, EOS, USER, ASSISTANT = range(5)

# Control pieces: no text encodes to them, so that nobody can write a turn's mark into a turn.
_CONTROLS = ("<user>", "<assistant>")
# What stands for layout; U+2581 is in the list because SentencePiece writes a space so.
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
_LEAST_WITH_LAYOUT = 48  # pieces; a smaller vocabulary has no room for these
# Unicode's other spaces: SentencePiece's normalization reads each as a space, so here as well.
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Not a single space between two words: that is SentencePiece's.
_IS_LAYOUT = re.compile(r"([\n\t\u2581]+|\A +| +\Z| {2,}| +(?=[\n\t\u2581])|(?<=[\n\t\u2581]) +)")
_PIECES = re.compile("|".join(sorted(_LAYOUT.values(), key=len, reverse=True)))


def train_model(lines: Iterable[str], vocab_size: int, *, layout: bool = True) -> bytes:
    """A unigram model of `vocab_size` pieces trained on `lines`: the bytes of a `.model` file.

    Without `layout`, or of under 48 pieces, it has none for line breaks, tabs and runs of spaces,
    and reads each as one space: a set of short captions has no use for them. The settings are
    Appendix D's; the seed and the special pieces are ours. The same lines in the same order give
    the same bytes. ValueError where the corpus cannot support the vocabulary.
    """
    model = io.BytesIO()
    controls = [*_CONTROLS, *(_LAYOUT if layout and vocab_size >= _LEAST_WITH_LAYOUT else ())]
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
            control_symbols=controls,
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
        # Models of earlier versions, and of captions, have none of these.
        ids = {self._model.piece_to_id(piece): text for piece, text in _LAYOUT.items()}
        self._layout = {} if UNK in ids else ids
        self._layout_ids = {text: token for token, text in self._layout.items()}

    def model(self) -> bytes:
        """The `.model` file."""
        return self._data

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS; never PAD, EOS, USER or ASSISTANT, whatever the text.

        `decode` gives the text back, but for Unicode's compatible forms (NFKC) and for line ends,
        which are all LF; other spaces are plain ones. A model without pieces for layout gives one
        space for all of it.
        """
        ids: list[int] = []
        if not self._layout:
            ids = self._model.encode(text)
            return ids
        # Words and layout take turns.
        text = _SPACE.sub(" ", _LINE_END.sub("\n", text))
        for number, part in enumerate(_IS_LAYOUT.split(text)):
            if number % 2:
                ids += (self._layout_ids[found] for found in _PIECES.findall(part))
            else:
                ids += self._model.encode(part)
        return ids

    def encode_caption(self, text: str) -> list[int]:
        """As `encode`, of a text whose white space means nothing."""
        return self.encode(" ".join(text.split()))

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
        parts: list[str] = []
        for is_layout, run in groupby(kept, self._layout.__contains__):
            if is_layout:
                parts += (self._layout[token] for token in run)
            else:
                parts.append(self._model.decode(list(run)))
        return "".join(parts)

    def piece(self, token: int) -> str:
        """The piece with this id, as the vocabulary has it."""
        text: str = self._model.id_to_piece(int(token))
        return text

"""The dialogues of chatterbot-corpus in UltraChat's layout."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import chatterbot_corpus
import yaml

from examples.published import hash_text, json_lines

HELD_OUT = 20  # one question in 20
SOURCE = {
    "layout": "ultrachat",
    "package": f"chatterbot-corpus {version('chatterbot-corpus')}",
    "attribution": "ChatterBot Corpus, English part, by G. Cox and contributors",
    "license": "BSD-3-Clause",
    "split": "one question in 20 is held out as test, with all of its answers",
}


def list_dialogues() -> list[tuple[str, ...]]:
    """English conversations, each once, without an unanswered last question or empty turns."""
    folder = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    dialogues: dict[tuple[str, ...], None] = {}
    for path in sorted(folder.glob("*.yml")):
        # BaseLoader keeps "yes" and "42" as text.
        page = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        for conversation in page["conversations"]:
            turns = tuple(" ".join(_turn(turn).split()) for turn in conversation)
            turns = turns[: len(turns) // 2 * 2]
            if turns and all(turns):
                dialogues[turns] = None
    return list(dialogues)


def _turn(turn: Any) -> str:
    if isinstance(turn, dict):  # YAML reads "word: word" as a mapping
        return " ".join(f"{key}: {value}" for key, value in turn.items())
    return str(turn)


def write_dialogues(root: Path, limit: int) -> dict[str, int]:
    """`train_0.jsonl` and `test_0.jsonl`; all answers to one question are on the same side."""
    every = sorted(list_dialogues(), key=lambda turns: (hash_text("\n".join(turns)), turns))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, turns in enumerate(every[: limit or None]):
        split = "test" if hash_text(turns[0].lower()) % HELD_OUT == 0 else "train"
        rows[split].append({"id": str(number), "data": list(turns)})
    root.mkdir(parents=True)
    for split, records in rows.items():
        (root / f"{split}_0.jsonl").write_bytes(json_lines(records))
    return {split: len(records) for split, records in rows.items()}

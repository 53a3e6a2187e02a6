"""How files of bookkeeping look after a kill, a power cut, a full disk, a stray hand."""

NAMES = ("metrics.jsonl", "events.jsonl", "tracking.json", "done.json")
# What is added to a file of lines, and what any other file holds.
KINDS = {
    "half a line": (b'{"step": 17, "lo', b'{"run_id": "0'),
    "zero bytes": (bytes(4096), bytes(128)),
    "zero bytes within": (b'{"step": 5, "l\0\0\0\0\0": 3}\n', b'{"run\0\0\0\0\0\0": 1}'),
    "not UTF-8": (b'{"step": 3, "x": "\xff"}\n', b"\xff\xfe\x00"),
    "another encoding": ('{"step": 3}\n'.encode("utf-16"), '{"step": 6}'.encode("utf-16")),
    "empty": (None, b""),
    "a list": (b'[{"step": 3}]\n', b"[1, 2]"),
    "a number": (b"5\n", b"-5.0"),
    "no keys": (b"{}\n", b"{}"),
    "wrong types": (
        b'{"step": "3", "started": [], "event": 1, "kind": 2}\n',
        b'{"run_id": 5, "config": null, "step": "6"}',
    ),
    "deep": (b"[" * 100_000 + b"\n", b"[" * 100_000),
    "a folder": (None, None),
}


def damaged(data: bytes, kind: str, lines: bool) -> bytes | None:
    """`data` after damage of this kind; None for a folder in the file's place."""
    added, instead = KINDS[kind]
    if lines and added is not None:
        return data + added
    return instead

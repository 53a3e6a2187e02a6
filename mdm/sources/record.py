"""What every reader yields."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RawRecord:
    """One record of a data set as it was published, not yet decoded.

    `image` holds the file's bytes, `text` a caption, `turns` a dialogue (user first, alternating),
    `label` an index into the reader's class names. `origin` says where the bytes lie, for people:
    a path, or archive::member.
    """

    id: str
    source: str
    split: str
    origin: str
    image: bytes | None = None
    text: str | None = None
    turns: tuple[str, ...] = ()
    label: int | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read: quarantined with its reason, never dropped silently."""

    id: str
    source: str
    split: str
    origin: str
    reason: str

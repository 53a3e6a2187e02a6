"""Text files as people have them: byte order marks, any line ends, what file managers leave about.

Text is UTF-8. A byte order mark, CRLF or lone CR, blanks at a line's end, blank lines and a missing
last line end change no record. UTF-16 is an error with the command that converts it.
"""

_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
# Also the mark, and DOS's end of a file.
_BLANK = b" \t\r\n\x0b\x0c\x1a\xef\xbb\xbf"
_NO_BREAK_SPACE = "\xa0".encode()
# Folders and files that macOS, Windows, a NAS or an editor makes beside people's own.
_CLUTTER = frozenset(
    (
        "__macosx",
        ".ds_store",
        ".apdisk",
        ".appledouble",
        ".documentrevisions-v100",
        ".fseventsd",
        ".localized",
        ".spotlight-v100",
        ".temporaryitems",
        ".trashes",
        "icon\r",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "@eadir",
        ".directory",
        ".ipynb_checkpoints",
    )
)


class NotUtf8Error(OSError):
    """The whole file is in another encoding."""


def is_clutter(name: str) -> bool:
    """Whether a file or folder name, or any part of a path, is nobody's data: `._a.jpg`, ..."""
    return any(
        part.startswith("._") or part.casefold() in _CLUTTER
        for part in name.replace("\\", "/").split("/")
    )


def check_utf8(head: bytes) -> None:
    """NotUtf8Error if a file that begins with these four bytes is UTF-16 or UTF-32."""
    # Without a mark, every other byte of ASCII in UTF-16 is zero, and no text holds a zero.
    zeros = [byte == 0 for byte in head[:4]]
    unmarked = zeros in ([True, False, True, False], [False, True, False, True]) and all(
        32 <= byte < 127 or byte in b"\t\r\n" for byte in head[:4] if byte
    )
    if head.startswith(_UTF16) or unmarked:
        raise NotUtf8Error(
            "the file is UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8"
        )


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing."""
    return not line.replace(_NO_BREAK_SPACE, b"").strip(_BLANK)


def decode_line(line: bytes) -> str:
    """The text of a line, without its end or a byte order mark; ValueError if it is not UTF-8."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from None
    return text.lstrip("\ufeff").rstrip("\r\n\x1a")

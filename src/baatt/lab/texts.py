"""Texts of users, by one rule wherever they come from: UTF-8, with or without a byte order mark, newlines as they are.

In: a file, "-" for standard input, or the bytes of an argument. Out: the text, without the mark. Python's own text mode
would turn CRLF into LF, in files but not in arguments, and count the mark as a character.
"""

import sys
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file, of standard input for "-"; ValueError: it cannot be read, or is not UTF-8."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return decode_text(data, "standard input" if str(path) == "-" else str(path))


def decode_text(data: bytes, name: str) -> str:
    """The text of bytes; ValueError, naming them and the first byte that does not fit: they are not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = error.start
        raise ValueError(f"{name} must hold UTF-8 text, got byte {data[place]:#04x} at place {place}") from None

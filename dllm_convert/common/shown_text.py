"""Text of others on its way to a terminal, a page or a JSON document: shown, never obeyed.

Names of files, templates' errors and cards of base models come from strangers. An escape sequence
in them would move the cursor, and a bidirectional mark turns the rest of a line around.
"""

from __future__ import annotations

import math
import re
import unicodedata

BROKEN = "\N{REPLACEMENT CHARACTER}"

# Joiners build emoji and Indic letters; other format characters can turn a line around or hide it.
_HARMLESS_FORMAT = "\u200c\u200d"
_NOT_IN_JSON = re.compile(
    "[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def glyph(char: str) -> str:
    """Return a character as something that is seen and takes no effect."""
    kind = unicodedata.category(char)
    if kind == "Cc":
        # U+2400 and on are pictures of the control characters; those above 0x7f have none.
        code = ord(char)
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else BROKEN
    if kind in ("Cs", "Co", "Cn", "Zl", "Zp") or (kind == "Cf" and char not in _HARMLESS_FORMAT):
        return BROKEN
    return " " if kind == "Zs" else char


def printable(text: str) -> str:
    """Return text that a terminal or a page shows and does not obey; lines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" else glyph(char) for char in text)


def one_line(text: str) -> str:
    """Return text as one line that a terminal shows and does not obey.

    Errors and warnings go through this where they leave the program: whatever is quoted in them, a
    name with a line end makes no second one.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(glyph, text))


def acts(text: str) -> bool:
    """Whether a document that holds this text has to write some of it as escapes."""
    return _NOT_IN_JSON.search(text) is not None


def json_safe(document: str) -> str:
    """Return a JSON document in which such characters are escapes: its values stay what they are.

    What is left alone by `json` is half a character, which no file holds, and marks that act.
    """
    return _NOT_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", document)


_SHOWN = 40


def shown(value: object) -> str:
    """Return a value of config.json for a message, on one line and not longer than a few words."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**_SHOWN:
        # Python refuses to write numbers of more than 4,300 digits.
        return f"a number of about {int(abs(value).bit_length() * math.log10(2)) + 1} digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"

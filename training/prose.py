"""Turns HTML pages, POD files and Vim's help into plain English prose.

The readers return raw paragraphs without code, tables and navigation; `clean` normalises one paragraph, `is_prose` and
`is_running_prose` say whether it is worth keeping, and `word_runs` compares paragraphs beyond exact equality.
"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

BLOCK_TAGS = re.compile(
    "address|article|aside|blockquote|body|br|center|d[ltd]|div|figure|footer|h[1-6]|header|hr|li|main|[ou]l|p|"
    "section|t[dhr]|pre|table"
)
SKIPPED_TAGS = re.compile("button|figure|form|head|nav|pre|s|script|select|style|sub|sup|svg|table|textarea")
SKIPPED_CLASSES = {"nosearch", "fancy_toc", "fancy_title", "menu", "toc", "docnav", "footnotes", "codeblock"}
QUOTES_AND_DASHES = "\u2018\u2019\u201a\u0092\u201c\u201d\u201e\u2010\u2011\u2212\u2013\u00a0\u2022\u00d7"
TYPOGRAPHY = str.maketrans(QUOTES_AND_DASHES, "''''\"\"\"----  x", "\u00ad\u200b\ufeff") | {
    0x2014: " - ",
    0x2026: "...",
}
MINIMUM_WORDS = 12
POD_ENTITY = re.compile(r"E<(\w+)>")
POD_WIDE = re.compile(r"([A-Z])<<+\s(.*?)\s>>+", re.DOTALL)
POD_CODE = re.compile(r"([A-Z])<([^<>]*)>")
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")


class ProseParser(HTMLParser):
    """Collects the text of an HTML page as paragraphs, without code, tables and navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self.pieces: list[str] = []
        self.skipped_tag = ""
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped_tag:
            self.depth += tag == self.skipped_tag
            return
        if BLOCK_TAGS.fullmatch(tag):
            self.flush()
        if SKIPPED_TAGS.fullmatch(tag) or not SKIPPED_CLASSES.isdisjoint((dict(attrs).get("class") or "").split()):
            self.skipped_tag, self.depth = tag, 1

    def handle_endtag(self, tag: str) -> None:
        if self.skipped_tag:
            self.depth -= tag == self.skipped_tag
            if self.depth == 0:
                self.skipped_tag = ""
        elif BLOCK_TAGS.fullmatch(tag):
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self.skipped_tag:
            self.pieces.append(data)

    def flush(self) -> None:
        self.paragraphs.append("".join(self.pieces))
        self.pieces = []


def html_paragraphs(text: str) -> list[str]:
    parser = ProseParser()
    parser.feed(text)
    parser.close()
    parser.flush()
    return parser.paragraphs


def plain_paragraphs(text: str) -> list[str]:
    """Paragraphs of plain text: ended by a blank line or by a small indent; lines with columns are dropped."""
    paragraphs: list[list[str]] = [[]]
    indented = False
    for line in text.splitlines():
        starts = line.startswith("   ") and not indented
        indented = line.startswith("   ")
        if not line.strip() or starts or line.startswith(("===", "---", "- ", "* ")):
            paragraphs.append([])
        if not re.search(r"\S(?:\t|\s{3,})\S|[=~_-]{5,}", line):
            paragraphs[-1].append(line.strip().removeprefix("- ").removeprefix("* "))
        else:
            paragraphs.append([])
    return [" ".join(lines) for lines in paragraphs]


def vim_paragraphs(text: str) -> list[str]:
    """Vim's help as HTML is one <PRE> of plain text; its examples are purple."""
    text = re.sub(r'<B><FONT COLOR="PURPLE">.*?</FONT></B>', "", text, flags=re.DOTALL)
    text = re.sub(r"\*(<A NAME=[^>]*></A>)<B>[^<]*</B>\*", "", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return plain_paragraphs(re.sub(r"\|([^|\s]+)\|", r"\1", text))


def pod_paragraphs(text: str) -> list[str]:
    def plain(match: re.Match[str]) -> str:
        code, body = match.groups()
        if code in "XZ":
            return ""
        return re.split(r"\|", body)[0].rsplit("/", 1)[-1].strip('"') if code == "L" and "://" not in body else body

    text = re.sub(r"^=begin\b.*?^=end\b[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.lstrip("\n").startswith(("=", " ", "\t")):
            continue
        paragraph = POD_WIDE.sub(plain, POD_ENTITY.sub(r"&\1;", paragraph))
        while (reduced := POD_CODE.sub(plain, paragraph)) != paragraph:
            paragraph = reduced
        paragraphs.append(html.unescape(paragraph))
    return paragraphs


def clean(paragraph: str) -> str:
    text = " ".join(html.unescape(paragraph).translate(TYPOGRAPHY).split())
    text = re.sub(r"\s+([,.;:!?)\]])(?=\s|$)", r"\1", text)
    return re.sub(r"^(?:[*-]|\(?\d+(?:\.\d+)*[.)])\s+", "", re.sub(r"\s*\[\d+\]", "", text))


def is_prose(text: str) -> bool:
    words = text.split()
    if len(words) < MINIMUM_WORDS or sum(not character.isascii() for character in text) > 0.01 * len(text):
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    return letters >= 0.86 * len(text) and plain_word_share(words) >= 0.75


def is_running_prose(text: str) -> bool:
    """The stricter rule of the held-out text: complete ASCII sentences with almost no identifiers."""
    words = text.split()
    sentences = len(words) >= 16 and text.isascii() and text[0].isupper() and text.rstrip("\"')")[-1:] in tuple(".!?")
    symbols = re.search(r"[{}\[\]<>|\\$=_]|(?=\w*\d)\b[0-9a-f]{7,}\b|\bsource: |\.\.\.", text)
    return sentences and symbols is None and plain_word_share(words) >= 0.9


def plain_word_share(words: list[str]) -> float:
    return sum(WORD.fullmatch(word.strip(".,;:!?()[]\"'")) is not None for word in words) / len(words)


def word_runs(text: str) -> set[str]:
    """All runs of MINIMUM_WORDS words, without case and punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + MINIMUM_WORDS]) for i in range(max(1, len(words) - MINIMUM_WORDS + 1))}

"""Pairs of German and English paragraphs from help pages, and which of them are translations worth learning from.

A paragraph of LibreOffice's help has the same id in every language; a page of GNOME's has the same elements in the same
order in every language.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

Pair = dict[str, str]  # id, group, origin, de, en

MIN_WORDS = 4
MAX_CHARACTERS = 600
_MALLARD = "{http://projectmallard.org/1.0/}"


class _Paragraphs(HTMLParser):
    """Texts of a page's paragraphs and headings that have an id, by id."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self._id: str | None = None
        self._pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch("p|h[1-6]", tag):
            self._id, self._pieces = dict(attrs).get("id"), []
        elif tag == "br":
            self._pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if re.fullmatch("p|h[1-6]", tag) and self._id is not None:
            self.texts.setdefault(self._id, _one_line("".join(self._pieces)))
            self._id = None

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)


def read_libreoffice(root: Path) -> Iterator[Pair]:
    """Paragraphs of LibreOffice's help, page by page; root is where its packages were unpacked."""
    folder = root / "usr/share/libreoffice/help"
    for english_page in sorted((folder / "en-US/text").rglob("*.html")):
        page = english_page.relative_to(folder / "en-US/text")
        german_page = folder / "de/text" / page
        if german_page.is_file():
            english, german = _Paragraphs(), _Paragraphs()
            english.feed(english_page.read_text(encoding="utf-8"))
            german.feed(german_page.read_text(encoding="utf-8"))
            for name, text in english.texts.items():
                if name in german.texts:
                    yield _pair("libreoffice-help", page.with_suffix("").as_posix(), name, german.texts[name], text)


def read_gnome(root: Path) -> Iterator[Pair]:
    """Titles and paragraphs of GNOME's help, page by page; root is where its package was unpacked."""
    folder = root / "usr/share/help"
    for english_page in sorted((folder / "C").rglob("*.page")):
        page = english_page.relative_to(folder / "C")
        german_page = folder / "de" / page
        if german_page.is_file():
            english, german = _elements(english_page), _elements(german_page)
            if [element.tag for element in english] == [element.tag for element in german]:
                for index, (one, other) in enumerate(zip(english, german, strict=True)):
                    name, texts = str(index), (_mallard_text(other), _mallard_text(one))
                    yield _pair("gnome-user-docs", page.with_suffix("").as_posix(), name, *texts)


def _elements(page: Path) -> list[ElementTree.Element]:
    """A page's titles and paragraphs, without those of its credits."""
    root = ElementTree.parse(page).getroot()
    for info in root.findall(f".//{_MALLARD}info/.."):
        for child in info.findall(f"{_MALLARD}info"):
            info.remove(child)
    return [element for element in root.iter() if element.tag in (f"{_MALLARD}title", f"{_MALLARD}p")]


def _mallard_text(element: ElementTree.Element) -> str:
    """Its text, or nothing if a link in it takes its words from another page."""
    if any(not "".join(link.itertext()).strip() for link in element.iter(f"{_MALLARD}link")):
        return ""
    return _one_line("".join(element.itertext()))


def _pair(origin: str, page: str, name: str, german: str, english: str) -> Pair:
    return {"id": f"{page}#{name}", "group": page, "origin": origin, "de": german, "en": english}


def _one_line(text: str) -> str:
    return " ".join(text.replace("\N{SOFT HYPHEN}", "").split())


def clean_pairs(pairs: Iterable[Pair], *, seen: Iterable[Pair] = (), dropped: Counter[str]) -> list[Pair]:
    """Pairs of sentences that translate each other, none of which comes twice.

    Two texts are the same here if their letters are: what differs in numbers or punctuation only would otherwise be in
    training and in the test.

    Args:
        pairs: judged in their order.
        seen: pairs taken already.
        dropped: counts what is left out, by reason.
    """
    letters = {_letters(pair[language]) for pair in seen for language in ("de", "en")}
    kept = []
    for pair in pairs:
        reason = flaw(pair["de"], pair["en"])
        texts = {_letters(pair["de"]), _letters(pair["en"])}
        if reason is None and not texts.isdisjoint(letters):
            reason = "text repeated"
        if reason is None:
            letters |= texts
            kept.append(pair)
        else:
            dropped[reason] += 1
    return kept


def flaw(german: str, english: str) -> str | None:
    """Why a pair of texts is no good example of a translation, or None."""
    pair = (german, english)
    if min(len(text.split()) for text in pair) < MIN_WORDS:
        return f"fewer than {MIN_WORDS} words"
    if max(map(len, pair)) > MAX_CHARACTERS:
        return f"more than {MAX_CHARACTERS} characters"
    if not all(re.search(r"[.!?:][\"”“»«)]*$", text) for text in pair):
        return "not a sentence"
    if any(re.search(r"[<>{}|\\=_]|https?:", text) for text in pair):
        return "markup or code"
    if any(re.search(r" [-–] .* [-–] ", text) for text in pair):
        return "path through menus"
    if any(sum(map(_is_word_character, text)) < 0.9 * len(text) for text in pair):
        return "many symbols"
    if not 0.6 <= len(german) / len(english) <= 2:
        return "lengths too different"
    if _placeholders(german) != _placeholders(english):
        return "different numbers or placeholders"
    words = set(english.lower().split())
    if sum(word in words for word in german.lower().split()) > 0.5 * len(german.split()):
        return "not translated"
    return None


def _is_word_character(character: str) -> bool:
    return character.isalpha() or character in " .,-'"


def _placeholders(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+|[%$#@&*+]", text))


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.lower()))

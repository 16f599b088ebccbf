"""The documentation as data: its pages, and what stands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
_BLOCK = re.compile(r"(?:^<!-- (?P<marker>[^\n]*) -->\n)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Fenced text: its language, and what an HTML comment on the line above says of it ("" if there is none)."""

    page: str
    line: int
    marker: str
    language: str
    text: str


def read(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[Block]:
    """The fenced blocks of one language, in their order."""
    text = read(page)
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["marker"] or "", found["language"], found["text"])
        for found in _BLOCK.finditer(text)
        if found["language"] == language
    ]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", read(page))


def commands(block: Block) -> list[list[str]]:
    """The commands of a block, as words."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def sections(page: str) -> dict[str, str]:
    """What stands under each heading of the second level."""
    parts = re.split(r"^## (.*)$", read(page), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str, width: int) -> list[list[str]]:
    """The rows of the tables in a text that have ``width`` cells, without heads and rules."""
    lines = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line] for line in lines if len(line) == width]
    rules = {number for number, line in enumerate(table) if set("".join(line)) <= {"-", ":"}}
    return [line for number, line in enumerate(table) if number not in rules and number + 1 not in rules]

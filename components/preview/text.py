"""What ``ebft validate`` prints: the parts of a run, and its first row with the anchors."""

import itertools
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from components.preview.build import Preview


def show(found: Preview) -> Group:
    """What ``ebft validate`` prints: which parts there are, the first row with its anchors, and what could not be looked at."""
    table = Table(title="parts", show_header=False, title_justify="left")
    kinds = {"policy": found.policy.decoder, **found.parts.training._asdict(), "advantage": found.parts.advantage}
    for name, part in kinds.items():
        table.add_row(name.replace("_", " "), type(part).__name__)
    if found.parts.network is not None:
        table.add_row("feature network", type(found.parts.network).__name__)
    parts: list[Any] = [table]
    if found.batch is not None:
        parts += [Text("first row, ‹k›: anchor k; dim: not learned from", style="bold"), _row_as_text(found)]
    return Group(*parts, *(Text(f"not checked: {sentence}", style="yellow") for sentence in found.missing))


def _row_as_text(found: Preview) -> Text:
    """The tokens of the first row, decoded in pieces between anchors and changes of the target mask."""
    assert found.batch is not None
    batch, marks = found.batch, {}
    generator: Any = found.parts.training.generator
    if hasattr(generator, "anchors"):
        anchors = generator.anchors(batch, generator.rollout_len)
        counted = anchors.positions[0][anchors.mask[0]].tolist()
        marks = {position: k for k, position in enumerate(counted)}
    learned = batch.target_mask[0].tolist()
    length = int((batch.doc_ids[0] >= 0).sum())
    cuts = sorted({0, length, *marks, *(t for t in range(1, length) if learned[t] != learned[t - 1])})
    text = Text()
    for start, end in itertools.pairwise(cuts):
        if start in marks:
            text.append(f"‹{marks[start]}›", style="bold cyan")
        text.append(found.tokenizer.decode(batch.tokens[0, start:end].tolist()), style="" if learned[start] else "dim")
    return text

"""One self-contained HTML file from an asset folder and data: no network, no font, nothing that text of a run could break.

The assets are plain HTML, CSS and JavaScript. Data goes in as JSON in which no tag can end or begin, and the scripts turn it
into text nodes; a content security policy in the page forbids it to load anything.
"""

import html
import json
import os
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

_ASSETS = resources.files("components.report") / "assets"


def write_page(path: Path, name: str, *, title: str, data: Any) -> Path:
    """Write the page ``name`` (its ``.html``, ``.css`` and ``.js`` among the assets) to ``path``, whole or not at all.

    Args:
        path: of the file; its folder is made if need be.
        name: ``"report"`` or ``"rollouts"``.
        title: of the browser's window.
        data: what the page shows; plain values, and no NaN.
    """
    text = Template(_asset("page.html")).substitute(
        title=html.escape(title),
        style=_asset("page.css") + _asset(f"{name}.css"),
        body=_asset(f"{name}.html"),
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        script=_asset("page.js") + _asset(f"{name}.js"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")

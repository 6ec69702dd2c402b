"""The report's page: template, style and program of this package, Vega, and the contents, in one file.

Its policy names the hashes of its own programs, so that no other program runs, and allows nothing to be fetched or sent.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from typing import Any

import vl_convert

from saets.report.contents import Contents


def page(contents: Contents) -> bytes:
    """The page in UTF-8."""
    folder = resources.files(__package__)
    template, style, program = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its annotations know no default
    vega = f"(() => {{{bundle}\n}})();"  # so that its names are no one else's
    hashes = " ".join(f"'sha256-{_sha256(code)}'" for code in (vega, program))
    parts = {
        "title": html.escape(f"{contents['name']}: what steering did"),
        "policy": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "contents": script_json(contents),
        "vega": vega,
        "program": program,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def script_json(value: Any) -> str:
    """JSON for a script element: all ASCII, and without the `<` that could end it or begin a comment."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")


def _sha256(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()

"""Writes the tables of all documents."""

from __future__ import annotations

from . import DOCUMENTS, ROOT, written

for document in DOCUMENTS:
    text = document.read_text(encoding="utf-8")
    if (anew := written(text)) != text:
        document.write_text(anew, encoding="utf-8")
        print(f"{document.relative_to(ROOT)}: written")

"""Tables of README and docs are what the results in the repository say."""

from __future__ import annotations

import re

import pytest

from benchmarks.tables import DOCUMENTS, ROOT, TABLES, cells, claims, unmarked, written

#: Tables with measured numbers that no file of results makes, or that are written by hand. This list may shrink.
BY_HAND = {
    "README.md": 1,
    "docs/command-line.md": 1,
    "docs/ideas.md": 1,
    "docs/memory.md": 1,
    "docs/methods.md": 4,
    "docs/probes.md": 1,
    "benchmarks/results/README.md": 1,
}

#: Numbers outside marked tables that look measured and that no claim makes of the results: settings and versions too.
#: These may become fewer.
UNCLAIMED = {
    "README.md": 9,
    "docs/command-line.md": 6,
    "docs/distributed.md": 4,
    "docs/how-it-works.md": 3,
    "docs/ideas.md": 20,
    "docs/install.md": 4,
    "docs/learn.md": 3,
    "docs/memory.md": 1,
    "docs/methods.md": 30,
    "docs/optimizers.md": 1,
    "docs/probes.md": 6,
    "docs/results.md": 7,
    "docs/speed.md": 5,
    "docs/trace.md": 6,
    "benchmarks/results/README.md": 14,
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_the_numbers_that_the_results_say(document):
    name, text = str(document.relative_to(ROOT)), document.read_text(encoding="utf-8")
    for where, sentence in claims.claims():
        assert where != name or claims.stands_in(sentence, text), sentence
    assert len(found := claims.unclaimed(name, text)) == UNCLAIMED.get(name, 0), found


def test_numbers_of_prose_are_found_but_for_those_of_claims_and_marked_tables(monkeypatch):
    text = (
        "Loses 3 %, `not 4.5` of torch 3.11.2, at 1e-3\nor −.25.\n\n<!-- table: x -->\n| 7.5 |\n<!-- end -->\n\n"
        "| 0.6 | [a](b-2.5.md) |\n```\n9.9\n```\n"
    )
    assert claims.unclaimed("a.md", text) == ["3", "1e-3", "−.25", "0.6"]
    monkeypatch.setattr(claims, "claims", lambda: [("a.md", "at 1e-3 or −.25."), ("b.md", "Loses 3 %")])
    assert claims.unclaimed("a.md", text) == ["3", "0.6"]
    assert claims.stands_in("at 1e-3 or −.25.", text) and claims.stands_in("0.6 |", text)
    assert not any(claims.stands_in(part, text) for part in ("Loses 4 %", "−.2", "11.2"))


def test_every_claim_is_of_a_document():
    assert {where for where, _ in claims.claims()} <= {str(document.relative_to(ROOT)) for document in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_what_the_results_say(document):
    text = document.read_text(encoding="utf-8")
    assert written(text) == text, "python -m benchmarks.tables writes it"
    found = unmarked(text)
    assert len(found) <= BY_HAND.get(str(document.relative_to(ROOT)), 0), found


def test_every_table_is_in_a_document():
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert sorted(re.findall(r"<!-- table: (\S+) -->", text)) == sorted(TABLES)


def test_a_marked_table_is_written_anew_and_the_rest_is_left():
    old = "before\n\n<!-- table: cosines -->\n| old |\n<!-- end -->\n\n| a | b |\n|---|---|\n| x | 0.5 |\n| y | |\n"
    new = written(old)
    assert TABLES["cosines"]() in new and "| old |" not in new
    assert new.startswith("before\n\n<!-- table: cosines -->\n| |") and new.endswith("| y | |\n")
    assert unmarked(new) == ["| a | b |"] and written(new) == new
    with pytest.raises(KeyError, match="nothing"):
        written("<!-- table: nothing -->\n<!-- end -->\n")


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.128, ".0%", "13 %"),
        (-0.004, ".0%", "0 %"),
        (-0.016, ".0%", "−2 %"),
        (0.05, "+.2f", "+0.05"),
        (-2.0, ".1f", "−2.0"),
    ],
)
def test_numbers(value, form, shown):
    assert cells.number(value, form) == shown


def test_several_values_are_a_mean_the_least_and_the_most():
    assert cells.several([0.5], ".1f") == "0.5"
    assert cells.several([0.1, 0.3], ".0%") == "20 % (10 % to 30 %)"
    assert cells.table(("", "a"), [["x", ""], ["", "y"]]) == "| | a |\n|---|---|\n| x | |\n| | y |\n"

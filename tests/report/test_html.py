"""A report holds what it was given, escaped and in order, and asks for nothing from outside."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from sparse_cl.report.html import write_report
from sparse_cl.report.section import PAGE_WIDTH, Section, Table, new_figure

NASTY = '<script src="https://evil.example/x.js">&amp;"quoted"</script> {{ 7 * 7 }}'


class Page(HTMLParser):
    """The tags with their attributes, and the text of each element by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self._open[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def bars(heights: list[float]):
    figure, axes = new_figure()
    axes[0, 0].bar(range(len(heights)), heights, hatch="/", label="<share>")
    axes[0, 0].legend()
    return figure


@pytest.fixture
def page(tmp_path):
    sections = [
        Section("Overlap", "0.2 < 0.5 & more.", (bars([1, 2]), bars([3])), Table(("layer", "IoU"), (("0", "<1>"),))),
        Section(NASTY, NASTY, (), Table((NASTY, "b"), ((NASTY, "2"), ("c", NASTY))), NASTY),
    ]
    write_report(tmp_path / "report.html", NASTY, {NASTY: NASTY, "tokens": "12"}, sections)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_text_comes_back_as_it_was_given(page):
    read = Page(page)
    assert read.of("h1") == [NASTY]
    assert read.of("dt") == [NASTY, "tokens"] and read.of("dd") == [NASTY, "12"]
    assert read.of("h2") == ["Overlap", NASTY]
    assert read.of("p") == ["0.2 < 0.5 & more.", NASTY, NASTY], "an empty note leaves no paragraph"
    assert read.of("th") == ["layer", "IoU", NASTY, "b"]
    assert read.of("td") == ["0", "<1>", NASTY, "2", "c", NASTY]
    assert "script" not in {tag for tag, _ in read.tags}


def test_the_contents_lead_to_the_sections(page):
    read = Page(page)
    links = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
    assert links == ["#" + attributes["id"] for tag, attributes in read.tags if tag == "section"]
    assert read.of("a") == read.of("h2")


def test_nothing_is_loaded_from_outside(page):
    read = Page(page)
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    loading = ("src", "srcset", "href", "data", "poster", "background", "action")
    targets = [value for _, attributes in read.tags for name, value in attributes.items() if name in loading]
    assert targets and all(target.startswith(("#", "data:image/svg+xml;base64,")) for target in targets)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    (policy,) = [a["content"] for _, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'"), "a browser refuses what slipped through"
    for picture in pictures(read):
        for element in ElementTree.fromstring(picture).iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith(("#", "data:")), value
                assert all(t.startswith("#") for t in re.findall(r"url\(([^)]*)\)", value)), value


def pictures(read: Page) -> list[bytes]:
    return [base64.b64decode(a["src"].partition(",")[2]) for tag, a in read.tags if tag == "img"]


def test_figures_are_whole_svg_pictures_in_order_and_of_their_width(page):
    read = Page(page)
    first, second = (ElementTree.fromstring(picture) for picture in pictures(read))
    assert float(first.attrib["width"].removesuffix("pt")) == PAGE_WIDTH * 72
    bars_of = [
        sum("hatch" in path.attrib.get("style", "") or "#h" in path.attrib.get("style", "") for path in tree.iter())
        for tree in (first, second)
    ]
    assert bars_of[0] == bars_of[1] + 1, "two bars, then one; a patch of the legend in both"
    assert [a["style"].partition(";")[0] for tag, a in read.tags if tag == "img"] == ["width: 100.0%"] * 2


def test_equal_arguments_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, "t", {}, [Section("s", "Seen.", (bars([1, 2]),))])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_titles_must_differ_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"got 'Drift' twice; rename"):
        write_report(tmp_path / "r.html", "t", {}, [Section("Drift", "a"), Section("Drift", "b")])
    assert not any(tmp_path.iterdir())


def test_rows_of_another_length_are_named():
    with pytest.raises(ValueError, match=r"expected 2 cells in each row, as in its header, got 3 in row 1 \(x, y, z"):
        Table(("a", "b"), (("x", "y"), ("x", "y", "z")))


@pytest.mark.parametrize(("arguments", "inches"), [((), (10, 3)), ((2, 4), (10, 6)), ((3, 2, 1.5, 2), (3, 6))])
def test_figures_fill_the_page_unless_told_otherwise(arguments, inches):
    figure, axes = new_figure(*arguments)
    assert tuple(figure.get_size_inches()) == inches
    assert axes.shape == (arguments[:2] or (1, 1))

"""The report: what it says on top, what differs between runs, figures that are light and dark; and, where a browser is installed, how it looks."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot as plt

from experiments import dynamics, memory, report, runs, validate
from experiments.pages import browser, configurations, figures, inks, summary
from experiments.pages import page as elements
from tests.conftest import Once
from tests.experiments import chromium

PHONE, DESKTOP = 360, 1440  # CSS pixels


@pytest.fixture(scope="session")
def made(once: Once) -> tuple[Path, ...]:
    """Two runs that differ in their law, one of another question, and one without a check."""

    def make(folder: Path) -> None:
        smoke: dict[str, Any] = {"runs_dir": folder / "reported", "quiet": True}
        for law in ("haar_stiefel", "gaussian"):
            dynamics.main(dataclasses.replace(dynamics.PRESETS["smoke"], law=(law,), **smoke))
        validate.main(dataclasses.replace(validate.PRESETS["smoke"], law=("haar_stiefel", "spectral"), **smoke))
        memory.main(memory.Config(sequences=1, length=8, **smoke))

    folder = once("reported", make) / "reported"
    return tuple(path for question in ("dynamics", "validate", "memory") for path in sorted(folder.glob(f"{question}-*")))


@pytest.fixture(scope="module")
def page(made: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.main(report.Config(run=made, out=tmp_path_factory.mktemp("report") / "report.html"))


def written(out: Path, *paths: Path, title: str = "") -> str:
    return report.main(report.Config(run=paths, out=out / "page.html", title=title)).read_text(encoding="utf-8")


def section(text: str, name: str) -> str:
    (found,) = re.findall(rf"<section id='{name}'>(.*?)</section>", text, flags=re.DOTALL)
    return found


def cells(text: str) -> list[list[str]]:
    """The text of the cells of all rows."""
    plain = lambda cell: html.unescape(re.sub(r"<[^>]+>", "", cell))  # noqa: E731
    return [[plain(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in re.findall(r"<tr>(.*?)</tr>", text)]


# without a browser


def test_the_verdict_counts_the_checks_of_all_runs(made: tuple[Path, ...], page: Path) -> None:
    lines = [line for path in made for line in summary.outcome(runs.load(path).rows())]
    checks = [row["holds"] for path in made for row in runs.load(path).rows() if "holds" in row]
    colour, text = "yes" if all(checks) else "no", page.read_text(encoding="utf-8")
    said = f"<span class='{colour}'>{sum(checks)} of {len(checks)}</span> checks hold in 3 runs; 1 run was measured without a check."
    assert said in text and text.index(said) < text.index("<nav")
    (_, *table) = cells(section(text, "what-holds"))
    assert [row[1:3] for row in table] == [[kind, f"{held:,} of {of:,}"] for kind, held, of, _, _ in lines]
    assert {row[0] for row in table} == {path.name for path in made if not path.name.startswith("memory")}


def test_a_check_that_fails_is_on_top(made: tuple[Path, ...], tmp_path: Path) -> None:
    """Of two reports of one run the one in which nothing failed is green."""
    copy = tmp_path / made[0].name
    shutil.copytree(made[0], copy)
    rows = [row for row in runs.read_rows(copy) if row.get("holds", True)]
    total = sum("holds" in row for row in rows)
    runs.load(copy).keep(rows)
    assert f"<span class='yes'>{total} of {total}</span> checks hold in 1 run." in written(tmp_path, copy)
    next(row for row in rows if row["kind"] == "curve")["holds"] = False
    runs.load(copy).keep(rows)
    text = written(tmp_path, copy)
    assert f"<span class='no'>{total - 1} of {total}</span> checks hold in 1 run." in text
    assert [row[1] for row in cells(section(text, "what-holds")) if row[3] == "NO"] == [summary.KINDS["curve"]]


def test_what_differs_is_what_was_changed(made: tuple[Path, ...], page: Path) -> None:
    """Two laws, and nothing else; one code and one machine; a field that came later had its value before."""
    first, second, *_ = (runs.load(path) for path in made)
    fields = configurations.differences([configurations.identity(run) for run in (first, second)])
    assert fields == {"law": [*first.config["law"], *second.config["law"]]}
    (head, *rows) = cells(section(page.read_text(encoding="utf-8"), "what-differs"))
    assert head == ["run", "law"] and rows == [[run.path.name, *run.config["law"]] for run in (first, second)]
    later = runs.Run(first.path, {"question": "pretrain", **runs.LATER})
    older = runs.Run(first.path, {"question": "pretrain"})
    assert configurations.differences([configurations.identity(older), configurations.identity(later)]) == {}
    other = runs.Run(first.path, {**later.config, "variant": "reference-code"})
    assert configurations.differences([configurations.identity(older), configurations.identity(other)]) == {
        "variant": ["paper", "reference-code"]
    }


def test_environments_that_differ_are_told(made: tuple[Path, ...], tmp_path: Path) -> None:
    copy = tmp_path / made[0].name
    shutil.copytree(made[0], copy)
    links = [elements.Link(name, name) for name in ("here", "there")]
    told = {**json.loads((copy / "env.json").read_text()), "git_sha": "0123456789", "git_dirty": True, "device": "an <accelerator>"}
    (copy / "env.json").write_text(json.dumps(told))
    text = configurations.differing([runs.load(made[0]), runs.load(copy)], links)
    assert cells(text)[0] == ["run", "commit", "device"] and cells(text)[2] == ["there", "0123456 with changes", "an <accelerator>"]
    assert "The 2 runs have one configuration." in text and f"torch {told['torch']}" in text
    (copy / "env.json").write_text(json.dumps({**told, "continued": {**told, "git_dirty": False}}))
    assert "0123456 with changes, then 0123456<" in configurations.differing([runs.load(made[0]), runs.load(copy)], links)


def test_many_runs_go_down_and_few_go_across(made: tuple[Path, ...]) -> None:
    few = [runs.Run(made[0], {"question": "q", "n": n, "rank": n, "seed": n}) for n in (1, 2)]
    links = [elements.Link(str(place), "x") for place in range(4)]
    assert cells(configurations.differing(few, links[:2]))[0] == ["field", "0", "1"]
    many = [runs.Run(made[0], {"question": "q", "n": n, "rank": n, "seed": n}) for n in (1, 2, 3, 4)]
    assert cells(configurations.differing(many, links))[0] == ["run", "n", "rank", "seed"]


def test_every_link_leads_to_one_place(made: tuple[Path, ...], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ids = Counter(re.findall(r"""\sid=["']([^"']+)["']""", text))
    leads = set(re.findall(r"""href=["']([^"']+)["']""", text)) | set(re.findall(r"url\((#[^)]+)\)", text))
    assert leads and all(lead.startswith("#") and ids[lead[1:]] == 1 for lead in leads) and max(ids.values()) == 1
    contents = re.findall(r"<li><a href='#([^']+)'>", text)
    assert contents == ["what-holds", "what-differs", *(path.name for path in made)] == re.findall(r"<section id='([^']+)'>", text)


def test_one_name_from_two_folders_is_two_sections(made: tuple[Path, ...], tmp_path: Path) -> None:
    shutil.copytree(made[-1], tmp_path / made[-1].name)
    text, name = written(tmp_path, made[-1], tmp_path / made[-1].name, title="A & B"), made[-1].name
    assert re.findall(r"<section id='([^']+)'>", text) == ["what-differs", name, f"{name}-2"]
    assert re.findall(r"<h2>Memory[^<]* \(([^)]+)\)</h2>", text) == [name, f"{name}-2"]
    assert "<title>A &amp; B</title>" in text and "<h1>A &amp; B</h1>" in text


def test_one_run_needs_no_contents(made: tuple[Path, ...], tmp_path: Path) -> None:
    text = written(tmp_path, made[-1])
    assert "<nav" not in text and "what-differs" not in text and "what-holds" not in text
    assert (
        "<p class='summary'>1 run, measured without a check.</p>" in text and "<title>Low-rank gradient estimators: memory</title>" in text
    )


def test_columns_of_numbers_are_told_from_words() -> None:
    rows = [
        {"law": "dct", "number": "−0.07 ± 0.04", "blank": None, "holds": True, "said": "<b>" + 40 * "x", "state": "2mn"},
        {"law": "9", "number": 1234567, "blank": math.nan, "holds": False, "said": "", "state": "mr"},
    ]
    text = elements.table(rows)
    assert re.findall(r"<th( class='words')?>(\w+)</th>", text) == [
        (" class='words'" if name in ("law", "holds", "said", "state") else "", name) for name in rows[0]
    ]
    assert "<td class='text'>&lt;b&gt;xx" in text and "<td>1,234,567</td>" in text and text.count("<td></td>") == 2
    assert cells(text)[1:] == [["dct", "−0.07 ± 0.04", "", "yes", rows[0]["said"], "2mn"], ["9", "1,234,567", "", "NO", "", "mr"]]


def test_what_all_rows_share_is_said_once() -> None:
    rows = [{"name": "a", "model": "60m", "gone": None, "holds": True, "x": 1.0}, {"name": "b", "model": "60m", "holds": True, "y": 2.0}]
    text = elements.factored(rows)
    assert text.startswith("<p>In all rows: model 60m.</p>")
    assert cells(text) == [["name", "holds", "x", "y"], ["a", "yes", "1", ""], ["b", "yes", "", "2"]]
    assert cells(elements.factored(rows[:1]))[0] == list(rows[0])


def test_colours_stay_apart_on_a_dark_page() -> None:
    """All of the palette keep their hue or their place between paper and ink; what could not be seen is lightened."""
    palette = sorted(
        {
            colour.lower()
            for colour in (*figures.PALETTE.values(), *figures.LAYERS.values(), *(style["color"] for style in figures.FEEDBACK.values()))
        }
    )
    changed = {colour: inks.dark(colour) for colour in palette}
    assert len(set(changed.values())) == len(palette)
    assert all(inks.contrast(colour, inks.PAPER) >= 3 for colour in changed.values())
    assert inks.contrast(figures.PALETTE["lora"], inks.PAPER) < 3, "the palette of paper does not do"
    assert inks.contrast(inks.dark("#262626"), inks.PAPER) > 7 and inks.contrast(inks.dark("#cccccc"), inks.PAPER) < 2  # text, grid
    assert inks.PAPER in browser.STYLE and inks.INK in browser.STYLE


def test_figures_of_one_page_share_nothing_and_have_no_colours_of_their_own() -> None:
    def drawn(values: list[float]) -> str:
        figure, ax = plt.subplots()
        ax.plot(values, "o-", color="#332288")
        return inks.inline(figures.svg(figure), "what it <shows>")

    one = drawn([1, 2])
    ids = re.findall(r'\sid="([^"]+)"', inks.apart(one + one + drawn([2, 1])))
    assert len(ids) == len(set(ids)) >= 6 and not set(ids) & set(re.findall(r'\sid="([^"]+)"', one))
    assert not re.search(r":\s*#[0-9a-f]{6}|<style|<metadata|<!--", one) and "var(--x332288)" in one
    assert "aria-label='what it &lt;shows&gt;'" in one
    told = inks.variables(one)
    assert all(told.count(f"--x{colour}:") == 2 for colour in re.findall(r"var\(--x(\w+)\)", one))


# in a browser


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if chromium.found() is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


def lightness(picture: Path) -> np.ndarray:
    return matplotlib.image.imread(picture)[..., :3].mean(-1)


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_it_is_light_and_dark_and_never_blank(window: chromium.Browser, page: Path, tmp_path: Path, width: int) -> None:
    """Screenshots: the paper is what most pixels are, ink is what some are, and the two change places."""
    seen = {}
    for dark in (False, True):
        window.show(page, width, dark)
        shot = lightness(window.picture(tmp_path / f"{dark}.png", whole=True))
        assert shot.shape[1] == width and shot.shape[0] > 2000
        seen[dark] = shot
        assert 0.005 < np.mean(np.abs(shot - np.median(shot)) > 0.5) < 0.3
    assert np.median(seen[False]) > 0.95 and np.median(seen[True]) < 0.1


@pytest.mark.parametrize("dark", [False, True])
def test_figures_can_be_read(window: chromium.Browser, page: Path, dark: bool) -> None:
    """Their text is set off as WCAG asks, and on a phone no label is smaller than was promised."""
    window.show(page, PHONE, dark)
    colours = window.run(
        "JSON.stringify([getComputedStyle(document.body).backgroundColor,"
        " ...new Set([...document.querySelectorAll('svg text')].map((text) => getComputedStyle(text).fill))])"
    )
    paper, *texts = ["#" + "".join(f"{int(c):02x}" for c in re.findall(r"\d+", colour)[:3]) for colour in json.loads(colours)]
    assert texts and all(inks.contrast(paper, text) > 4.5 for text in texts)
    sizes = window.run(
        "JSON.stringify([...document.querySelectorAll('svg')].map((svg) => Math.min(...[...svg.querySelectorAll('text')].map((text) =>"
        " parseFloat(text.style.fontSize || Infinity))) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))"
    )
    assert json.loads(sizes) and min(json.loads(sizes)) >= inks.LEAST * 0.99


def test_what_is_black_on_paper_is_ink_on_a_dark_page(window: chromium.Browser, tmp_path: Path) -> None:
    """Matplotlib leaves black out: it is what SVG has when nothing is said."""
    figure, ax = plt.subplots()
    ax.plot([1, 2], "o", color="#000000")
    ax.set_xlabel("black", color="#000000")
    page = tmp_path / "black.html"
    page.write_text(elements.document("Black", "", elements.figure(lambda: figure, "black")), encoding="utf-8")
    window.show(page, DESKTOP, dark=True)
    fills = "[...document.querySelectorAll('svg use, svg text')].map((one) => getComputedStyle(one).fill)"
    light, ink = (f"rgb({', '.join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))})" for colour in ("#000000", inks.INK))
    assert ink in window.run(fills) and light not in window.run(fills)


def test_a_phone_scrolls_only_what_is_wide(window: chromium.Browser, page: Path) -> None:
    """With every block open the page is as wide as the screen, while tables are wider than their boxes; something wider would be seen."""
    window.show(page, PHONE)
    window.run("document.querySelectorAll('details').forEach((block) => block.open = true)")
    assert window.run("document.documentElement.scrollWidth") == window.run("innerWidth") == PHONE
    assert window.run("[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)")
    assert window.run("[...document.querySelectorAll('.scroll')].every((box) => box.getBoundingClientRect().right <= innerWidth)")
    window.run("document.body.insertAdjacentHTML('beforeend', '<div style=\"width: 400px\">wide</div>')")
    assert window.run("document.documentElement.scrollWidth") > PHONE


def test_contents_stand_beside_a_wide_page_and_above_a_narrow_one(window: chromium.Browser, page: Path) -> None:
    places = "['nav', 'main', 'header'].map((name) => document.querySelector(name).getBoundingClientRect())"
    window.show(page, DESKTOP)
    assert window.run(f"(([nav, main]) => nav.right < main.left && nav.top < 100)({places})")
    window.show(page, PHONE)
    assert window.run(f"(([nav, main, header]) => header.bottom <= nav.top && nav.bottom <= main.top)({places})")


ROWS = [
    {"row": f"{place}", "value": value, "size": size, "holds": holds, "layer": layer}
    for place, (value, size, holds, layer) in enumerate(
        [
            ("95.04 ± 0.40", "900.0 MiB", True, "layer 10"),
            ("", "1.20 GiB", False, "layer 2"),
            ("−0.071 ± 0.036", "12 KiB", True, "Layer 1"),
            ("1,671,168", "", None, ""),
            ("7 %", "1.20 GiB", False, "layer 2"),
            ("2.5e-05", "3 B", True, "an other"),
            ("0.93× (0.91–1.05)", "1.20 GiB", True, "layer 3"),
            ("inf", "", True, ""),
            ("+0.24 (edge)", "1 MiB", True, "layer 2"),
        ]
    )
]
ORDERS = {  # column → rows in ascending order; equal ones as they were written, blank ones last
    "value": "2 5 8 6 4 0 3 7 1",
    "size": "5 2 8 0 1 4 6 3 7",
    "holds": "1 4 0 2 5 6 7 8 3",
    "layer": "5 2 1 4 8 6 0 3 7",
}
DESCENDING = {"value": "7 3 0 4 6 8 5 2 1", "size": "1 4 6 0 8 2 5 3 7", "holds": "0 2 5 6 7 8 1 4 3", "layer": "0 6 1 4 8 2 5 3 7"}


@pytest.fixture
def sortable(window: chromium.Browser, tmp_path: Path) -> chromium.Browser:
    page = tmp_path / "table.html"
    page.write_text(elements.document("Sorted", "", elements.table(ROWS) + elements.table(ROWS[:1])), encoding="utf-8")
    window.show(page, DESKTOP)
    return window


def order(window: chromium.Browser) -> str:
    return window.run("[...document.querySelector('table').tBodies[0].rows].map((row) => row.cells[0].textContent).join(' ')")


def states(window: chromium.Browser) -> str:
    return window.run("[...document.querySelectorAll('th')].map((head) => head.getAttribute('aria-sort') || '-').join(' ')")


@pytest.mark.parametrize("column", ORDERS)
def test_a_click_sorts(sortable: chromium.Browser, column: str) -> None:
    """Up, down, and as it was written; the heading says which, the other headings and the other table say nothing."""
    before, place = order(sortable), list(ROWS[0]).index(column)
    assert sortable.run("[...document.querySelectorAll('th button')].map((button) => button.textContent)") == list(ROWS[0])
    x, y = sortable.run(
        f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])(document.querySelectorAll('th button')[{place}].getBoundingClientRect())"
    )
    for expected, state in ((ORDERS[column], "ascending"), (DESCENDING[column], "descending"), (before, "-")):
        sortable.click(x, y)
        assert order(sortable) == expected
        assert states(sortable).split() == [state if at == place else "-" for at in range(2 * len(ROWS[0]))]


def test_keys_sort(sortable: chromium.Browser) -> None:
    """Tab goes from heading to heading, Enter and the space bar sort by the one it is at, after which it is still at that."""
    sortable.press("Tab")
    sortable.press("Tab")
    sortable.press("Enter", "\r")
    assert order(sortable) == ORDERS["value"] and states(sortable).startswith("- ascending -")
    sortable.press(" ", " ")
    assert order(sortable) == DESCENDING["value"] and states(sortable).startswith("- descending -")
    sortable.press("Tab")
    sortable.press(" ", " ")
    assert order(sortable) == ORDERS["size"] and states(sortable).startswith("- - ascending -")


def test_without_scripts_it_reads_the_same(window: chromium.Browser, page: Path) -> None:
    texts = []
    for scripts in (True, False):
        window.show(page, DESKTOP, scripts=scripts)
        texts.append(window.run("document.body.innerText"))
        assert window.run("document.querySelectorAll('th button').length > 0") == scripts
    assert texts[0] == texts[1] and len(texts[0]) > 1000

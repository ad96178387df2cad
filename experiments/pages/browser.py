"""What the page gives the browser besides its elements: one style sheet, and the script by which tables are sorted."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --page: #ffffff; --wash: #f6f8fa; --edge: #1b1f2440; }
:root { --good: #116329; --bad: #b3261e; --link: #0b57b0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --page: #0d1117; --wash: #161b22; --edge: #000000c0; }
  :root { --good: #56d364; --bad: #ff7b72; --link: #79b8ff; }
}
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); }
body { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 1rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
h2, h3 { overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: .15em; }
p { max-width: 46rem; margin: .7rem 0; }
p, figcaption, summary { color: var(--soft); }
code { font-size: .92em; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .25rem 0; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
figure { margin: 1.5rem 0; }
figcaption { max-width: 46rem; font-size: .9rem; margin-top: .4rem; }
figure svg { display: block; height: auto; max-width: 100%; fill: var(--x000000); }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow: auto; max-width: 100%; margin: .7rem 0; background:
  linear-gradient(90deg, var(--page) 50%, transparent) 0 / 2rem 100%, linear-gradient(-90deg, var(--page) 50%, transparent) 100% / 2rem 100%,
  linear-gradient(90deg, var(--edge), transparent) 0 / .5rem 100%, linear-gradient(-90deg, var(--edge), transparent) 100% / .5rem 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
details .scroll { max-height: 80vh; }
table { width: max-content; border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .86rem; line-height: 1.4; }
th, td { text-align: right; vertical-align: top; padding: .22rem .65rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--page); vertical-align: bottom; border-bottom: 2px solid var(--line); z-index: 1; }
th.words, td.words { text-align: left; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; max-width: min(40rem, 62vw); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td:first-child { padding-left: .2rem; max-width: 47vw; white-space: normal; overflow-wrap: anywhere; }
th:first-child { padding-left: .2rem; z-index: 2; }
tbody tr:hover > td { background: var(--wash); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th button::after { content: "↕"; opacity: .35; display: inline-block; width: 1em; text-align: right; }
th[aria-sort] button::after { opacity: 1; }
th[aria-sort="ascending"] button::after { content: "▲"; font-size: .75em; width: 1.333em; }
th[aria-sort="descending"] button::after { content: "▼"; font-size: .75em; width: 1.333em; }
.yes { color: var(--good); }
.no { color: var(--bad); font-weight: 600; }
.verdict { font-size: 1.05rem; }
.summary { font-size: 1.15rem; color: var(--ink); }
nav { margin: 1.5rem 0; padding: .6rem 1rem; border: 1px solid var(--line); border-radius: 6px; background: var(--wash); }
nav strong { font-size: .9rem; }
nav ul { list-style: none; margin: .3rem 0 0; padding: 0; font-size: .9rem; line-height: 1.35; }
nav li { padding: .2rem 0; overflow-wrap: anywhere; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
@media (min-width: 1280px) {
  body.contents { max-width: 88rem; display: grid; grid-template-columns: 15rem minmax(0, 1fr); column-gap: 2.5rem; align-items: start; }
  body.contents > * { grid-column: 2; }
  body.contents nav { grid-area: 1 / 1 / span 2; position: sticky; top: 1rem; max-height: calc(100vh - 4rem); overflow: auto; margin: 0; }
}
@media print {
  nav { display: none; }
  .scroll, details .scroll { overflow: visible; max-height: none; }
  figure, tr { break-inside: avoid; }
}
"""

# A heading becomes a button: ascending, descending, as written. A column of words is sorted as words, so that NO stands before yes; any other by the
# number that its cells begin with, in their unit. Equal cells stay in the written order, and blank ones last.
SCRIPT = """
(() => {
  const unit = { KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, ns: 1e-9, "µs": 1e-6, ms: 1e-3 };
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  const number = (text) => {
    const found = /([+−-]?)(inf|(?:\\d[\\d,]*)?\\.?\\d+|\\d[\\d,]*)(e[+-]?\\d+)?\\s*(\\S*)/i.exec(text);
    if (!found) return NaN;
    const size = found[2].toLowerCase() === "inf" ? Infinity : Number(found[2].replaceAll(",", "") + (found[3] || ""));
    return (/[−-]/.test(found[1]) ? -size : size) * (unit[found[4]] || 1);
  };
  const words = (one, other) => one.localeCompare(other, "en", { numeric: true, sensitivity: "base" });
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0], written = [...body.rows], heads = [...table.tHead.rows[0].cells];
    if (written.length < 2) continue;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const order = next[head.getAttribute("aria-sort") || "none"];
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (order === "none") return body.append(...written);
        head.setAttribute("aria-sort", order);
        const key = (row) => row.cells[column].textContent.trim();
        const isWords = head.classList.contains("words");
        const blank = (text) => text === "" || (!isWords && Number.isNaN(number(text)));
        const compare = isWords ? words : (one, other) => (number(one) === number(other) ? 0 : number(one) - number(other));
        const sign = order === "ascending" ? 1 : -1;
        const filled = written.filter((row) => !blank(key(row))).sort((one, other) => sign * compare(key(one), key(other)));
        body.append(...filled, ...written.filter((row) => blank(key(row))));
      });
    });
  }
})();
"""

"""Reports: one HTML file with its pictures inside, which needs no network and no other file; that of a comparison."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.records import write_bytes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; margin: 0.5rem 0 2rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; }
th { cursor: pointer; background: #f4f4f4; vertical-align: bottom; }
th:first-child, td:first-child, td.reason { text-align: left; }
td.reason { font-size: 0.85em; color: #555; max-width: 22rem; }
tr.unranked td { color: #888; }
img { max-width: 100%; }
code { background: #f4f4f4; padding: 0 0.2em; }
.note { color: #555; }
"""

# Rows that are not ranked stay at the end, whatever the column and the direction.
SCRIPT = """
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], place = head.cellIndex;
  const up = head.dataset.up !== "1";
  head.closest("tr").querySelectorAll("th").forEach(other => delete other.dataset.up);
  head.dataset.up = up ? "1" : "0";
  const value = row => row.cells[place].dataset.value ?? "";
  const order = (a, b) => {
    const unranked = row => row.classList.contains("unranked") ? 1 : 0;
    if (unranked(a) !== unranked(b)) return unranked(a) - unranked(b);
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const both = [Number(x), Number(y)];
    const less = both.some(Number.isNaN) ? x.localeCompare(y) : both[0] - both[1];
    return up ? less : -less;
  };
  [...body.rows].sort(order).forEach(row => body.append(row));
}));
"""

COLUMNS = (
    "mechanism",
    "status",
    "quality",
    "std",
    "parameters",
    "step (ms)",
    "iqr (ms)",
    "compile (s)",
    "forward (MiB)",
    "train (MiB)",
    "decode B/token",
    "decode B fixed",
    "visited share",
    "remark",
)

NOTES = """
<ul class="note">
<li>All mechanisms of a task have the same data, steps, batch, width, optimizer and seeds. Quality is measured once, on
the test split, after the last step; ± is the standard deviation over seeds. With so few seeds, differences within one
or two standard deviations say nothing.</li>
<li>A mechanism that did not reach the bar of its task within the budget is listed, hollow in the plots, and not ranked:
with more steps it may well learn.</li>
<li>All seeds train side by side in one program. Step times are the median and the interquartile range over all steps of
that program, divided by the number of seeds; temporary memory is that of the compiled program, also divided; compile
time is that of the training program as a whole, without a cache. Cells run one after the other, so times also hold what
else the machine did.</li>
<li>Decode state: bytes kept to generate one sequence, all layers, 4-byte numbers; 0 a token means a state of
fixed size.</li>
<li>Visited share: pairs of the T x T score matrix that masks and layouts leave, as counted in a real call (causal
attention leaves (T + 1) / 2T); a dash where there is no score matrix. It is not the work of the implementation: a
quadratic one computes what it then hides.</li>
</ul>
"""


def ranked(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Cells of one task: those that learned, best first, then the others by name."""

    def order(cell: Mapping[str, Any]) -> tuple:
        if cell["status"] != "ok":
            return (1, ("not learned", "unsupported", "failed").index(cell["status"]), cell["mechanism"])
        mean = cell["quality"]["mean"]
        return (0, -mean if cell["quality"]["higher_is_better"] else mean, cell["mechanism"])

    return sorted(cells, key=order)


def number(value: float | None, form: str) -> tuple[str, str]:
    """A number as a cell of a table: what it is sorted by, and what is shown; a dash for None."""
    return ("", "–") if value is None else (repr(value), format(value, form))


def row(items: Sequence[tuple[str, str]], reason: str, *, is_ranked: bool) -> str:
    """A row of a table.

    Args:
        items: what each cell is sorted by, and what it shows.
        reason: the last cell.
        is_ranked: rows that are not stay below the others.
    """
    filled = "".join(f'<td data-value="{html.escape(value)}">{shown}</td>' for value, shown in items)
    reason = html.escape(reason)
    unranked = "" if is_ranked else ' class="unranked"'
    return f'<tr{unranked}>{filled}<td class="reason" data-value="{reason}">{reason}</td></tr>'


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that can be sorted by its columns."""
    named = "".join(f"<th>{name}</th>" for name in heads)
    body = "\n".join(rows)
    return f"<table><thead><tr>{named}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _row(cell: Mapping[str, Any]) -> str:
    quality, step = cell["quality"] or {}, cell["step_time_s"] or {}
    temporary, decode = cell["temp_bytes"] or {}, cell["decode_state"] or {}

    def scaled(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    items = [
        (cell["mechanism"], html.escape(cell["mechanism"])),
        (cell["status"], html.escape(cell["status"])),
        number(quality.get("mean"), ".4f"),
        number(quality.get("std"), ".4f"),
        number(cell["params"], ",d"),
        number(scaled(step.get("median"), 1e3), ".2f"),
        number(scaled(step.get("iqr"), 1e3), ".2f"),
        number(cell["compile_s"], ".1f"),
        number(scaled(temporary.get("forward"), 2**-20), ".2f"),
        number(scaled(temporary.get("train"), 2**-20), ".2f"),
        number(decode.get("bytes_per_token"), ",.0f"),
        number(decode.get("bytes_fixed"), ",.0f"),
        number(cell["visited_share"], ".3f"),
    ]
    return row(items, cell["reason"], is_ranked=cell["status"] == "ok")


def _table(task: str, cells: Sequence[Mapping[str, Any]], budget: Mapping[str, Any]) -> str:
    found = next((cell["quality"] for cell in cells if cell["quality"]), None)
    title = task
    if found:
        title += f": {found['metric']}, {'more' if found['higher_is_better'] else 'less'} is better"
    shown = ", ".join(f"{name}={value}" for name, value in budget.items())
    rows = [_row(cell) for cell in ranked(cells)]
    heading = f"<h2>{html.escape(title)}</h2>\n<p class='note'>{html.escape(shown)}</p>\n"
    return heading + table(COLUMNS, rows)


def image(title: str, file: pathlib.Path) -> str:
    """A picture inside the page, from a PNG file."""
    content = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{content}">'


def document(title: str, body: str, style: str = "") -> bytes:
    """A page that needs no other file; its tables sort themselves by the column that is clicked on.

    Args:
        title: of the window.
        body: HTML.
        style: CSS that is added.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{STYLE}{style}</style></head><body>
{body}
<script>{SCRIPT}</script>
</body></html>
""".encode()


def images(pictures: Mapping[str, pathlib.Path]) -> str:
    """PNG files by title, put into the page."""
    return "\n".join(f"<h2>{html.escape(title)}</h2>\n{image(title, file)}" for title, file in pictures.items())


def page(title: str, headline: str, results: Mapping[str, Any], circumstances: str, body: str) -> bytes:
    """A page about results; it says above its body how and with what they were made."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    told = "; ".join(map(html.escape, (results["device"], versions, circumstances)))
    above = f"""<h1>{html.escape(headline)}</h1>
<p><code>{html.escape(results["command"])}</code></p>
<p class="note">{told}. Click on a column to sort.</p>
"""
    return document(title, above + body)


def write_report(path: pathlib.Path, results: Mapping[str, Any], pictures: Mapping[str, pathlib.Path]) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        results: what `results.json` holds.
        pictures: PNG files by title; they are put into the file.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for cell in results["cells"]:
        by_task.setdefault(cell["task"], []).append(cell)
    tables = "\n".join(_table(task, cells, results["budget"]["tasks"].get(task, {})) for task, cells in by_task.items())
    seeds = ", ".join(map(str, results["budget"]["seeds"]))
    body = f"{tables}\n{NOTES}\n{images(pictures)}"
    headline = "Attention mechanisms under one budget"
    write_bytes(path, page("jattn: comparison", headline, results, f"seeds {seeds}", body))

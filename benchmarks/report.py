"""Tables and pictures from the JSON of ``pytest benchmarks --benchmark-only --benchmark-json=cpu.json``.

    python -m benchmarks.report benchmarks/results/cpu.json [--readme README.md] [--images docs/images]

For each file, or folder of such files: all tables beside it (cpu.md); a summary, a line a job, on standard output or,
with --readme, between ``<!-- bench:cpu -->`` and ``<!-- /bench -->`` there; pictures, <images>/bench_cpu.png and more.
The word is the name of the file or folder.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks import plots
from benchmarks.measured import Results, Row, read, scaled, seconds, times

FLOPS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def summary(results: Results) -> str:
    """Markdown, a line a job: the usual way (the first peer), the fastest peer, the fastest of ours. Three jobs or more
    that differ only in what follows the first comma of their titles, as in shape, share a line with the ranges."""
    lines = ["| | usual way | best plain torch | rpg_fast | faster by |", "|---|---|---|---|---|"]
    families: dict[str, list[tuple[str, Row, Row, Row]]] = {}
    for title, rows in results.races().items():
        peers = [row for row in rows if row.role == "peer"]
        mine = [row for row in rows if row.role == "ours"]
        if peers and mine:
            family = families.setdefault(title.partition(", ")[0], [])
            family.append((title, peers[0], _fastest(peers), _fastest(mine)))
    for name, jobs in families.items():
        lines += [_range_of(name, jobs)] if len(jobs) > 2 else [_line_of(*job) for job in jobs]
    notes = [line for title in results.titles("training step") for line in ("", _overheads(results.groups[title]))]
    return "\n".join([*lines, *notes, "", results.footer()])


def _line_of(title: str, usual: Row, best: Row, ours: Row) -> str:
    cells = " | ".join(f"{row.name}: {seconds(row.median)}" for row in (usual, best))
    ratios = f"**{_faster(ours, usual)}**, {_faster(ours, best)}"
    return f"| {title} | {cells} | `{ours.name}`: **{seconds(ours.median)}** | {ratios} |"


def _range_of(name: str, jobs: list[tuple[str, Row, Row, Row]]) -> str:
    """The least and the most that ours is faster by; "wrong" where one of them is."""
    cells, ratios = [], []
    for column in (1, 2):
        cells.append(" or ".join(dict.fromkeys(job[column].name for job in jobs)))
        if any(row.wrong for job in jobs for row in (job[column], job[3])):
            ratios.append("wrong")
        else:
            faster = sorted(job[3].faster[job[column].name] for job in jobs)
            ratios.append(f"{times(faster[0])} to {times(faster[-1])}")
    ours = " or ".join(dict.fromkeys(f"`{job[3].name}`" for job in jobs))
    return f"| {name}, {len(jobs)} shapes | {' | '.join(cells)} | {ours} | **{ratios[0]}**, {ratios[1]} |"


def _fastest(rows: list[Row]) -> Row:
    return min((row for row in rows if row.representative), key=lambda row: row.median, default=rows[0])


def _faster(ours: Row, other: Row) -> str:
    """How many times faster ours is; no ratio where either is wrong."""
    if ours.wrong or other.wrong:
        return "wrong"
    return times(ours.faster[other.name])


def _overheads(rows: list[Row]) -> str:
    """What pruning adds to a dense step, a sentence."""
    dense = [f"{seconds(row.median)} ({row.name})" for row in rows if row.role == "bound"]
    added = [
        f"{row.facts['overhead']:+.1%} {row.name}" for row in rows if "overhead" in row.facts and "mean_of" in row.facts
    ]
    return f"Beside a training step of {', '.join(dense) or 'unknown length'}: {'; '.join(added)}."


def races(results: Results) -> list[str]:
    """A line a contestant: the median, the range, and how many times faster the fastest of ours is."""
    lines = ["| | median | min to max | rpg_fast is faster by |", "|---|---|---|---|"]
    for title, rows in results.races().items():
        ours = [row for row in rows if row.role == "ours"]
        lines.append(f"| **{title}** | | | |")
        for row in rows:
            detail = f" ({row.setting})" if row.setting else ""
            spread = "ran once" if row.once else f"{seconds(row.least)} to {seconds(row.most)}"
            last = f"**wrong**: {row.wrong} " if row.wrong else ""
            if row.role == "ours":
                lines.append(f"| `{row.name}`{detail} | **{seconds(row.median)}** | {spread} | {last}|")
            else:
                last = last.strip() or (_faster(_fastest(ours), row) if ours else "")
                lines.append(f"| {row.name}{detail} | {seconds(row.median)} | {spread} | {last} |")
        lines += [f"| {name} | | {reason} | |" for name, reason in results.missing.get(title, {}).items()]
    return lines


def training(results: Results) -> list[str]:
    """Of training steps: images a second, and what pruning adds to the dense step, in the mean and in its parts."""
    lines = []
    for title in results.titles("training step"):
        note = "means of 100 steps: 99 ordinary ones and a topology update, which takes no optimizer step"
        lines += [
            "",
            f"{title.capitalize()} ({note}):",
            "",
            "| | a step | images/s | over the dense step |",
            "|---|---|---|---|",
        ]
        for row in results.groups[title]:
            speed = f"{row.facts['images'] / row.median:,.0f}" if "images" in row.facts else ""
            added = f"{row.facts['overhead']:+.2%}" if "overhead" in row.facts else ""
            lines.append(f"| {row.name} | {seconds(row.median)} | {speed} | {added} |")
    return lines


def memory(results: Results) -> list[str]:
    """Of training steps: bytes before a step, at its peak, what pruning adds, and what of that stays between steps."""
    lines = []
    for title in results.titles("memory"):
        lines += ["", f"{title.capitalize()}:", "", "| | before a step | peak | added | what stays | bound |"]
        lines.append("|---|---|---|---|---|---|")
        for row in results.groups[title]:
            facts = row.facts
            held, peak = (scaled(facts[key], BYTES) for key in ("held_bytes", "step_peak_bytes"))
            cells = ["", "", ""]
            if "added_bytes" in facts:
                kept = [f"{name} {scaled(size, BYTES)}" for name, size in facts["kept_bytes"].items()]
                cells = [scaled(facts["added_bytes"], BYTES), ", ".join(kept), scaled(facts["bound_bytes"], BYTES)]
            lines.append(f"| {row.name} | {held} | {peak} | {' | '.join(cells)} |")
    return lines


def costs(results: Results) -> list[str]:
    """Of contestants whose work is known: FLOP and bytes, shares of the measured ceilings, the least time that these
    allow, memory."""
    lines = []
    for title, rows in results.races().items():
        known = [row for row in rows if "flops" in row.facts]
        if not known:
            continue
        note = "of the method on matrices without zero rows, which rpg_fast leaves out on a CPU"
        lines += ["", f"Work, {title} ({note}):", "", "| | work | of matrix rate | of copy rate | bound | memory |"]
        lines.append("|---|---|---|---|---|---|")
        for row in known:
            facts = row.facts
            work = f"{scaled(facts['flops'], FLOPS)} {facts['arithmetic']}, {scaled(facts['bytes'], BYTES)}"
            shares = f"{facts['of_matrix_rate']:.1%} | {facts['of_copy_rate']:.1%}"
            bound = f"{seconds(facts['bound_s'])}, {facts['bound_by']}"
            memory = scaled(facts["peak_bytes"], BYTES) if "peak_bytes" in facts else ""
            lines.append(f"| {row.name} | {work} | {shares} | {bound} | {memory} |")
    return lines


def errors(results: Results) -> list[str]:
    """Of everything with an error against float64: time, error of the loss, worst error of a gradient."""
    lines = []
    for title in [title for title in results.groups if not title.startswith("growth, ")]:
        rows = [row for row in results.groups[title] if "gradient_error" in row.facts]
        if not rows:
            continue
        lines += ["", f"Relative errors against float64, {title}:", "", "| | time | loss | gradient, worst weight |"]
        lines.append("|---|---|---|---|")
        for row in rows:
            found = f"{row.facts['loss_error']:.1e} | {row.facts['gradient_error']:.1e}"
            lines.append(f"| {row.name} | {seconds(row.median)} | {found} |")
        if title not in results.races():
            lines += [f"| {name} | {reason} | | |" for name, reason in results.missing.get(title, {}).items()]
    return lines


def growth(results: Results) -> list[str]:
    """A line a size, a column a contestant."""
    titles = results.titles("growth, ")
    if not titles:
        return []
    names = list(dict.fromkeys(row.name for title in titles for row in results.groups[title]))
    lines = ["", "| growth | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    notes: list[str] = []
    for title in [*titles, *(t for t in results.missing if t.startswith("growth, ") and t not in titles)]:
        found = {row.name: seconds(row.median) for row in results.groups.get(title, ())}
        cells = []
        for name in names:
            cells.append(found.get(name) or _note(results.missing.get(title, {}), name, notes))
        lines.append(f"| {title.removeprefix('growth, ')} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"[{i}] {note}  " for i, note in enumerate(notes, 1))]


def _note(missing: dict[str, str], name: str, notes: list[str]) -> str:
    """A reference to the reason why there is no time, which is added to the notes."""
    reason = missing.get(name) or missing.get("everyone") or ""
    if reason and reason not in notes:
        notes.append(reason)
    return f"[{notes.index(reason) + 1}]" if reason else ""


def ceilings(results: Results) -> list[str]:
    rates = results.machine["rates"]
    if not rates:
        return []
    units = {"TFLOP/s": 1e12, "GFLOP/s": 1e9}
    matrix = ", ".join(f"{name} {scaled(rate, units)}" for name, rate in rates["matrix"].items())
    copy = scaled(rates["copy"], {"TB/s": 1e12, "GB/s": 1e9})
    return ["", f"Ceilings, measured in the same run: copy {copy}, read and written; products {matrix}."]


def table(results: Results) -> str:
    """Markdown: all there is to tell."""
    parts = [races, training, memory, costs, errors, growth, ceilings]
    return "\n".join([*(line for part in parts for line in part(results)), "", results.footer()])


def insert(readme: str, word: str, text: str) -> str:
    """`readme` with `text` between the markers of `word`.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    between = re.compile(rf"(<!-- bench:{re.escape(word)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    replaced, count = between.subn(lambda match: f"{match[1]}{text}\n{match[2]}", readme)
    if count != 1:
        raise ValueError(f"wanted one pair of markers <!-- bench:{word} --> ... <!-- /bench -->, found {count}")
    return replaced


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and pictures from the benchmarks' JSON.")
    parser.add_argument("json", type=Path, nargs="+", help="a file, or a folder of files that make one report")
    parser.add_argument("--readme", type=Path, help="put the tables between the markers of this file")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder of the pictures")
    options = parser.parse_args(arguments)
    for path in options.json:
        try:
            results = read(path)
            text = summary(results)
            if options.readme:
                options.readme.write_text(insert(options.readme.read_text(), results.word, text))
            else:
                print(text)
            beside = path / f"{results.word}.md" if path.is_dir() else path.with_suffix(".md")
            beside.write_text(table(results) + "\n")
        except (OSError, ValueError) as error:
            print(f"report.py: {error}", file=sys.stderr)
            return 1
        plots.draw(results, options.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())

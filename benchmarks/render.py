"""Write the tables with figures in README.md and docs/ from the committed results: nobody types a figure.

python -m benchmarks.render           rewrites what stands between <!-- table: NAME --> and <!-- /table -->
python -m benchmarks.render --check   exits with 1 where a file is stale

Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import ledger
from .aot import Compiled
from .promises import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
_BENCH_NOTE = (
    "Medians of interleaved rounds; times faster and times less memory are against the better of the dense rows."
)
_TABLE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check every document; 1 if a check finds a stale one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a file is stale")
    check = parser.parse_args(argv).check
    stale = False
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if not document.exists():
            continue
        old = document.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            stale = True
            print(f"{document.relative_to(ROOT)}: {'stale, run python -m benchmarks.render' if check else 'rewritten'}")
            if not check:
                document.write_text(new, encoding="utf-8")
    return 1 if check and stale else 0


def rendered(text: str) -> str:
    """The text with every table between markers made anew.

    Raises:
        ValueError: a marker that names no table, or has no end.
    """
    if text.count("<!-- table:") != len(_TABLE.findall(text)):
        raise ValueError("got a table marker without an end; expected <!-- table: NAME --> ... <!-- /table -->.")
    return _TABLE.sub(lambda match: f"{match[1]}{table(match['name'])}\n{match[3]}", text)


def table(name: str) -> str:
    """One table as Markdown, with the line that says where and how it was measured.

    Raises:
        ValueError: no table has that name.
        FileNotFoundError: its results are not there.
    """
    if name not in TABLES:
        raise ValueError(f"got the table {name!r}; expected one of {', '.join(TABLES)}. Mend the marker.")
    file, render = TABLES[name]
    if file is None:
        return render({})
    results = ROOT / "benchmarks" / "results" / file
    if not results.exists():
        raise FileNotFoundError(
            f"got no benchmarks/results/{file}; expected the results of table {name!r}. Measure them first: "
            "benchmarks/README.md says how."
        )
    return render(json.loads(results.read_text(encoding="utf-8")))


def bench(result: dict[str, Any]) -> str:
    """What ``fastcl bench --json`` wrote."""
    rows = []
    for row in result["rows"]:
        if row["skipped"]:
            rows.append([f"{row['rows']:,}", row["contender"], f"skipped: {row['skipped']}", "", "", ""])
            continue
        faster, less = ("" if r is None else f"{r:.1f} x" for r in (row["times_faster"], row["times_less_memory"]))
        milliseconds, megabytes = _digits(row["median_seconds"] * 1e3), _digits(row["peak_bytes"] / 1e6)
        rows.append([f"{row['rows']:,}", row["contender"], milliseconds, megabytes, faster, less])
    head = ["N", "implementation", "ms, forward + backward", "peak MB", "times faster", "times less memory"]
    return f"{markdown(head, rows)}\n\n{_measured(result)} {_BENCH_NOTE}"


def native(result: dict[str, Any]) -> str:
    """What ``benchmarks/cpu.py`` wrote, the rows of one thread."""
    names = {"nt_xent": "NT-Xent", "clip": "CLIP", "moco": "MoCo, queue of 65,536", "supcon": "SupCon"}
    rows = [
        [
            names[row["loss"]],
            f"{row['rows']:,} x {row['dim']}",
            row["contender"],
            _digits(row["median_seconds"] * 1e3),
            _digits(row["peak_bytes"] / 1e6),
            "" if row["contender"] == "eager" else f"{row['times_faster'].get('eager', 1):.1f} x",
            f"{row['of_sgemm']:.0%}" if row["contender"].startswith("native") else "",
        ]
        for row in result["rows"]
        if row["threads"] == 1
    ]
    head = ["loss", "N x D", "implementation", "ms", "peak MB", "against eager", "of the sgemm rate"]
    machine, peers = result["machine"], {k: v for k, v in result["peers"].items() if v}
    at = (
        f"`{result['command']}` on {machine['device']} ({machine['instructions']}), torch {result['versions']['torch']}"
    )
    others = ", ".join(f"{name} {version}" for name, version in peers.items())
    return (
        f"{markdown(head, rows)}\n\n{at}, {others}, {result['date']}, commit {result['commit']}. Medians of "
        "interleaved rounds; the last column is the least arithmetic the loss can do over the time, against torch's "
        "fp32 matrix product (bf16 too)."
    )


def family(result: dict[str, Any]) -> str:
    """What ``benchmarks/family.py`` wrote: a line per loss, time by size, memory at the largest, and its growth."""
    losses: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        losses.setdefault(row["loss"], {})[row["size"]] = row
    sizes = sorted({row["size"] for row in result["rows"]})
    before, last = sizes[-2:]
    ours, kept_none = "fastcl", "fastcl, nothing kept"

    def growth(row: dict[int, dict[str, Any]], contender: str) -> str:
        peaks = [row[size]["peak_bytes"].get(contender) for size in (before, last)]
        return f"{peaks[1] / peaks[0]:.1f} x" if all(peaks) else ""

    def figure(of: dict[str, float], contender: str, unit: float) -> str:
        return _digits(of[contender] * unit) if contender in of else ""

    rows, notes = [], []
    for loss, row in losses.items():
        notes += [f"{name} `{loss}` at {last:,} rows {reason}" for name, reason in row[last]["skipped"].items()]
        times = [row[size]["times_faster"] for size in sizes]
        rows.append(
            [
                f"`{loss}`",
                *("" if t is None else f"{t:.2f} x" for t in times),
                *(figure(row[before]["median_seconds"], name, 1e3) for name in ("dense", ours)),
                *(figure(row[last]["peak_bytes"], name, 1e-6) for name in ("dense", ours, kept_none)),
                growth(row, "dense"),
                growth(row, kept_none),
            ]
        )
    head = [
        "row of `CASES`",
        *(f"times faster at {size:,}" for size in sizes),
        *(f"ms at {before:,}: {name}" for name in ("dense", ours)),
        *(f"MB at {last:,}: {name}" for name in ("dense", ours, "nothing kept")),
        "growth, dense",
        "growth, nothing kept",
    ]
    skipped = f" Skipped: {'; '.join(notes)}." if notes else ""
    for update in result.get("updates", []):
        skipped += f" Measured again at commit {update['commit']}: `{update['command'].rpartition(' ')[2]}`."
    return (
        f"{markdown(head, rows)}\n\n{_measured(result)} Medians of interleaved rounds; a ratio is the median "
        f"of those of each round.{skipped}"
    )


def digits(result: dict[str, Any]) -> str:
    """What ``benchmarks/digits.py`` wrote: probes of raw pixels, of random and of trained encoders.

    Raw pixels and the random encoder of a seed do not depend on the method, so they are shown once.
    """
    probes: dict[tuple[str, str], dict[str, Any]] = {}
    for run in result["rows"]:
        probes.setdefault(("raw pixels", ""), run["probe"]["raw"])
        probes.setdefault(("random encoder", str(run["seed"])), run["probe"]["random"])
    for run in result["rows"]:
        probes[f"{run['method']}, {run['steps']} steps", str(run["seed"])] = run["probe"]["trained"]
    for run in (result["control"], *result["more_controls"]):
        probes[f"{run['method']}, control: {run['control']}", str(run["seed"])] = run["probe"]["trained"]
    rows = [
        [what, seed, _spread(probe["few10"]), _spread(probe["few1"]), f"{probe['linear']:.1f}", f"{probe['knn']:.1f}"]
        for (what, seed), probe in probes.items()
    ]
    head = ["features", "seed", "10 labels per class", "1 label per class", "all labels", "kNN"]
    checks = result["checks"].values()
    note = (
        "Accuracy in percent; the spread is over draws of the labels. "
        f"{sum(checks)} of the {len(checks)} requirements in `benchmarks/digits.py` hold."
    )
    return f"{markdown(head, rows)}\n\n{_measured(result)} {note}"


def loss_share(result: dict[str, Any]) -> str:
    """What ``benchmarks/digits.py`` wrote of the loss itself: its share of a step, over seeds, and its peak memory."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in result["rows"]:
        runs.setdefault(run["method"], []).append(run)
    rows = []
    for method, of in runs.items():
        shares = [run["loss_share"] for run in of]
        peaks = ([run["loss_peak_bytes"][name] for run in of] for name in ("dense", "fastcl"))
        megabytes = (_digits(sum(peak) / len(peak) / 1e6) for peak in peaks)
        rows.append([f"`{method}`", f"{min(shares):.1%} to {max(shares):.1%}", *megabytes])
    head = ["method", "share of a step", "peak MB of the loss, dense", "fastcl"]
    return f"{markdown(head, rows)}\n\n{_measured(result)} {result['rows'][0]['loss_peak_images']} images per step."


def fashion_mnist(result: dict[str, Any]) -> str:
    """What ``benchmarks/fashion_mnist.py`` wrote: probes of one run, and how two losses train alike."""
    run, gentle, own = result["run"], result["gentle"], result["own"]
    names = {"raw": "raw pixels", "random": "random encoder", "trained": f"{run['method']}, {run['steps']} steps"}
    rows = [
        [name, _spread(probe["few10"]), _spread(probe["few1"]), f"{probe['linear']:.1f}", f"{probe['knn']:.1f}"]
        for name, probe in ((name, run["probe"][key]) for key, name in names.items())
    ]
    head = ["features", "10 labels per class", "1 label per class", "all labels", "kNN"]
    megabytes = {name: _digits(value / 1e6) for name, value in run["loss_peak_bytes"].items()}
    checks = result["checks"].values()
    note = (
        f"The run took {run['seconds'] / 60:.1f} minutes. Losses of {gentle['steps']} steps from one seed, fused and "
        f"dense, differ by at most {gentle['fused, dense']:.0e} at a learning rate of "
        f"{gentle['settings']['learning_rate']:.0e}; at the run's by {own['fused, dense']:.0e}, where two dense losses "
        f"that are rounded differently do by {own['dense, swapped']:.0e}. The loss of {run['loss_peak_images']} images "
        f"takes {megabytes['fastcl']} MB fused and {megabytes['dense']} MB dense. {sum(checks)} of the {len(checks)} "
        "requirements in `benchmarks/fashion_mnist.py` hold."
    )
    return f"{markdown(head, rows)}\n\n{_measured(result)} {note}"


def aot(result: dict[str, Any]) -> str:
    """What ``benchmarks/aot.py`` wrote: a line per architecture, dtype and language."""
    groups: dict[tuple[int, str, bool], list[Compiled]] = {}
    for row in (Compiled(**fields) for fields in result["rows"]):
        groups.setdefault((row.arch, row.dtype, row.is_cuda), []).append(row)
    rows = [
        [
            f"sm_{arch}, CUDA C++" if is_cuda else f"sm_{arch}",
            dtype,
            str(len(group)),
            str(max(row.registers for row in group)),
            str(max(row.stack_bytes for row in group)),
            f"{max(row.shared_bytes for row in group) / 1024:.0f} of {group[0].shared_limit // 1024}",
            ", ".join(sorted({family for row in group for family in row.matrix})) or "fp32 units",
            str(min((row.wide_loads for row in group if row.aligned and row.multiplies), default="")),
            f"{max(row.instructions for row in group):,}",
        ]
        for (arch, dtype, is_cuda), group in groups.items()
    ]
    rows += [
        [f"sm_{failure['arch']}", failure["dtype"], f"not compiled: {failure['reason']}", *[""] * 6]
        for failure in result["not_compiled"]
    ]
    head = ["GPU", "rows", "kernels", "registers", "bytes spilled", "KiB shared", "products", "wide loads"]
    head.append("instructions")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{markdown(head, rows)}\n\n`{result['command']}`, {versions}, "
        f"{result['date']}, commit {result['commit']}. The largest of the kernels of a line; of wide loads (16 bytes "
        "per thread, or a bulk copy) the fewest in a kernel that multiplies, where D is a multiple of 8."
    )


def predicted(result: dict[str, Any]) -> str:
    """What ``benchmarks/predict.py`` wrote: a line per shape, in microseconds."""

    def micro(row: dict[str, Any], name: str) -> str:
        return f"{row[f'{name}_seconds'] * 1e6:,.0f}"

    rows = [
        [
            f"{row['rows']:,} x {row['dim']:,}",
            micro(row, "bound"),
            f"{micro(row, 'low')} to {micro(row, 'high')}",
            micro(row, "goal"),
            ", ".join(f"{k['name']} {k['low'] * 1e6:,.0f} ({k['limit']})" for k in row["kernels"]),
        ]
        for row in result["rows"]
    ]
    head = ["N x D", "bound, us", "predicted, us", "goal, us", "launches, low, and what limits"]
    return (
        f"{markdown(head, rows)}\n\nPredictions for {result['gpu']}, **not measured**: `{result['command']}`, "
        f"{result['date']}, commit {result['commit']}."
    )


def examples(result: dict[str, Any]) -> str:
    """What ``benchmarks/examples.py`` wrote: a line per figure, a column per seed."""
    rows = []
    for run in result["rows"]:
        name = ", ".join([run["example"], *(f"{key}={value}" for key, value in run["settings"].items())])
        for i, figure in enumerate(run["figures"][0]):
            first = [name, f"{run['cpu_seconds']:.1f}"] if not i else ["", ""]
            rows.append([*first, f"`{figure}`", *(_digits(figures[figure]) for figures in run["figures"])])
    head = ["example", "CPU s", "figure", *(f"seed {seed}" for seed in result["seeds"])]
    note = "Figures of detection are losses, `scale` is a factor, all others are shares; CPU seconds are of one run."
    return f"{markdown(head, rows)}\n\n{_measured(result)} {note}"


def dropins(result: dict[str, Any]) -> str:
    """What ``benchmarks/dropins`` wrote: a line per case; memory at the largest size that the original was run at."""
    rows = []
    for row in result["rows"]:
        sizes = {size["size"]: size for size in row["sizes"]}
        both = [size for size in sizes.values() if "original" in size["peak_bytes"]]
        times = [sizes.get(n, {}).get("times_faster") for n in (512, 2048, 8192)]
        others = [size for size in both if size["size"] not in (512, 2048, 8192)]
        at = both[-1]["size"]
        rows.append([
            row["library"],
            row["label"] if row["fused"] else f"{row['label']} (not fused)",
            *("" if t is None else f"{t:.2f} x" for t in times),
            ", ".join(f"{size['times_faster']:.1f} x at {size['size']:,}" for size in others),
            f"{at:,}",
            *(_digits(both[-1]["peak_bytes"][name] / 1e6) for name in ("original", "fastcl")),
            f"{max(row['apart'].values()):.0e}",
        ])  # fmt: skip
    head = ["library", "case", "faster at 512", "at 2,048", "at 8,192", "at other sizes", "memory at"]
    head += ["MB, original", "MB, ours", "apart"]
    note = "".join(f" Measured again at commit {u['commit']}: `{u['command']}`." for u in result.get("updates", []))
    found = "; ".join(result["findings"]) or "none"
    return f"{markdown(head, rows)}\n\n{_measured(result)}{note} What refutes a claim: {found}."


def peers(result: dict[str, Any]) -> str:
    """What ``fastcl bench --peers`` wrote: a line per loss and contender, at the largest batch that eager managed."""
    settings = result["settings"]
    dtype, budget = settings["dtype"], settings["memory_mb"]
    last = {row["loss"]: row["rows"] for row in result["rows"] if row["contender"] == "eager" and not row["skipped"]}
    errors = {
        (row["loss"], row["contender"], row["batch"], row["temperature"]): row["gradient_error"]
        for row in result["errors"]
        if row["dtype"] == dtype
    }
    largest = {(row["loss"], row["contender"]): row for row in result["largest"]}
    shown = [("easy", 0.07), ("easy", 0.01), ("hard", 0.01)]
    rows = []
    for row in result["rows"]:
        if row["rows"] != last.get(row["loss"], row["rows"]):
            continue
        key = (row["loss"], row["contender"])
        cells = [f"skipped: {row['skipped']}", "", ""]
        if not row["skipped"]:
            cells = [_digits(row["median_seconds"] * 1e3), "", _digits(row["peak_bytes"] / 1e6)]
            cells[1] = "" if row["of_eager"] is None else f"{row['of_eager']:.2f} x"
        far = [errors.get((*key, *at), "") for at in shown]
        most = largest.get(key, {"rows": "", "limited_by": "memory"})
        more = {"memory": "", "time": " or more", "size": " or more"}.get(
            most["limited_by"], f" ({most['limited_by']})"
        )
        batch = "none" if most["rows"] is None else f"{most['rows']:,}{more}" if most["rows"] else ""
        cells += ["not finite" if e is None else e and f"{e:.0e}" for e in far]
        rows.append([row["loss"], f"{row['rows']:,}", row["contender"], *cells, *([batch] if budget else [])])
    head = ["loss", "N", "contender", "ms", "time of eager", "peak MB"]
    head += [f"gradient error, {batch}, tau {tau:g}" for batch, tau in shown]
    head += [f"largest batch in {budget:g} MB"] if budget else []
    versions = ", ".join(f"{name} {version}" for name, version in result["peers"].items() if version)
    absent = "; ".join(f"{name} ({reason})" for name, reason in result["missing"].items())
    return (
        f"{markdown(head, rows)}\n\n{_measured(result)} D = {settings['dim']}, {dtype}; {versions}."
        f"{f' Not here: {absent}.' if absent else ''}"
    )


def gradients(result: dict[str, Any]) -> str:
    """What ``benchmarks/ranks.py`` wrote of gradients: their factors against those of one process."""

    def factor(of: dict[str, float]) -> str:
        rest = f", and {of['rest']:.0%} that no factor explains" if of["rest"] > 0.01 else ""
        return f"{of['factor']:.3f}{rest}"

    rows = [
        [f"`{row['loss']}`", row["contender"], *(factor(row["gradients"][name]) for name in ("weight", "scale"))]
        for row in result["rows"]
    ]
    head = ["loss", "over ranks", "gradient of the encoder, times", "gradient of the scale, times"]
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items() if version[0].isdigit())
    return f"{markdown(head, rows)}\n\n{_measured(result)} {result['machine']['ranks']} ranks; {peers}."


def ranks(result: dict[str, Any]) -> str:
    """What ``benchmarks/ranks.py`` wrote of time, memory and bytes."""
    rows = [
        [
            f"`{row['loss']}`",
            row["contender"],
            _digits(row["median_seconds"] * 1e3),
            _digits(row["peak_bytes"] / 1e6),
            "" if row["sent_bytes"] is None else f"{row['sent_bytes'] / 1e6:.2f}",
        ]
        for row in result["rows"]
        if "median_seconds" in row
    ]
    head = ["loss", "over ranks", "ms, slowest rank", "peak MB", "MB sent"]
    return f"{markdown(head, rows)}\n\n{_measured(result)} {result['machine']['ranks']} ranks of one machine."


def grad_cache(result: dict[str, Any]) -> str:
    """What ``benchmarks/grad_cache.py`` wrote."""
    rows = [
        [
            row["encoder"],
            f"{row['rows']:,}",
            row["contender"],
            _digits(row["median_seconds"] * 1e3),
            f"{row['of_plain']:.2f} x",
            _digits(row["peak_bytes"] / 1e6),
            f"{row['apart']:.0e}",
        ]
        for row in result["rows"]
    ]
    head = ["encoder", "rows", "step", "ms", "of the plain step", "peak MB", "gradient apart"]
    return f"{markdown(head, rows)}\n\n{_measured(result)} Chunks of {result['chunk']} rows."


def scaling(result: dict[str, Any]) -> str:
    """What ``benchmarks/scaling.py`` wrote: a line per loss, rows and ranks, both strategies beside each other."""
    cells: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in result["rows"]:
        cells.setdefault((row["loss"], row["rows"], row["ranks"]), {})[row["strategy"]] = row
    rows = []
    for (loss, n, count), by in cells.items():
        pair = [by["gather"], by["ring"]]
        times = [f"{_digits(row['seconds'] * 1e3)} ({row['exposed_seconds'] / row['seconds']:.0%})" for row in pair]
        faster = min(pair, key=lambda row: row["seconds"])["strategy"]
        sent = (f"{row['sent_bytes'] / 1e6:,.0f}" for row in pair)
        stored = (f"{row['stored_bytes'] / 1e9:.2f}" for row in pair)
        rows.append([f"`{loss}`", f"{n:,}", f"{count:,}", *times, *sent, *stored, faster])
    head = ["loss", "rows", "ranks", "gather, ms (waiting)", "ring, ms (waiting)", "gather, MB sent", "ring, MB sent"]
    head += ["gather, GB held", "ring, GB held", "faster"]
    return f"{markdown(head, rows)}\n\nOn paper, **not measured**: `{result['command']}`, {result['date']}."


def mutants(result: dict[str, Any]) -> str:
    """What ``benchmarks/mutants.py`` wrote: a line per mutant, with the test that noticed it."""
    rows = [
        [row["part"], f"`{row['file']}`", row["what"], row["outcome"], f"`{row['test'].partition('[')[0]}`"]
        for row in result["rows"]
    ]
    killed = sum(row["outcome"] == "killed" for row in result["rows"])
    head = ["part", "file", "what is wrong", "outcome", "by"]
    return f"{markdown(head, rows)}\n\n{_measured(result)} {killed} of {len(rows)} mutants were killed."


def verified(_: dict[str, Any]) -> str:
    """What ``benchmarks/ledger.py`` finds in all results."""
    return markdown(["kernel", "state"], [[f"`{row['kernel']}`", ledger.sentence(row)] for row in ledger.status(ROOT)])


def promises(result: dict[str, Any], section: str) -> str:
    """What ``benchmarks/scoreboard.py`` wrote, the promises of one section."""
    known = {row["row"]: row for row in result["rows"]}
    rows = []
    for promise in SECTIONS[section]:
        row = known.get(promise.row, {"outcome": "not run", "figure": ""})
        figure = row["figure"] if row["outcome"] == "pass" else f"**{row['outcome']}**: {row['figure']}"
        if errors := {b: e for b, e in row.get("largest_error_by_bound", {}).items() if float(b) > 0}:
            bound = max(errors, key=lambda bound: errors[bound] / float(bound))
            figure += f"; nearest to a bound: {errors[bound]:.1e} of {bound}"
        by = [*promise.tests, *filter(None, [promise.command, promise.record and row.get("command")])]
        rows.append([promise.row, promise.text, promise.proof, figure, ", ".join(f"`{words}`" for words in by)])
    return markdown(["", "promise", "how it is proved", "figure", "by"], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; figures stand right."""
    align = ["---:" if all(not row[i] or row[i][0].isdigit() for row in rows) else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, align, *rows))


def _measured(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    at = f", commit {result['commit']}" if result["commit"] else ""
    return f"`{result['command']}` on {machine['device']}, {threads}, torch {versions['torch']}, {result['date']}{at}."


def _digits(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _spread(value: dict[str, float]) -> str:
    return f"{value['mean']:.1f} ± {value['std']:.1f}"


TABLES: dict[str, tuple[str | None, Callable[[dict[str, Any]], str]]] = {
    "bench-nt_xent-cpu": ("nt_xent-cpu.json", bench),
    "family-cpu": ("family-cpu.json", family),
    "digits": ("digits.json", digits),
    "digits-loss": ("digits.json", loss_share),
    "fashion-mnist": ("fashion_mnist.json", fashion_mnist),
    "native-cpu": ("native-cpu.json", native),
    "examples": ("examples.json", examples),
    "aot": ("aot.json", aot),
    "predicted": ("predicted-h200.json", predicted),
    "dropins-cpu": ("dropins-cpu.json", dropins),
    "peers-cpu": ("peers-cpu.json", peers),
    "gradients-of-ranks": ("ranks-cpu.json", gradients),
    "ranks-cpu": ("ranks-cpu.json", ranks),
    "grad_cache-cpu": ("grad_cache-cpu.json", grad_cache),
    "scaling": ("scaling.json", scaling),
    "mutants": ("mutants.json", mutants),
    "ledger": (None, verified),
    **{f"promises-{name}": ("scoreboard.json", partial(promises, section=name)) for name in SECTIONS},
}

if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.render: {error}")  # exit code 1

"""Run the benchmarks that need nothing but this machine, and print one table.

    python tests/benchmarks/bench.py            the short form: at most 10 minutes, keeps nothing
    python tests/benchmarks/bench.py --full     all of them; results are kept, and drawn on a page
    python tests/benchmarks/bench.py --page     only draw the page, from the results that are kept
    python tests/benchmarks/bench.py --only serve_speed train_speed

Each benchmark is a script of its own, whose first lines say what it measures. A script that fails
does not stop the others; then the exit status is 1.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import DIRECTORY, read_results

HERE = Path(__file__).parent
PAGE = DIRECTORY / "RESULTS.md"
TIMEOUT_SECONDS = 6 * 3600
NAMES = ("case", "recipe", "network", "scenario", "data", "utilization")
"""Fields that name what a line is about; the first one of them that it has."""


@dataclass(frozen=True)
class Benchmark:
    """A script, its short and its full form, and the figures of its lines that the table shows."""

    script: str
    short: tuple[str, ...]
    full: tuple[str, ...]
    figures: tuple[str, ...]

    def arguments(self, is_full: bool) -> tuple[str, ...]:
        return self.full if is_full else self.short


BENCHMARKS = (
    Benchmark(
        "serve_speed",
        ("small-int8", "tiny", "--rounds", "1", "--seconds", "2"),
        ("small-int8", "small-fp32", "large-fp32", "large-int8", "tiny", "--keep"),
        ("service", "litserve", "fastapi", "mlserver", "ray", "bentoml", "of_limit", "p99_ms"),
    ),
    Benchmark(
        "serve_curves",
        ("--rounds", "1", "--seconds", "1", "--clients", "1", "16", "--loads", "0.6"),
        ("--keep",),
        ("rate", "p50_ms", "p99_ms", "failed_share"),
    ),
    Benchmark(
        "serve_cost",
        ("--seconds", "1"),
        ("--keep",),
        ("api_us", "idle_cores", "one_client", "memory_mb", "checks_rate", "ready_s"),
    ),
    Benchmark(
        "predict_speed",
        ("small", "--rounds", "1", "--seconds", "1", "--images", "500"),
        ("--keep",),
        ("predict", "service", "ratio"),
    ),
    Benchmark(
        "serve_overload",
        ("--rounds", "1", "--seconds", "2"),
        ("--keep",),
        ("offered", "goodput", "refusal_cpu_us"),
    ),
    Benchmark(
        "serve_trust",
        ("small-int8", "--rounds", "1", "--seconds", "1", "--modes", "on"),
        ("--keep",),
        ("rate_on", "p99_on", "rate_shadow", "swap_p99"),
    ),
    Benchmark(
        "serve_keep",
        ("--rounds", "2", "--seconds", "2"),
        ("--keep",),
        ("rate", "p99", "cpu"),
    ),
    Benchmark(
        "capacity_plan",
        ("measure", "--seconds", "1"),
        ("measure", "--keep"),
        ("capacity",),
    ),
    Benchmark(
        "train_speed",
        ("--case", "lenet", "--epochs", "2", "--images", "2000"),
        ("--keep",),
        ("fit_images_per_s", "bare_images_per_s", "ratio", "cpu_ratio", "peak_memory_mb"),
    ),
    Benchmark(
        "train_recipes",
        ("digits", "--seeds", "1"),
        ("digits", "--seeds", "5", "--keep"),
        ("accuracy", "mean_accuracy", "seconds", "cpu_seconds"),
    ),
    Benchmark(
        "bundle_export",
        ("--networks", "convnet"),
        ("--keep",),
        ("export_seconds", "quantize_seconds", "int8_over_fp32"),
    ),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    script: str
    name: str
    figures: dict[str, float]


def run_benchmark(benchmark: Benchmark, is_full: bool) -> tuple[list[Row], bool]:
    """Run a script; return its rows, and whether it succeeded."""
    arguments = benchmark.arguments(is_full)
    command = [sys.executable, str(HERE / f"{benchmark.script}.py"), *arguments]
    print(f"== {benchmark.script} {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    print(f"   {time.monotonic() - started:.0f} s", flush=True)
    if done.returncode != 0:
        print(f"   failed with status {done.returncode}; the lines above say why", flush=True)
    return parse_rows(benchmark, done.stdout), done.returncode == 0


def parse_rows(benchmark: Benchmark, output: str) -> list[Row]:
    """The rows of the JSON lines that a script printed."""
    rows: list[Row] = []
    for line in output.splitlines():
        if line.startswith("{"):
            rows.append(build_row(benchmark, json.loads(line)))
    return [row for row in rows if row.figures]


def build_row(benchmark: Benchmark, entry: dict[str, Any]) -> Row:
    name = next((str(entry[key]) for key in NAMES if key in entry), "")
    for part in ("server", "clients", "load"):
        if part in entry:
            name = f"{name} {part} {entry[part]}"
    if "variant" in entry:
        name = f"{name}-{entry['variant']}"
    figures: dict[str, float] = {}
    for figure in benchmark.figures:
        if isinstance(entry.get(figure), int | float):
            figures[figure] = entry[figure]
    return Row(benchmark.script, name, figures)


def format_table(rows: list[Row]) -> str:
    """One line a row, as Markdown."""
    lines = ["| benchmark | case | figures |", "| --- | --- | --- |"]
    for row in rows:
        figures = ", ".join(f"{name} {value:g}" for name, value in row.figures.items())
        lines.append(f"| {row.script} | {row.name} | {figures} |")
    return "\n".join(lines)


def write_page(page: Path) -> None:
    """Write the page with all results that are kept, and a plot for each script."""
    sections: list[str] = []
    for benchmark in BENCHMARKS:
        entries = read_results(benchmark.script)
        if entries:
            sections.append(build_section(page, benchmark, entries))
    head = (
        "# Results\n\nWritten by `python tests/benchmarks/bench.py --page` from the JSON files in "
        "this folder.\n[README](README.md) says what each figure means, and the command that "
        "gives it.\n"
    )
    page.write_text("\n".join([head, *sections]))


def build_section(page: Path, benchmark: Benchmark, entries: list[dict[str, Any]]) -> str:
    rows: list[Row] = []
    lines = ["| case | figures | date | machine |", "| --- | --- | --- | --- |"]
    for entry in entries:
        row = build_row(benchmark, entry)
        rows.append(row)
        figures = ", ".join(f"{name} {value:g}" for name, value in row.figures.items())
        date = entry.get("date", "")
        lines.append(f"| {row.name} | {figures} | {date} | {describe(entry)} |")
    plot = draw_rows(page.parent / "plots", benchmark, rows)
    table = "\n".join(lines)
    return f"## {benchmark.script}\n\n{table}\n\n![{benchmark.script}](plots/{plot})\n"


def describe(entry: dict[str, Any]) -> str:
    """The machine of a result; those of earlier formats name a device only."""
    machine = entry.get("machine")
    if machine is None:
        return entry.get("device", "")
    return f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']} before"


def draw_rows(folder: Path, benchmark: Benchmark, rows: list[Row]) -> str:
    """Draw one panel of bars for each figure; return the name of the file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "imago"  # the same bytes for the same plot
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    names = [name for name in benchmark.figures if any(name in row.figures for row in rows)]
    size = (2.4 * len(names) + 1, 0.4 * len(rows) + 1)
    figure, panels = plt.subplots(
        1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels[0], names, strict=True):
        labels = [f"{number}: {row.name}" for number, row in enumerate(rows, 1)]
        panel.barh(labels, [row.figures.get(name, 0.0) for row in rows])
        panel.set_title(name, fontsize=9)
    panels[0][0].invert_yaxis()  # the first row on top

    folder.mkdir(exist_ok=True)
    file = folder / f"{benchmark.script}.svg"
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all of it, and keep the results")
    parser.add_argument("--page", action="store_true", help="only draw the page")
    parser.add_argument(
        "--only", nargs="+", choices=[each.script for each in BENCHMARKS], help="of the scripts"
    )
    options = parser.parse_args()

    has_failed = False
    if not options.page:
        rows: list[Row] = []
        for benchmark in BENCHMARKS:
            if options.only and benchmark.script not in options.only:
                continue
            measured, succeeded = run_benchmark(benchmark, options.full)
            rows += measured
            has_failed |= not succeeded
        print(f"\n{format_table(rows)}")
    if options.page or options.full:
        write_page(PAGE)
        print(f"\n{PAGE}")
    sys.exit(1 if has_failed else 0)


if __name__ == "__main__":
    main()

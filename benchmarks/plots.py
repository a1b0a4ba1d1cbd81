"""Draws what the benchmarks have written: a PNG beside each JSON file that it knows. Needs matplotlib.

python benchmarks/plots.py DIRECTORY
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt


def grids(rows):
    """Grid A: speed over the size of a page, one line a method."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, op in zip(axes, ("load", "store"), strict=True):
        of_op = [row for row in rows if row["grid"] == "A" and row["op"] == op]
        sizes = [int(row["shape"].split()[0]) for row in of_op]
        axis.plot(sizes, [row["roof"] for row in of_op], "k--", label="roof: one contiguous copy")
        for method, style in (
            ("host_ids", "o-"),
            ("kernel", "s-"),
            ("records", "^:"),
            ("slabs", "v:"),
            ("plain JAX", "x:"),
        ):
            label = f"jax_kvpool, {method}" if method in ("host_ids", "kernel") else method
            axis.plot(sizes, [row[method] for row in of_op], style, label=label)
        axis.set(xscale="log", xlabel="KiB a page", title=f"{op}, GB/s", ylim=(0, None))
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def interference(rows):
    """A step with both, beside the model alone, the copy alone, and both one after the other."""
    labels = [f"{row['model']}\n{row['layout']}\n{row['op']}, {row['ids']}" for row in rows]
    figure, axis = plt.subplots(figsize=(max(9, 0.75 * len(rows)), 4.8))
    at = np.arange(len(rows))
    model, copy, beside = (np.array([row[k] for row in rows]) for k in ("model ms", "copy ms", "overlapped ms"))
    axis.bar(at - 0.2, model, 0.36, label="model alone", color="tab:blue")
    axis.bar(at - 0.2, copy, 0.36, bottom=model, label="copy alone", color="tab:orange")
    axis.bar(at + 0.2, beside, 0.36, label="run_layers", color="tab:green")
    for x, value, row in zip(at, beside, rows, strict=True):
        axis.text(x + 0.2, value, f"{row['of max']:.2f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(at, labels, fontsize=7)
    axis.set(ylabel="ms a step", title="above the bars: of the longer of the two alone")
    axis.legend()
    return figure


def first_token(rows):
    """Time to the first token over the length of the cached prefix."""
    ways = {
        "recompute": "x:",
        "load_then_prefill": "s-",
        "overlapped": "o-",
        "load_alone": "--",
        "prefill_alone": "-.",
    }
    news = sorted({row["new"] for row in rows})
    figure, axes = plt.subplots(1, len(news), figsize=(5.5 * len(news), 4.2), sharey=True, squeeze=False)
    for axis, new in zip(axes[0], news, strict=True):
        of_new = [row for row in rows if row["new"] == new]
        cached = [row["cached"] for row in of_new]
        for way, style in ways.items():
            axis.plot(cached, [row[f"{way} ms"] for row in of_new], style, label=way.replace("_", " "))
        axis.set(xscale="log", yscale="log", xlabel="cached tokens", title=f"{new} new tokens, ms to the first token")
        axis.set_xticks(cached, [str(c) for c in cached])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    return figure


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("directory", type=Path)
    directory = arguments.parse_args().directory
    for draw in (grids, interference, first_token):
        path = directory / f"{draw.__name__}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        figure = draw(content["rows"])
        figure.suptitle(", ".join(f"{k} {v}" for k, v in content["machine"].items()), fontsize=9)
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=110)
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()

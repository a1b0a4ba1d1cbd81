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
    """GB/s of the copy engine and the kernel of ours, beside the best of the others and the roof."""
    stored = {row["shape"] for row in rows if row["op"] == "store"}
    rows = [row for row in rows if row["op"] in ("load", "store") and row["shape"] in stored]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.42 * len(rows) / 2 + 2), sharey=True)
    for axis, op in zip(axes, ("load", "store"), strict=True):
        of_op = [row for row in rows if row["op"] == op]
        at = np.arange(len(of_op))
        others = [max(row[m] for m in ("slabs", "records", "plain JAX") if row[m] == row[m]) for row in of_op]
        for i, (label, values) in enumerate(
            {
                "jax_kvpool, host_ids": [row["host_ids"] for row in of_op],
                "jax_kvpool, kernel": [row["kernel"] for row in of_op],
                "the best other way": others,
            }.items()
        ):
            axis.barh(at + 0.27 * (i - 1), values, 0.27, label=label)
        axis.plot([row["roof"] for row in of_op], at, "k|", markersize=14, label="roof: one contiguous copy")
        axis.set_yticks(at, [f"{row['grid']}: {row['shape']}" for row in of_op])
        axis.set(xlabel="GB/s", title=op)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    return figure


def interference(rows):
    """A step with both, beside the model alone, the copy alone, and both one after the other."""
    labels = [f"{row['model']}, {row['layout']}, {row['op']}, {row['ids']}" for row in rows]
    figure, axis = plt.subplots(figsize=(max(8, 0.5 * len(rows)), 5.5))
    at = np.arange(len(rows))
    model, copy, beside = (np.array([row[k] for row in rows]) for k in ("model ms", "copy ms", "overlapped ms"))
    axis.bar(at - 0.2, model, 0.36, label="model alone", color="tab:blue")
    axis.bar(at - 0.2, copy, 0.36, bottom=model, label="copy alone", color="tab:orange")
    axis.bar(at + 0.2, beside, 0.36, label="run_layers", color="tab:green")
    for x, value, row in zip(at, beside, rows, strict=True):
        axis.text(x + 0.2, value, f"{row['of max']:.2f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(at, labels, fontsize=8, rotation=90)
    axis.set(xlim=(-1, len(rows)), ylabel="ms a step", title="above the bars: of the longer of the two alone")
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


def stores(rows):
    """How many times as long many keys a page take as one."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
    groups = list(dict.fromkeys((row["store"], row["record KiB"]) for row in rows))
    many = list(dict.fromkeys(row["way"] for row in rows if row["keys a page"] > 1))
    at = np.arange(len(groups))
    for axis, method in zip(axes, ("put", "get", "exists"), strict=True):
        for i, way in enumerate(many):
            times = [row[f"{method} times"] for row in rows if row["way"] == way]
            bars = axis.bar(at + 0.4 * (i - 0.5), times, 0.4, label=f"{way}")
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.axhline(1, color="k", linewidth=0.8)
        axis.set_xticks(at, [f"{store}\n{kib} KiB" for store, kib in groups], fontsize=8, rotation=45)
        axis.set(yscale="log", title=f"{method}: times as long as one key a page")
    axes[0].legend(fontsize=8)
    return figure


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("directory", type=Path)
    directory = arguments.parse_args().directory
    for draw in (grids, interference, first_token, stores):
        path = directory / f"{draw.__name__}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        figure = draw(content["rows"])
        figure.suptitle(", ".join(f"{k} {v}" for k, v in content["machine"].items()), fontsize=9)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.savefig(path.with_suffix(".png"), dpi=110)
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()

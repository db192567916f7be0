"""Tables and pictures of what benchmarks measured."""

import csv
from pathlib import Path
from typing import Any


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    """A row for each line; columns in the order in which they first come."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def kd_loss(path: Path, lines: list[dict[str, Any]]) -> None:
    """Seconds and bytes of each side over tokens, a column for each vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    vocabs = sorted({line["vocab"] for line in lines})
    figure, axes = plt.subplots(
        2, len(vocabs), figsize=(4.5 * len(vocabs), 6), sharex=True, squeeze=False, layout="constrained"
    )
    for column, vocab in enumerate(vocabs):
        mine = [line for line in lines if line["vocab"] == vocab]
        for quantity, scale, axis in (("seconds", 1, axes[0][column]), ("bytes", 2**30, axes[1][column])):
            for color, side in enumerate(("products", "ours", "plain", "modelopt")):
                points = [
                    (line["tokens"], line[key] / scale)
                    for line in mine
                    if (key := f"{quantity}_{side}") in line
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", color=f"C{color}", label=side)
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        axes[0][column].set_title(f"V = {vocab:,}")
        axes[1][column].set_xlabel("tokens")
        axes[1][column].set_xticks([line["tokens"] for line in mine], [str(line["tokens"]) for line in mine])
        axes[1][column].minorticks_off()
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("GiB beyond weights, inputs,\nweight gradient")
    axes[0][0].legend()
    figure.suptitle(f"{lines[0]['device']}, {lines[0]['dtype']}: output layers, loss, backward")
    figure.savefig(path, dpi=110)

"""Bytes against accuracy: label epochs x codec, and the one mean label an image, beside real images of equal bytes.

    python benchmarks/labels.py cifar10 --out runs/labels [--epochs 10 30 100 300 1000]
        [--codecs dense int8 top_k=3 top_k=10] [--splits holdout test] [--seeds 3] [--threads 1] [--no_real]
        [--json FILE] [--figure FILE.png] [--section.key value …]

Every point is a set by `edc_hub.condense` and a comparison by `edc_hub.evaluate`, so a stopped run goes on where it
was; the sets share observers, images and labels, and other keys of the recipe are given to condense. Real images of
equal bytes are trained on beside dense labels and the mean label, as their accuracy hangs on the bytes alone. All
students take the same steps: fewer label epochs are cycled. A tenth of the training split is held out from everything;
the codec and the label epochs are chosen there, as the fewest bytes within one standard deviation of the best, and the
test split is printed beside it. Of ten classes top_k=10 keeps everything and is larger than dense.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple


HOLDOUT = 0.1
REAL = ("real_mixed", "real_unmixed")  # control (iv), of which the better counts


class Point(NamedTuple):
    """One way to store labels, and how it is told to the commands."""

    codec: str  # dense | int8 | top_k=K | mean
    epochs: int

    @property
    def name(self) -> str:
        return self.codec if self.codec == "mean" else f"{self.codec.replace('=', '')}-{self.epochs}"

    @property
    def keys(self) -> list[str]:
        codec, _, k = self.codec.replace("mean", "dense").partition("=")
        chosen = ["--relabel.epochs", str(self.epochs), "--relabel.codec", codec]
        return [*chosen, "--relabel.top_k", k] if k else chosen


def run(module: str, *arguments: str) -> None:
    """Runs a command of edc_hub; its prose is on stderr, and so is what it prints."""
    command = [sys.executable, "-m", f"edc_hub.{module}", *arguments]
    print("+", " ".join(command[1:]), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)


def measure(point: Point, given: argparse.Namespace, others: list[str]) -> dict[str, dict[str, Any]]:
    """results.json of a point on each split; makes its set where it is not there."""
    threads = ["--threads", str(given.threads)]
    place = given.out / (Point("dense", point.epochs).name if point.codec == "mean" else point.name)
    kept = ["--source.holdout", str(HOLDOUT), "--relabel.controls", "false", *others]
    run("condense", given.recipe, "--output_dir", str(place), *point.keys, *kept, *threads)
    found = {}
    for split in given.splits:
        folder = given.out / f"{point.name}-{split}"
        seeds = ",".join(map(str, range(given.seeds)))
        controls = "[real]" if given.real and point.codec in ("dense", "mean") else "[]"
        asked = ["--split", split, "--seeds", f"[{seeds}]", "--controls", controls, "--output_dir", str(folder)]
        if point.codec == "mean":
            asked += ["--evaluation.labels", "mean"]
        run("evaluate", "--dataset", str(place), *asked, *threads)
        found[split] = json.loads((folder / "results.json").read_text())
    return found


def line(point: Point, results: dict[str, dict[str, Any]], weights: str) -> dict[str, Any]:
    """The figures of a point, of the first student: bytes, and on each split accuracies of the set and of (iv)."""
    first = next(iter(results.values()))
    row = {"codec": point.codec, "epochs": point.epochs, **first["about"]["bytes"]}
    row["bytes"] = sum(first["about"]["bytes"].values())
    for split, found in results.items():
        rows = next(iter(found["students"].values()))["rows"]
        row[split] = rows["set"][weights]
        real = [rows[name][weights] for name in REAL if name in rows]
        row[f"{split} (iv)"] = max(real, key=lambda it: it["mean"]) if real else None
    return row


def chosen(lines: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """The fewest bytes whose accuracy is within one standard deviation of the best."""
    best = max(lines, key=lambda it: it[split]["mean"])
    enough = best[split]["mean"] - (best[split]["std"] or 0)
    return min((it for it in lines if it[split]["mean"] >= enough), key=lambda it: it["bytes"])


def table(lines: list[dict[str, Any]], splits: list[str]) -> str:
    """Markdown; accuracies in per cent, bytes in kB."""
    columns = [name for split in splits for name in (split, f"{split} (iv)")]
    sizes = ["images", "labels", "views", "bytes"]
    head = ["codec", "label epochs", *(f"{name}, kB" for name in sizes), *columns]
    text = [head, ["---"] * len(head)]
    for it in lines:
        own = [it["codec"], str(it["epochs"]) if it["codec"] != "mean" else "", *(f"{it[n] / 1e3:.0f}" for n in sizes)]
        text.append([*own, *(_accuracy(it[name]) for name in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in text)


def _accuracy(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    return f"{100 * figure['mean']:.1f}" + (f" ± {100 * figure['std']:.1f}" if figure["std"] is not None else "")


def draw(lines: list[dict[str, Any]], splits: list[str], path: Path) -> None:
    """Accuracy over bytes, a panel a split, a line a codec; real images of equal bytes dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(splits), figsize=(6 * len(splits), 4), sharey=True, squeeze=False)
    for split, panel in zip(splits, panels[0], strict=True):
        for codec in dict.fromkeys(it["codec"] for it in lines):
            own = [it for it in lines if it["codec"] == codec]
            heights, errors = ([100 * (it[split][key] or 0) for it in own] for key in ("mean", "std"))
            panel.errorbar([it["bytes"] for it in own], heights, errors, marker="o", capsize=2, label=codec)
        measured = [it for it in lines if it[f"{split} (iv)"]]
        real = sorted((it["bytes"], 100 * it[f"{split} (iv)"]["mean"]) for it in measured)
        if real:
            panel.plot(*zip(*real, strict=True), "k--", label="(iv) real images, hard labels")
        panel.set(xscale="log", xlabel="bytes", ylabel="accuracy, %", title=split)
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--codecs", nargs="+", default=["dense", "int8", "top_k=3", "top_k=10"])
    parser.add_argument("--splits", nargs="+", choices=["holdout", "test"], default=["holdout", "test"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", choices=["ema", "live"], default="ema")
    parser.add_argument("--no_real", dest="real", action="store_false", help="without real images of equal bytes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given, others = parser.parse_known_args()

    points = [Point("mean", min(given.epochs))]
    points += [Point(codec, epochs) for codec in given.codecs for epochs in sorted(given.epochs)]
    lines = [line(point, measure(point, given, others), given.weights) for point in points]
    if given.json:
        given.json.write_text(json.dumps(lines, indent=2) + "\n")
    if given.figure:
        draw(lines, given.splits, given.figure)
    print(table(lines, given.splits))
    if "holdout" in given.splits:
        best = chosen(lines, "holdout")
        print(
            f"\nchosen on the hold-out: {best['codec']}, {best['epochs']} label epochs, {best['bytes'] / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()

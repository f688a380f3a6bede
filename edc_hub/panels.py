"""A diagnosis shown: one panel a measure in a picture, as in EDC's Figure 2, and a table for terminals."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import disk


if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d1f", "0.45")
SETS = {"set": "condensed", "initial": "initial", "random": "random real"}
KINDS = {"bn": "inputs of BatchNorm", "conv": "inputs of convolutions", "patch": "tiles of these"}
COLUMNS = 3  # panels in a row


# Picture


def _hessian(axis: "Axes", found: dict[str, Any]) -> str:
    for colour, (name, steps) in zip(COLOURS * len(found["steps"]), _by_observer(found).items(), strict=False):
        numbers = [each["step"] for each in steps]
        norms, errors = ([each[key] for each in steps] for key in ("frobenius", "frobenius_se"))
        axis.errorbar(numbers, norms, yerr=errors, color=colour, marker=".", linewidth=1.2, label=name)
    axis.set_yscale("log")
    axis.set_xlabel("step of synthesis")
    return "Frobenius norm of the Hessian in z"


def _gradients(axis: "Axes", found: dict[str, Any]) -> str:
    for colour, point in zip(COLOURS, found["points"], strict=False):
        sizes, means, stds = ([each[key] for each in point["sizes"]] for key in ("batch", "mean", "std"))
        label = f"after {point['steps']} steps" if point["steps"] else "untrained"
        axis.errorbar(sizes, means, yerr=stds, color=colour, marker="o", markersize=4, capsize=2, label=label)
    axis.set_xscale("log")
    axis.set_xticks(sizes, [*map(str, sizes[:-1]), "all"])
    axis.minorticks_off()
    axis.set_xlabel(f"batch, of {found['views']:,} views")
    return f"{found['student']}: cosine to the whole set's gradient"


def _moments(axis: "Axes", found: dict[str, Any]) -> str:
    bars = [(observer, kind, rows) for observer, own in found["observers"].items() for kind, rows in own.items()]
    shown = [row for row in SETS if row in found["draws"]]
    for offset, (row, colour) in enumerate(zip(shown, COLOURS, strict=False)):
        places = [number + (offset - (len(shown) - 1) / 2) * 0.26 for number in range(len(bars))]
        means, stds = ([rows[row][key] for *_, rows in bars] for key in ("mean", "std"))
        axis.barh(places, means, 0.24, xerr=stds, color=colour, error_kw={"elinewidth": 0.8}, label=SETS[row])
    axis.set_yticks(range(len(bars)), [f"{observer} {kind}" for observer, kind, _ in bars], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("mean over classes, ± std")
    return "distance of exact class moments"


def _views(axis: "Axes", found: dict[str, Any]) -> str:
    shares = {**found["observers"], "mean label": found["mean_label"]}
    _bars(axis, {name: {"its image": own["first"], "or the mixed-in": own["either"]} for name, own in shares.items()})
    axis.set_xlabel(f"% of {found['views']:,} stored views")
    return "views put in the class of"


def _agreement(axis: "Axes", found: dict[str, Any]) -> str:
    rows = {
        name: {"same as the student": own["agreement"]["live"], "accuracy": own["accuracy"]}
        for name, own in found["observers"].items()
    }
    _bars(axis, rows)
    accuracy = found["accuracy"]["live"]
    axis.axvline(100 * accuracy, color="0.3", linewidth=1, linestyle="--", label="student's accuracy")
    axis.set_xlabel(f"% of {found['images']:,} images, split {found['split']}")
    return f"{found['student']} and the observers"


def _bars(axis: "Axes", rows: dict[str, dict[str, float]]) -> None:
    """Two bars for each row, in %."""
    for offset, (name, colour) in enumerate(zip(next(iter(rows.values())), COLOURS, strict=False)):
        places = [number + (offset - 0.5) * 0.38 for number in range(len(rows))]
        axis.barh(places, [100 * own[name] for own in rows.values()], 0.36, color=colour, label=name)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    axis.set_xlim(0, 100)
    axis.invert_yaxis()


def picture(path: Path, found: dict[str, Any]) -> None:
    """Writes a PNG with a panel for each measure of a diagnosis."""
    from matplotlib.figure import Figure

    measures = [name for name in _MEASURES if name in found]
    columns = min(COLUMNS, len(measures))
    rows = -(-len(measures) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.9 * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, name in zip(axes, measures, strict=False):
        axis.set_title(_MEASURES[name][0](axis, found[name]), loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(which="both", labelsize=7, color="0.6")
        axis.xaxis.label.set_size(8)
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.1, -0.14), ncols=3)
    for axis in axes[len(measures) :]:
        axis.set_visible(False)
    metadata = {"Software": None}  # a version, which is no part of the picture
    disk.write_atomically(path, lambda part: figure.savefig(part, format="png", metadata=metadata))


def _by_observer(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The watched steps of each observer; of all together where steps draw theirs."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for each in found["steps"]:
        lines.setdefault(" + ".join(each["observers"] or ["observers drawn"]), []).append(each)
    return lines


# Table


def table(found: dict[str, Any]) -> str:
    """Plain text, a block of lines for each measure."""
    blocks = ["\n".join(lines(found[name])) for name, (_, lines) in _MEASURES.items() if name in found]
    blocks += [f"{name}: not available: {reason}" for name, reason in found["unavailable"].items()]
    return "\n\n".join(blocks) + "\n"


def _hessian_lines(found: dict[str, Any]) -> list[str]:
    block = found["block"]
    lines = [
        f"hessian of the synthesis loss, first block of {block['images']} images, {found['samples']} vectors a step",
        f"{'observer':<36}{'step':>8}{'Frobenius norm':>22}{'trace':>22}",
    ]
    for name, steps in _by_observer(found).items():
        for each in steps[:: max(1, len(steps) - 1)]:  # the first and the last
            norm, trace = (f"{each[key]:.3g} ± {each[f'{key}_se']:.1g}" for key in ("frobenius", "trace"))
            lines.append(f"{name:<36}{each['step']:>8}{norm:>22}{trace:>22}")
    return lines


def _gradient_lines(found: dict[str, Any]) -> list[str]:
    sizes = [each["batch"] for each in found["points"][0]["sizes"]]
    head = f"cosine to the whole set's gradient, {found['student']}, {found['views']} views"
    lines = [head, f"{'steps':>8}" + "".join(f"{f'batch {size}':>16}" for size in sizes)]
    for point in found["points"]:
        cells = (f"{each['mean']:.3f} ± {each['std']:.3f}" for each in point["sizes"])
        lines.append(f"{point['steps']:>8}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def _moment_lines(found: dict[str, Any]) -> list[str]:
    shown = [row for row in SETS if row in found["draws"]]
    lines = [f"{'distance of exact class moments':<44}" + "".join(f"{SETS[row]:>18}" for row in shown)]
    for observer, own in found["observers"].items():
        for kind, rows in own.items():
            cells = (f"{rows[row]['mean']:.3g} ± {rows[row]['std']:.2g}" for row in shown)
            lines.append(f"{f'{observer}, {KINDS[kind]}':<44}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def _view_lines(found: dict[str, Any]) -> list[str]:
    head = f"{found['views']} stored views, put in the class of"
    head = f"{head:<44}{'their image':>14}{'or the mixed-in':>18}"
    rows = {**found["observers"], "mean label": found["mean_label"]}
    return [head, *(f"{name:<44}{own['first']:>14.1%}{own['either']:>18.1%}" for name, own in rows.items())]


def _agreement_lines(found: dict[str, Any]) -> list[str]:
    live, ema = (found["accuracy"][weights] for weights in ("live", "ema"))
    head = f"{found['student']}, {found['epochs']} epochs: {live:.1%} live, {ema:.1%} EMA on {found['images']} images"
    lines = [f"{head}, split {found['split']}", f"{'same prediction':<44}{'live':>8}{'EMA':>8}{'accuracy':>10}"]
    for name, own in found["observers"].items():
        same = own["agreement"]
        lines.append(f"{name:<44}{same['live']:>8.1%}{same['ema']:>8.1%}{own['accuracy']:>10.1%}")
    return lines


_MEASURES = {
    "hessian": (_hessian, _hessian_lines),
    "gradients": (_gradients, _gradient_lines),
    "moments": (_moments, _moment_lines),
    "views": (_views, _view_lines),
    "agreement": (_agreement, _agreement_lines),
}

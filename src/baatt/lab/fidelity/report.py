"""What `baatt evaluate fidelity` shows: a table for each length, one of the layers, and a picture.

In: the stored content, `lengths` apart. Out: tables of ready text, a PNG.
"""

from collections.abc import Sequence
from pathlib import Path

from baatt.lab.describe import selection_name, setting_name
from baatt.lab.plots import legend_below, picture
from baatt.lab.tables import MISSING, Record, Table, interval, percent, short_length


def setting_names(records: Sequence[Record]) -> list[str]:
    """`dense`, `16 clusters, first block kept, 50 %`, `50 %, profile`: what all share is left out."""
    configs = [one["config"] for one in records]
    return [", ".join(filter(None, (setting_name(one["config"], configs), one["name"]))) for one in records]


def kl_text(one: Record) -> str:
    """`0.017 [0.015-0.020]`, with three figures; one document has no interval, dense attention neither."""
    if one["kl_low"] == one["kl_high"]:
        return f"{one['kl']:.3g}"
    return f"{one['kl']:.3g} [{one['kl_low']:.3g}-{one['kl_high']:.3g}]"


def recalled_text(one: Record) -> str:
    """`97.5 [94.3-98.9]`, without an interval as above, or nothing where no numbers were planted."""
    if "recalled" not in one:
        return MISSING
    value, low, high = (one[f"recalled{end}"] for end in ("", "_low", "_high"))
    return f"{100 * value:.1f}" if low == high else interval(value, low, high)


def length_table(content: Record, length: int) -> Table:
    """A row for each setting at one length."""
    records = [one for one in content["records"] if one["length"] == length]
    rows = []
    for name, one in zip(setting_names(records), records, strict=True):
        whole = one.get("recalled_whole")
        rows.append([
            name, percent(one["sparsity_achieved"], 1), kl_text(one), f"{one['loss']:.3f}",
            percent(one["agreement"], 1), recalled_text(one), MISSING if whole is None else percent(whole, 1),
        ])  # fmt: skip
    columns = ("setting", "block pairs skipped", "KL", "loss", "same token", "numbers recalled, %", "whole numbers")
    caption = (
        f"KL to dense attention and loss in nats a token, of {content['predicts']}; tokens that dense attention "
        f"predicts too; tokens of the {content['needles']} numbers of a document that are predicted right, in percent. "
        "In brackets 95 % bootstrap intervals over documents, where they differ."
    )
    title = f"{content['model']}, documents: {content['documents']}, {length} tokens each, {content['dtype']}"
    return Table(columns, rows, caption, title)


def layer_table(layers: Sequence[Record], chosen: Record) -> Table:
    """The cost of each layer made sparse alone, a column for each sparsity, and what the profile gives it."""
    sparsities = list(dict.fromkeys(one["config"]["sparsity"] for one in layers))
    profile = dict(chosen["layer_sparsity"]) | dict.fromkeys(chosen["dense_layers"], 0.0)
    rows = []
    for layer in dict.fromkeys(one["layer"] for one in layers):
        kl = {one["config"]["sparsity"]: f"{one['kl']:.2g}" for one in layers if one["layer"] == layer}
        given = percent(profile[layer], 1) if profile.get(layer) else "dense"
        rows.append([str(layer), *(kl.get(one, MISSING) for one in sparsities), given])
    columns = ("layer", *(f"KL at {percent(one)}" for one in sparsities), "profile")
    return Table(columns, rows, "KL to dense attention with this layer alone sparse, in nats a token.")


def draw_fidelity(content: Record, path: Path) -> None:
    """KL (above) and numbers recalled (below) over the block pairs skipped: a line a score, a column a length."""
    records = content["records"]
    lengths = list(dict.fromkeys(one["length"] for one in records))
    with picture(path, content["model"], 2, len(lengths), (max(7, 4.6 * len(lengths)), 8), sharex=True) as axes:
        for column, length in enumerate(lengths):
            lines: dict[str, list[Record]] = {}
            for one in (one for one in records if one["length"] == length):
                name = (
                    ", ".join(filter(None, (selection_name(one["config"], ()), one["name"]))) if one["config"] else ""
                )
                lines.setdefault(name, []).append(one)
            for row, value, label in ((0, "kl", "KL to dense, nats a token"), (1, "recalled", "numbers recalled")):
                axis = axes[row][column]
                for dense in (one for one in lines.get("", []) if row and value in one):
                    axis.axhline(dense[value], color="0.4", linestyle="--")
                for number, name in enumerate(name for name in lines if name):
                    line = sorted(
                        (one for one in lines[name] if value in one), key=lambda one: float(one["sparsity_achieved"])
                    )
                    places = [one["sparsity_achieved"] for one in line]
                    middle, low, high = ([one[f"{value}{end}"] for one in line] for end in ("", "_low", "_high"))
                    axis.plot(places, middle, "-o", color=f"C{number}", markersize=4, label=name)
                    axis.fill_between(places, low, high, color=f"C{number}", alpha=0.15)
                axis.grid(alpha=0.3)
                axis.set(ylabel="" if column else label)
            axes[0][column].set(title=f"{short_length(length)} tokens", yscale="log")
            axes[1][column].set(xlabel="block pairs skipped", ylim=(-0.02, 1.02))
        legend_below(axes, 3)

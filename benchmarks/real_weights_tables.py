"""Tables of scores on a real pretrained model before the operator was causal; today `baatt evaluate fidelity` asks it.

Queries chose among the key blocks of earlier segments of 1024 and attended to their own segment densely, and all
planted numbers were asked in the last query block. The script is in the history at the commit below the tables.
"""

from tables import block, crossed, verdict

from baatt.lab.tables import Record, Table, interval, percent

#: How the table calls them.
NAMES = {
    "paper": "the paper's: q and k sorted in 1024, beta 0.5",
    "covariance": "the paper's score, unsorted",
    "keys": "the paper's score, keys sorted in 256",
    "mean": "block means",
    "exact": "exact mass",
    "exact-peak": "exact mass, peak",
}
#: Settings in the order of the table.
ORDER = (
    *("clusters-16", "clusters-8", "clusters-32", "paper", "covariance", "keys"),
    *("mean", "antidiagonal-8", "exact", "exact-peak"),
)
#: The sparsity of the paper's Table 8.
BETA_SPARSITY = 0.5
#: Asked of 16 clusters with the first key block: sparsity, KL over that of exact mass, digits lost in points.
BARS = ((0.7, 1.5, 1.0), (0.9, None, 4.0))


def cell(one: Record) -> str:
    """`0.0174 [0.0150-0.0200]; 94.3 [92.1-96.0]`."""
    digits = interval(one["digits"], one["digits_low"], one["digits_high"])
    return f"{one['kl']:.3f} [{one['kl_low']:.3f}-{one['kl_high']:.3f}]; {digits}"


def caption(record: Record) -> str:
    """What the numbers are."""
    dense, all_kept = record["records"][:2]
    return (
        f"SmolLM2-135M-Instruct, {record['documents']} documents of {record['tokens']} tokens, {record['dtype']}, "
        "every layer sparse. KL to the dense model over the last segment in nats; share of answer digits predicted "
        "right in percent; 95 % bootstrap intervals over documents. Dense: "
        f"{interval(dense['digits'], dense['digits_low'], dense['digits_high'])}; "
        f"every block kept: KL {all_kept['kl']:.0e}."
    )


def table(record: Record) -> str:
    """A row per score, without and with the first key block, a column per sparsity."""
    sparse = [one for one in record["records"][2:] if one["config"]["beta"] == 0.5]
    sparse.sort(key=lambda one: (ORDER.index(one["setting"]), one["config"]["keep_first"], one["config"]["sparsity"]))
    header, rows = crossed(
        sparse,
        ("score", "first block"),
        lambda one: (
            NAMES.get(one["setting"], one["setting"].replace("-", " ")),
            "kept" if one["config"]["keep_first"] else "",
        ),
        lambda one: percent(one["config"]["sparsity"]),
        cell,
    )
    return block(record, header, rows, caption(record))


def bars_table(record: Record) -> str:
    """Clusters with the first key block beside what was asked of them: of KL against exact mass, of digits."""
    found = {
        (one["setting"], one["config"]["sparsity"], one["config"]["keep_first"]): one for one in record["records"][2:]
    }
    dense = record["records"][0]["digits"]
    rows = []
    for sparsity, most_kl, most_digits in BARS:
        one = found["clusters-16", sparsity, 1]
        if most_kl is not None:
            ratio = one["kl"] / found["exact", sparsity, 0]["kl"]
            asked = f"at most {most_kl:g} times that of exact mass"
            rows.append([percent(sparsity), "KL", asked, f"{ratio:.2f} times", verdict(ratio <= most_kl)])
        lost = 100 * (dense - one["digits"])
        asked = f"at most {most_digits:g} points less than dense"
        rows.append([percent(sparsity), "digits", asked, f"{lost:.1f} points", verdict(lost <= most_digits)])
    return Table(("sparsity", "of", "asked", "found", ""), rows).markdown()


def beta_table(record: Record) -> str:
    """A row per weight of the paper's score."""
    wanted = {"sparsity": BETA_SPARSITY, "keep_first": 1}
    found = [
        one
        for one in record["records"][2:]
        if one["setting"] == "covariance" and wanted.items() <= one["config"].items()
    ]
    rows = [
        [f"{one['config']['beta']:g}", *cell(one).split("; ")]
        for one in sorted(found, key=lambda one: one["config"]["beta"])
    ]
    text = f"Unsorted, first key block kept, {percent(BETA_SPARSITY)} sparsity. {caption(record)}"
    return block(record, ("beta", "KL", "digits"), rows, text)

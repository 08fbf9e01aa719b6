"""Table and plot of the measurements, and the goals that the kernels are held to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fd_kernels.benchmarks.records import PASSES, Key, Record, Records
from fd_kernels.benchmarks.roofline import H200, Floor, Rates, floors
from fd_kernels.benchmarks.shapes import SHAPES, Shape

NOT_MEASURED = "not measured"
TITLES = {
    "whitened_smooth_l1": ("Loss kernel", ("ours", "eager", "compiled", "copy")),
    "window_attention": ("Window attention", ("ours", "eager", "compiled", "sdpa", "flex")),
    "biased_attention": ("Biased attention (ViT)", ("ours", "eager", "compiled", "sdpa", "flex")),
    "block": ("Whole blocks of Swin V2", ("ours", "ours_compiled", "eager", "compiled")),
}
COMPUTE_SHARE, MEMORY_SHARE = 0.5, 0.7  # of the roofline


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio that should be reached in forward + backward, and what was measured."""

    meaning: str
    least: float
    found: float | None

    def __str__(self) -> str:
        found = NOT_MEASURED
        if self.found is not None:
            found = f"{self.found:.2f}, {'met' if self.found >= self.least else 'missed'}"
        return f"{self.meaning} >= {self.least:g}: {found}"


def goals(shape: Shape, records: Mapping[Key, Record]) -> list[Goal]:
    """The goals of a shape. A ratio needs a record of every variant in it; one that failed is no peer."""

    def fastest(*names: str) -> float | None:
        found = [records.get((shape.name, "both", name)) for name in names]
        times = [record.median_us for record in found if record is not None and record.median_us is not None]
        return min(times) if times and None not in found else None

    def ratio(slower: float | None, faster: float | None) -> float | None:
        return slower / faster if slower is not None and faster is not None else None

    ours, peers = fastest("ours"), fastest("eager", "compiled", "sdpa", "flex")
    if shape.op == "whitened_smooth_l1":
        return [Goal("copy / ours", 0.85, ratio(fastest("copy"), ours))]
    if shape.op == "block":
        best = fastest("ours", "ours_compiled")
        return [Goal("compiled eager / best of ours", 1.3, ratio(fastest("compiled"), best))]
    if shape.op == "biased_attention":
        return [Goal("best peer / ours", 1.0, ratio(peers, ours))]
    floor = _floor(shape, "both", records)
    share = MEMORY_SHARE if floor and floor.bound == "memory" else COMPUTE_SHARE
    return [
        Goal("best peer / ours", 2.0, ratio(peers, ours)),
        Goal("roofline / ours", share, ratio(floor.us if floor else None, ours)),
    ]


def _rates(shape: Shape, records: Mapping[Key, Record]) -> Rates:
    """Those of the run that measured ours; an H200's where there is none."""
    record = records.get((shape.name, "both", "ours"))
    return record.environment.rates if record else H200


def _floor(shape: Shape, pass_name: str, records: Mapping[Key, Record]) -> Floor | None:
    limits = floors(shape, _rates(shape, records))
    return limits[pass_name] if limits else None


def page(records: Records | None, command: str, picture: Path | None = None) -> str:
    """The Markdown page.

    Args:
        records: what was measured; None: nothing.
        command: the one that writes this page.
        picture: the plot, beside the page.
    """
    by_key = records.by_key if records else {}
    parts = [_HEAD.format(command=command), _environment(records)]
    if picture is not None:
        parts.append(f"![Forward + backward of all variants]({picture.name})\n")
    for op, (title, names) in TITLES.items():
        parts += [f"## {title}\n", *_tables([shape for shape in SHAPES if shape.op == op], names, by_key)]
    errors = [f"- {' '.join(record.key)}: {record.error}" for record in by_key.values() if record.error]
    if errors:
        parts.append("## Errors\n\n" + "\n".join(errors) + "\n")
    return "\n".join(parts)


_HEAD = """# Kernel benchmarks

Written by `{command}`. To measure, on a machine with a GPU:

    make gpu-bench                    # 9 minutes at most; each call goes on where the last one stopped
    make gpu-bench SHAPE='swin_g_w12'  # a regular expression on "shape pass variant"

bf16, CUDA events. Each time is the median of 20 to 200 runs, with their first and last decile; each run reads other
inputs, which the L2 cache does not hold. The three passes are of the same runs, forward then backward, and kernels
wait in the stream before they start, so that launching them costs nothing. Before that, output and gradients are
compared with the reference in fp32: a relative error above 0.05 takes the place of the time.

Swin shapes are stage 3 of SwinV2-B and -G (`b`, `g`) at one window size (`w`), 2 x 2 windows an image, shifted by
half a window, 128 and 64 images. `eager` rolls, partitions and adds a materialised mask, as timm does; `compiled` is
the same under torch.compile; `sdpa` is scaled_dot_product_attention with bias and mask as one tensor; `flex` is
FlexAttention compiled, with bias and regions in its score_mod. `roofline` is the least time for the bytes, products
and exponentials, at the rates below. A block is attention, projections, norms and MLP; `eager` cuts windows before qkv.
"""


def _environment(records: Records | None) -> str:
    if records is None:
        return f"**On a GPU: {NOT_MEASURED}.** The roofline is that of an H200, at rates measured on one earlier.\n"
    now = records.latest
    exp = (
        f"{now.rates.exp / 1e12:.2f} T exp/s"
        if now.rates.exp
        else "clock unknown, so no roofline of attention"
    )
    text = (
        f"{now.gpu}, driver {now.driver}, torch {now.torch}, triton {now.triton}, commit {now.commit}, "
        f"code {now.source}, {now.time}; measured in the run: copy {now.rates.copy / 1e12:.2f} TB/s, "
        f"bf16 product {now.rates.matmul / 1e12:.0f} TFLOP/s; {exp}.\n"
    )
    if any(not records.has(key, now) for key in records.by_key):
        text += "\n`*`: measured with other code than this.\n"
    return text


def _tables(shapes: list[Shape], names: tuple[str, ...], records: Mapping[Key, Record]) -> list[str]:
    """Time of each pass, with floors and goals; memory and compile time."""
    newest = max(
        (record.environment for record in records.values()), key=lambda each: each.time, default=None
    )

    def cell(key: Key, text: str) -> str:
        record = records.get(key)
        if record is None:
            return NOT_MEASURED
        *_, variant = key
        stale = newest is not None and record.environment.source_of(variant) != newest.source_of(variant)
        return ("error" if record.error else text.format(record)) + ("*" if stale else "")

    times, memory = [], []
    for shape in shapes:
        for pass_name in PASSES:
            text = "{0.median_us:.0f} ({0.p10_us:.0f}..{0.p90_us:.0f})"
            cells = [cell((shape.name, pass_name, name), text) for name in names]
            cells.append(_limit(shape, pass_name, records))
            cells.append("<br>".join(map(str, goals(shape, records))) if pass_name == "both" else "")
            times.append(f"| {shape.name} | {pass_name} | {' | '.join(cells)} |")
        text = "{0.peak_mib:.0f} / {0.kept_mib:.0f} / {0.compile_s:.1f}"
        cells = [cell((shape.name, "both", name), text) for name in names]
        memory.append(f"| {shape.name} | {' | '.join(cells)} |")
    columns, lines = " | ".join(names), "---|" * len(names)
    return [
        "Microseconds: median (first..last decile). Roofline: floor, what sets it, and ours as its share.\n",
        f"| shape | pass | {columns} | roofline | goals |\n|---|---|{lines}---|---|",
        *times,
        "\nPeak memory above the inputs, MiB / kept between the passes, MiB / first call, s: compilation, or its cache "
        "on disk.\n",
        f"| shape | {columns} |\n|---|{lines}",
        *memory,
        "",
    ]


def _limit(shape: Shape, pass_name: str, records: Mapping[Key, Record]) -> str:
    floor, record = _floor(shape, pass_name, records), records.get((shape.name, pass_name, "ours"))
    if floor is None:
        return "-"
    share = f", {floor.us / record.median_us:.0%}" if record and record.median_us else ""
    return f"{floor.us:.0f}, {floor.bound}{share}"


def plot(records: Records, path: Path) -> None:
    """Forward + backward of every variant and shape as bars, the roofline as lines.

    Raises:
        ValueError: matplotlib is not installed, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure  # only the plot needs it
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install matplotlib") from None
    measured = {key[0] for key, record in records.by_key.items() if record.median_us}
    panels = [op for op in TITLES if any(shape.op == op and shape.name in measured for shape in SHAPES)]
    if not panels:
        raise ValueError(f"--plot: no measurement in {records.path} succeeded, so there is nothing to draw")
    figure = Figure(figsize=(12, 4 * len(panels)), layout="constrained")
    for axes, op in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        title, names = TITLES[op]
        shapes = [shape for shape in SHAPES if shape.op == op]
        for place, name in enumerate(names):
            found = [records.by_key.get((shape.name, "both", name)) for shape in shapes]
            heights = [(record and record.median_us) or 0.0 for record in found]
            axes.bar(
                [at + place / (len(names) + 1) for at in range(len(shapes))],
                heights,
                1 / (len(names) + 1),
                label=name,
            )
        for at, shape in enumerate(shapes):
            if floor := _floor(shape, "both", records.by_key):
                axes.hlines(floor.us, at - 0.1, at + 0.9, colors="black")
        axes.set_xticks(range(len(shapes)), [shape.name for shape in shapes])
        axes.set(title=f"{title}: forward + backward", ylabel="us", yscale="log")
        axes.legend()
    figure.savefig(path)

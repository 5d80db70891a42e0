"""What was found of a capacity, as text for people and as a picture."""

from pathlib import Path

from engine.simulation.costs import ReplicaCosts, RoundCost
from engine.simulation.load import Traffic

from ..tables import drawn, number_table
from .curve import Capacity, Latency, LatencyTarget, LoadPoint


def render(found: Capacity, costs: ReplicaCosts, traffic: Traffic, wanted: LatencyTarget) -> str:
    return "\n\n".join((_headline(costs, traffic), _table(found, wanted), _verdict(found, wanted), _notes(costs)))


def _headline(costs: ReplicaCosts, traffic: Traffic) -> str:
    return (
        f"{costs.of.get('model', 'the model')}, {costs.decoder}: prompts of {traffic.prompt_bytes:g} bytes and outputs "
        f"of {traffic.output_bytes:g} on average, with standard deviations of {traffic.spread:.0%} of that"
    )


def _table(found: Capacity, wanted: LatencyTarget) -> str:
    high = f"p{wanted.percentile:g}"
    table = number_table(
        "load of a replica", "requests/s", "sequences\nat once", "first byte\nmean, s", "\nmedian", f"\n{high}",
        "last byte\nmean, s", "\nmedian", f"\n{high}", "",
    )  # fmt: skip
    for point in found.points:
        mark = "most" if point is found.best else "" if point.meets(wanted) else "too slow"
        load = (f"{point.share:.0%}", f"{point.rate:.3g}", f"{point.running:.1f}")
        table.add_row(*load, *_cells(point.first_byte), *_cells(point.last_byte), mark)
    return drawn(table)


def _cells(one: Latency) -> tuple[str, str, str]:
    return f"{one.mean:.3g}", f"{one.median:.3g}", f"{one.high:.3g}"


def _verdict(found: Capacity, wanted: LatencyTarget) -> str:
    limits = {"the first byte": wanted.first_byte, "the last byte": wanted.last_byte}
    said = " and ".join(f"{name} within {limit:g} s" for name, limit in limits.items() if limit is not None)
    if not said:
        return (
            f"{found.rate:g} requests/s need {_replicas(found)}: each can serve {found.best.rate:.3g} requests/s.\n"
            "No latency was asked for: --first-byte and --last-byte tell what must hold."
        )
    return (
        f"{found.rate:g} requests/s need {_replicas(found)}: at up to {found.best.rate:.3g} requests/s each, "
        f"{wanted.percentile:g} % of requests get {said}."
    )


def _replicas(found: Capacity) -> str:
    return f"{found.replicas} replica{'' if found.replicas == 1 else 's'}"


def _notes(costs: ReplicaCosts) -> str:
    one, full, longest = costs.rounds[0], costs.rounds[-1], costs.prompts[-1]
    return "\n".join(
        (
            f"Measured at {costs.of.get('url', 'a server')}: a byte takes {_ms_per_byte(one)} ms for one sequence, and "
            f"{_ms_per_byte(full)} ms with {full.sequences:,} side by side;",
            f"a prompt of {longest.rows:,} bytes adds {1000 * longest.seconds:.3g} ms to its steps, a request takes "
            f"{1000 * costs.request_seconds:.3g} ms outside of the engine.",
            "Loads are shares of the most that a replica serves for long; none above that is tried. Requests are taken",
            "to come at random, and each replica to get its share of them at random; no prompt is cached.",
            "Spare replicas are not counted.",
        )
    )


def _ms_per_byte(cost: RoundCost) -> str:
    return f"{1000 * cost.byte_seconds:.3g}"


def draw(found: Capacity, wanted: LatencyTarget, title: str, picture: Path) -> None:
    """Latency against load. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, 2, figsize=(10, 4.2), dpi=120, sharex=True)
    rates = [point.rate for point in found.points]
    parts = (("first byte", _first, wanted.first_byte), ("last byte", _last, wanted.last_byte))
    for axes, (name, of, limit) in zip(all_axes, parts, strict=True):
        axes.plot(rates, [of(point).high for point in found.points], "o-", ms=3, label=f"p{wanted.percentile:g}")
        axes.plot(rates, [of(point).median for point in found.points], "o-", ms=3, label="median")
        if limit is not None:
            axes.axhline(limit, color="black", lw=1, ls="--", label="wanted")
        axes.axvline(found.best.rate, color="C2", lw=1, label=f"{found.best.rate:.3g} requests/s")
        axes.set(xlabel="requests a second, one replica", ylabel="seconds", yscale="log", title=f"to the {name}")
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def _first(point: LoadPoint) -> Latency:
    return point.first_byte


def _last(point: LoadPoint) -> Latency:
    return point.last_byte

"""What the rows of the dashboard are built of: queries in Prometheus' language, and Grafana's panels as we use them."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders.prometheus import Dataquery as Query
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from engine import decoders

PALETTE = ("#8E8E8E", "#3D85C6", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B5A642")
DECODERS = dict(zip(decoders.DECODERS, PALETTE, strict=False))
"""Their colours. Grafana chooses those of others."""
STAGES = {"patcher": "#B877D9", "encoder": "#5794F2", "global": "#F2495C", "decoder": "#73BF69"}
POOLS = STAGES | {"open": "#8AB8FF", "latent": "#FFA6B0"}
QUANTILES = {0.5: "solid", 0.95: "dash", 0.99: "dot"}
DASHES = {"solid": [], "dash": [8, 5], "dot": [1, 4]}

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
INSTANCES = 'job="$job", instance=~"$instance"'
CHOSEN = 'decoder=~"$decoder"'
NOW = "$__rate_interval"
SHOWN = "$__range"


# Queries: of the chosen instances, and of the chosen decoders where decoders are told apart.


def select(metric: str, *where: str) -> str:
    return f"{metric}{{{', '.join([INSTANCES, *where])}}}"


def total(expr: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) ({expr})" if by else f"sum({expr})"


def rate(metric: str, *by: str, where: Sequence[str] = (), window: str = NOW) -> str:
    """The increase per second, one series for every value of the labels `by`."""
    where = [*where, CHOSEN] if "decoder" in by else where
    return total(f"rate({select(metric, *where)}[{window}])", *by)


def quantile(q: float, histogram: str, *by: str) -> str:
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', 'le', *by, where=() if by else [CHOSEN])})"


def query(expr: str, legend: str = "") -> Query:
    """Over the time that is shown."""
    return Query().expr(expr).legend_format(legend).range()


def rows(expr: str) -> Query:
    """At the end of the time that is shown, a row for every series."""
    return Query().expr(expr).format(PromQueryFormat.TABLE).instant()


# Panels.


def thresholds(steps: Mapping[float | None, str]) -> build.ThresholdsConfig:
    """From which value on which colour; None is the least of all."""
    levels = [model.Threshold(value, colour) for value, colour in steps.items()]
    return build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(levels)


def number(
    id: int, title: str, description: str, expr: str, *, unit: str, colours: Mapping[float | None, str] | None = None
) -> stat.Panel:
    """One of the numbers on top. A ratio without traffic is not a number: "idle"."""
    idle = model.DashboardSpecialValueMapOptions(model.SpecialValueMatch.NA_N, model.ValueMappingResult("idle", "blue"))
    return (
        stat.Panel()
        .id(id)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(4)
        .height(4)
        .unit(unit)
        .thresholds(thresholds(colours or {None: "blue"}))
        .mappings([model.SpecialValueMap(idle)])
        .graph_mode(look.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["last"]))
        .with_target(query(expr).ref_id("A"))
    )


def lines(
    id: int,
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    width: int = 8,
    colours: Mapping[str, str] | None = None,
    stack: bool = False,
    alert: float | None = None,
) -> timeseries.Panel:
    """colours: of series whose names begin with these words. alert: draws the line that an alert watches."""
    panel = (
        timeseries.Panel()
        .id(id)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(8)
        .unit(unit)
        .fill_opacity(0)
        .legend(common.VizLegendOptions().show_legend(True).placement(look.LegendPlacement.BOTTOM))
        .tooltip(common.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI).sort(look.SortOrder.DESCENDING))
    )
    for ref_id, target in zip(ascii_uppercase, queries, strict=False):
        panel.with_target(target.ref_id(ref_id))
    for name, colour in (colours or {}).items():
        fixed = model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
        panel.override_by_regexp(f"/^{name}( |$)/", [fixed])
    if stack:
        panel.stacking(common.StackingConfig().mode(look.StackingMode.NORMAL)).fill_opacity(50).line_width(0).min(0)
    if alert is not None:
        panel.thresholds(thresholds({None: "transparent", alert: "red"}))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(look.GraphThresholdsStyleMode.DASHED))
    return panel


def restyle(panel: timeseries.Panel, ref_id: str, style: str = "dash") -> timeseries.Panel:
    """Draws what one query gives as lines of another style, outside the stack."""
    properties = {
        "custom.lineStyle": {"fill": style, "dash": DASHES[style]},
        "custom.lineWidth": 1,
        "custom.fillOpacity": 0,
        "custom.stacking": {"mode": "none"},
    }
    return panel.override_by_query(ref_id, [model.DynamicConfigValue(*item) for item in properties.items()])


def percentiles(
    id: int, title: str, description: str, histogram: str, *, alert: float | None = None
) -> timeseries.Panel:
    """p50 solid, p95 dashed, p99 dotted, each decoder in its colour."""
    queries = [query(quantile(q, histogram, "decoder"), f"{{{{decoder}}}} p{q * 100:g}") for q in QUANTILES]
    panel = lines(id, title, description, *queries, unit=units.Seconds, colours=DECODERS, alert=alert)
    for ref_id, style in zip(ascii_uppercase, QUANTILES.values(), strict=False):
        restyle(panel, ref_id, style)
    return panel


def buckets(id: int, title: str, description: str, histogram: str) -> heatmap.Panel:
    """How often each bucket of a histogram in seconds was hit."""
    hits = total(f"increase({select(f'{histogram}_bucket', CHOSEN)}[{NOW}])", "le")
    return (
        heatmap.Panel()
        .id(id)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(16)
        .height(8)
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .y_axis(heatmap.YAxisConfig().unit(units.Seconds))
        .with_target(query(hits, "{{le}}").format(PromQueryFormat.HEATMAP).ref_id("A"))
    )


def grid(
    id: int, title: str, description: str, expr: str, transformation: str, options: object, *, width: int = 12
) -> table.Panel:
    return (
        table.Panel()
        .id(id)
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(8)
        .with_target(rows(expr).ref_id("A"))
        .with_transformation(model.DataTransformerConfig(transformation, options=options))
    )


def matrix(id: int, title: str, description: str, expr: str, *, column: str, unit: str) -> table.Panel:
    """Decoders by the values of the label `column`."""
    cells = {"rowField": "decoder", "columnField": column, "valueField": "Value"}
    return grid(id, title, description, expr, "groupingToMatrix", cells).unit(unit)


def facts(id: int, title: str, description: str, expr: str, *hidden: str) -> table.Panel:
    """The labels of series, a row for each."""
    without = {name: True for name in ("Time", "Value", "__name__", *hidden)}
    return grid(id, title, description, expr, "organize", {"excludeByName": without}, width=16)

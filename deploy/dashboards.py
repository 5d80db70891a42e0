"""The Grafana dashboard as code: `python -m deploy.dashboards` writes deploy/grafana/dashboards/fastblt.json.

Every panel has a description that says what to conclude from it, and an id (its row's number, then its own) that it
keeps when it moves, so that links to panels stay valid.
"""

import json
from pathlib import Path
from typing import TypeAlias

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import units

from .panels import (
    CHOSEN,
    DECODERS,
    NOW,
    POOLS,
    SHOWN,
    SOURCE,
    STAGES,
    buckets,
    facts,
    lines,
    matrix,
    number,
    percentiles,
    quantile,
    query,
    rate,
    restyle,
    select,
    total,
)

PATH = Path(__file__).parent / "grafana" / "dashboards" / "fastblt.json"

Panels: TypeAlias = list[Builder[model.Panel]]

COMPLETIONS = 'route="/v1/completions"'
REFUSED = 'reason=~"draining|engine_dead|queue_full|replica_lost"'
"""What the server refuses by no fault of the client."""
PEAK = select("fastblt_peak_bandwidth_bytes_per_second", 'operation="gemv"')
STATUSES = {"2..": "green", "4..": "orange", "5..": "red"}
ENDS = {"stop": "green", "length": "blue", "timeout": "orange", "dead_end": "#A0522D"}
ENDS |= {"abort": "yellow", "refused": "purple", "error": "red"}
OUTCOMES = {"ok": "green", "client_left": "yellow", "passed_on": "blue", "rejected": "orange", "failed": "red"}


def overview() -> Panels:
    refused = f"rate({select('fastblt_rejections_total', REFUSED)}[{NOW}])"
    failed, admitted = (
        f"rate({select('fastblt_requests_total', COMPLETIONS, where)}[{NOW}])"
        for where in ('outcome="failed"', 'outcome=~"ok|failed|client_left"')
    )
    estimated = rate("fastblt_decoder_stage_estimated_bytes_total", where=[CHOSEN])
    ready = f"{select('fastblt_engine_up')} unless on (job, instance) {select('fastblt_draining')} == 1"
    return [
        number(
            1,
            "Ready",
            "Share of all known instances that take requests. Below 100 %: some clients get 503 or no connection. "
            "The alerts FastbltDown, FastbltNotReady and FastbltDraining say which; a shutdown drains, too.",
            f"(sum({ready}) or vector(0)) / count({select('up')})",
            unit=units.PercentUnit,
            colours={None: "red", 0.5: "orange", 1: "green"},
        ),
        number(
            2,
            "Failed or refused",
            "Share of completions that failed, or that the server could not take: no engine, a drain, a full queue. "
            "What a client's own fault or limit refuses is left out. Above 5 %, look now: Requests by outcome and "
            "Rejections by reason, in the row Traffic, say which it is.",
            f"{total(f'{failed} or {refused}')} / {total(f'{admitted} or {refused}')}",
            unit=units.PercentUnit,
            colours={None: "green", 0.01: "orange", 0.05: "red"},
        ),
        number(
            3,
            "First byte, p95",
            "One request in 20 waits at least this long for its first byte. If it grows while Time per byte stays, "
            "requests queue: see Sequences, in the row Engine.",
            quantile(0.95, "fastblt_time_to_first_byte_seconds"),
            unit=units.Seconds,
            colours={None: "green", 1: "orange", 5: "red"},
        ),
        number(
            4,
            "Generated",
            "Bytes of text per second, all chosen instances and decoders together. 0 while sequences run: the engine "
            "hangs.",
            rate("fastblt_committed_bytes_total", where=[CHOSEN]),
            unit=units.BytesPerSecondSI,
        ),
        number(
            5,
            "Share of peak bandwidth",
            "Bytes per second that running stages read, as a share of the memory's, as measured at start. Decoding is "
            "bound by this, so high is good. If it is low, the row Bandwidth says in which stage.",
            share_of_peak("fastblt_stage_read_bytes_total", "fastblt_stage_seconds_total"),
            unit=units.PercentUnit,
        ),
        number(
            6,
            "Saved against BLT",
            "Weight bytes that plain BLT would have read for the same text and the chosen decoders did not, by the "
            "paper's formula. Below 0 they read more. A small model may still gain time by it: see Time per byte.",
            f"1 - {estimated} / {rate('fastblt_blt_estimated_bytes_total', where=[CHOSEN])}",
            unit=units.PercentUnit,
            colours={None: "orange", 0: "green"},
        ),
    ]


def traffic() -> Panels:
    return [
        lines(
            11,
            "Responses",
            "By status, scrapes and health checks included. 429: the queue is full, or a key is above its limit. 499: "
            "the client left before its response began. 5xx: our fault; the log has every one with its request id.",
            query(rate("fastblt_http_responses_total", "status"), "{{status}}"),
            unit=units.RequestsPerSecond,
            colours=STATUSES,
            stack=True,
        ),
        lines(
            12,
            "Sequences by end",
            "length and stop are normal. timeout: text was cut off, the server is too slow for what its clients want. "
            "dead_end: its grammar let no byte follow. abort: the client left. refused: it could not be run, the "
            "client's fault, or gave way in a full queue. error: ours.",
            query(rate("fastblt_sequences_total", "finish_reason", where=[CHOSEN]), "{{finish_reason}}"),
            unit=units.OpsPerSecond,
            colours=ENDS,
            stack=True,
        ),
        lines(
            13,
            "Sequences by decoder",
            "What clients ask for. When this mix changes, everything below changes with it: look here before you look "
            "for a fault.",
            query(rate("fastblt_sequences_total", "decoder"), "{{decoder}}"),
            unit=units.OpsPerSecond,
            colours=DECODERS,
            stack=True,
        ),
        lines(
            14,
            "Requests in progress",
            "Requests whose response is not complete; the scrape itself is one. A plateau under load is normal, growth "
            "without end is not.",
            query(select("fastblt_http_requests_in_progress"), "{{instance}}"),
            unit=units.Short,
        ),
        lines(
            15,
            "Bytes in and out",
            "Prompt bytes computed (again after a preemption) and bytes generated. A burst of prompts slows generation "
            "while it lasts.",
            query(rate("fastblt_prompt_bytes_total"), "prompts"),
            query(rate("fastblt_committed_bytes_total", where=[CHOSEN]), "generated"),
            unit=units.BytesPerSecondSI,
        ),
        lines(
            16,
            "Sizes of prompts and outputs",
            "Of the sequences that ended, the middle one and the 95th of 100. If latency changed and these did too, "
            "the clients changed and not the server.",
            *(
                query(quantile(q, f"fastblt_{what}_size_bytes"), f"{what} p{q * 100:g}")
                for what in ("prompt", "output")
                for q in (0.5, 0.95)
            ),
            unit=units.BytesSI,
        ),
        lines(
            17,
            "Requests by outcome",
            "Requests for completions. rejected: refused before any work, by the client's fault or for a full queue; "
            "the next panel says why. passed_on: refused for now, and another replica is asked. failed: our fault. "
            "client_left: it did not wait for the end.",
            query(rate("fastblt_requests_total", "outcome", where=[COMPLETIONS]), "{{outcome}}"),
            unit=units.RequestsPerSecond,
            colours=OUTCOMES,
            stack=True,
        ),
        lines(
            18,
            "Rejections by reason",
            "The error code that the client got; docs/api.md explains each. queue_full: add instances. invalid_api_key "
            "without end: a client has an old key. Others: a client sends what no server would take.",
            query(f"{rate('fastblt_rejections_total', 'reason')} > 0", "{{reason}}"),
            unit=units.RequestsPerSecond,
            stack=True,
        ),
        restyle(
            lines(
                19,
                "Connections",
                "At the dashed line a new connection takes the place of one that waits for its client. If none does, "
                "the new one is refused, which no other panel shows: the alert FastbltRefusingConnections.",
                query(select("fastblt_http_connections"), "{{instance}}"),
                query(f"min({select('fastblt_http_connections_capacity')})", "capacity of an instance"),
                unit=units.Short,
                colours={"capacity": "red"},
            ),
            "B",
        ),
    ]


def latency() -> Panels:
    return [
        percentiles(
            21,
            "Time to first byte",
            "From the arrival of a request, its whole body included, to its first byte. Every second request is slower "
            "than the solid line, one in 20 than the dashed, one in 100 than the dotted. Red: here the alert "
            "FastbltSlowFirstByte begins. Compare with Time in the queue.",
            "fastblt_time_to_first_byte_seconds",
            alert=5,
        ),
        percentiles(
            22,
            "Time per byte",
            "Mean time between the bytes of a sequence after its first. It grows with the number of running "
            "sequences; if it grows without them, something else uses the machine. Red: the alert FastbltSlowBytes.",
            "fastblt_time_per_byte_seconds",
            alert=0.1,
        ),
        percentiles(
            23,
            "End to end",
            "From the arrival of a request, its whole body included, to the end of a sequence. Follows the length of "
            "outputs: see Sizes of prompts and outputs before you worry.",
            "fastblt_end_to_end_seconds",
        ),
        percentiles(
            24,
            "Time in the queue",
            "From the admission of a sequence to its first step, the wait for its key's turn included. More than a "
            "moment means that steps or cache pages are taken: more instances, or a larger cache, would help.",
            "fastblt_queue_seconds",
        ),
        percentiles(
            26,
            "Time of the prompt",
            "From a sequence's first step to its first byte. It grows with the prompt, and with the prompts of others "
            "that share its steps. If Time to first byte is long and this and the queue are short, HTTP is slow, or "
            "grammars take long to check.",
            "fastblt_prefill_seconds",
        ),
        percentiles(
            27,
            "Time of the bytes",
            "From a sequence's first byte to its end, in the engine. Follows the length of outputs; with the times of "
            "the queue and of the prompt it makes up End to end.",
            "fastblt_decode_seconds",
        ),
        percentiles(
            28,
            "Time between chunks",
            "What a reader of a stream waits between two pieces of text. A p99 far above the p50 is a stall that Time "
            "per byte averages away: a long prompt in the same step, or a preemption.",
            "fastblt_inter_chunk_seconds",
        ),
        buckets(
            25,
            "Time to first byte, all requests",
            "How many requests had their first byte in which time. Two bands are two kinds of requests (short and long "
            "prompts, served at once and queued), which percentiles hide.",
            "fastblt_time_to_first_byte_seconds",
        ),
    ]


def engine() -> Panels:
    step, stages = rate("fastblt_step_seconds_total"), rate("fastblt_stage_seconds_total", "stage")
    calls = rate("fastblt_stage_calls_total", "stage")
    return [
        restyle(
            lines(
                31,
                "Sequences",
                "Running: in the batch. Waiting: for the turn of their key, for a slot or for pages. Queued: without a "
                "first byte yet. At the dashed line new requests get 429: add instances.",
                query(total(select("fastblt_running_sequences")), "running"),
                query(total(select("fastblt_waiting_sequences")), "waiting"),
                query(total(select("fastblt_queued_sequences")), "queued"),
                query(total(select("fastblt_queue_capacity_sequences")), "capacity of the queue"),
                unit=units.Short,
                colours={"capacity": "red"},
            ),
            "D",
        ),
        lines(
            32,
            "Steps",
            "Passes over all running sequences, per second. 0 while sequences run: the engine hangs. Fewer when steps "
            "are larger: see Rows per call.",
            query(rate("fastblt_steps_total", "instance"), "{{instance}}"),
            unit=units.OpsPerSecond,
        ),
        lines(
            33,
            "Where a step's time goes",
            "The stages' shares, and the host's: scheduling, bookkeeping, messages. A large share of the host means "
            "that the model is too small for its hardware, or the processor too busy.",
            query(f"{stages} / ignoring (stage) group_left {step}", "{{stage}}"),
            query(f"1 - {rate('fastblt_stage_seconds_total')} / {step}", "host"),
            unit=units.PercentUnit,
            colours=STAGES | {"host": "#8E8E8E"},
            stack=True,
        ),
        lines(
            34,
            "Rows per call",
            "Bytes (patches, in the global stage) that share one reading of a stage's weights. More is cheaper per "
            "byte; 1 is a single sequence of plain BLT.",
            query(f"{rate('fastblt_stage_rows_total', 'stage')} / {calls}", "{{stage}}"),
            unit=units.Short,
            colours=STAGES,
        ),
        lines(
            35,
            "Preemptions, restarts, continued requests",
            "Per minute. Preemptions: sequences evicted and recomputed for lack of pages; a steady rate calls for "
            "a larger cache. Restarts: the engine's process died; each is worth its log. Continued: requests taken "
            "over from a replica on Ray that was lost; their clients saw a pause.",
            query(f"60 * {rate('fastblt_preemptions_total')}", "preemptions"),
            query(f"60 * {rate('fastblt_engine_restarts_total')}", "restarts"),
            query(f"60 * {rate('fastblt_requests_continued_total')}", "continued"),
            unit=units.CountsPerMinute,
            colours={"preemptions": "orange", "restarts": "red", "continued": "purple"},
        ),
        lines(
            36,
            "CPU",
            "Cores that each process keeps busy. The HTTP process at 1: it limits the server, add instances. The "
            "engine at all the cores it was given is normal on a CPU.",
            query(rate("process_cpu_seconds_total", "instance"), "HTTP {{instance}}"),
            query(rate("fastblt_engine_process_cpu_seconds_total", "instance"), "engine {{instance}}"),
            unit=units.Short,
        ),
        lines(
            37,
            "Memory",
            "Resident memory of both processes, and the GPU's if there is one. The engine allocates weights and "
            "caches at its start and then stays level; steady growth of either process is a leak.",
            query(select("process_resident_memory_bytes"), "HTTP {{instance}}"),
            query(select("fastblt_engine_process_resident_memory_bytes"), "engine {{instance}}"),
            query(select("fastblt_device_memory_bytes"), "GPU {{kind}} {{instance}}"),
            unit=units.BytesIEC,
        ),
        facts(
            38,
            "What runs",
            "Version, model and arithmetic of each instance. Two versions long after a rollout: it got stuck.",
            select("fastblt_build_info"),
            "job",
        ),
    ]


def caches() -> Panels:
    used, capacity = select("fastblt_pages_used"), select("fastblt_pages_capacity")
    size, known = select("fastblt_page_size_bytes"), rate("fastblt_prompt_cached_bytes_total")
    return [
        restyle(
            lines(
                41,
                "Pages used",
                "Of each cache's capacity. At 100 % sequences wait or are preempted: the fullest pool limits how many "
                "run at once. Give --cache-bytes more, or allow fewer or shorter sequences. Dashed: the fullest pool "
                "of any instance; far above the others, requests are spread unevenly.",
                query(f"{total(used, 'pool')} / {total(capacity, 'pool')}", "{{pool}}"),
                query(f"max({select('fastblt_kv_cache_usage_ratio')})", "fullest of an instance"),
                unit=units.PercentUnit,
                width=12,
                colours=POOLS | {"fullest": "red"},
            ),
            "B",
        ),
        restyle(
            lines(
                42,
                "Memory in use",
                "The same in bytes; the dashed line is all that the pools have. global grows with the patches of the "
                "running sequences, the others with their number and with the prompts that are being computed.",
                query(total(f"{used} * {size}", "pool"), "{{pool}}"),
                query(total(f"{capacity} * {size}"), "capacity"),
                unit=units.BytesIEC,
                width=12,
                colours=POOLS | {"capacity": "red"},
                stack=True,
            ),
            "B",
        ),
        lines(
            43,
            "Prompts known",
            "The share of prompt bytes found in the prefix cache and not computed again. Near 0 while prompts "
            "share their beginnings: the cache forgets too soon, give --cache-bytes more.",
            query(f"{known} / ({known} + {rate('fastblt_prompt_bytes_total')})", "known"),
            unit=units.PercentUnit,
            width=12,
        ),
        lines(
            44,
            "Pages kept for texts to come",
            "Of each cache's capacity: held by no sequence, kept by the prefix cache, freed before a sequence "
            "has to wait, the longest unused first.",
            query(f"{total(select('fastblt_pages_cached'), 'pool')} / {total(capacity, 'pool')}", "{{pool}}"),
            unit=units.PercentUnit,
            width=12,
            colours=POOLS,
        ),
    ]


def decoders() -> Panels:
    committed = rate("fastblt_committed_bytes_total", "decoder")
    accepted, drafted = (rate(f"fastblt_{what}_bytes_total", "decoder") for what in ("accepted", "drafted"))
    by_position = rate(
        "fastblt_position_accepted_bytes_total", "decoder", "position", where=['position=~"[0-7]"'], window=SHOWN
    )
    patches = rate("fastblt_patch_size_bytes_bucket", "le")
    mean_patch = f"{rate('fastblt_patch_size_bytes_sum')} / {rate('fastblt_patch_size_bytes_count')}"
    small, large = (
        rate("fastblt_decoder_stage_calls_total", "decoder", where=[f'stage="{stage}"'])
        for stage in ("decoder", "global")
    )
    return [
        lines(
            51,
            "Bytes per second",
            "Bytes generated by each decoder. It follows the traffic; to compare decoders use Time per byte.",
            query(committed, "{{decoder}}"),
            unit=units.BytesPerSecondSI,
            colours=DECODERS,
            stack=True,
        ),
        lines(
            52,
            "Bytes per round",
            "How far one round of a decoder comes: 1 is plain BLT. The large weights are read about once per round, so "
            "this is what speculation buys. It falls on text that the model finds hard.",
            query(f"{committed} / {rate('fastblt_rounds_total', 'decoder')}", "{{decoder}}"),
            unit=units.Short,
            colours=DECODERS,
        ),
        lines(
            53,
            "Acceptance",
            "Share of drafted bytes that became text; nearly all for blt-d, which does not verify. Low for "
            "blt-s: a lower draft_length. Low for blt-dv: shorter blocks, or blt-s.",
            query(f"{accepted} / {drafted}", "{{decoder}}"),
            unit=units.PercentUnit,
            colours=DECODERS,
        ),
        lines(
            54,
            "Decoder passes per byte",
            "The paper's NFE of the small decoder; blt: 1. Above 1 a decoder makes more small passes than bytes, which "
            "pays only if it saves large ones.",
            query(f"{small} / {committed}", "{{decoder}}"),
            unit=units.Short,
            width=12,
            colours=DECODERS,
        ),
        lines(
            55,
            "Global passes per byte",
            "The paper's NFE of encoder and global transformer, the costly ones; blt: one per patch. The other "
            "decoders are worth their drafts only below blt's line.",
            query(f"{large} / {committed}", "{{decoder}}"),
            unit=units.Short,
            width=12,
            colours=DECODERS,
        ),
        matrix(
            56,
            "Drafts that stand, by position",
            "How often the draft's first byte (0), second byte (1) and so on became text, over the time range shown. "
            "Draft as far as this stays worth a small pass: where it is near 0, a lower draft_length costs nothing.",
            f"{by_position} / on (decoder) group_left {rate('fastblt_draft_rounds_total', 'decoder', window=SHOWN)}",
            column="position",
            unit=units.PercentUnit,
        ),
        lines(
            57,
            "Patch length",
            "Of generated text: the mean, the middle and the 95th of 100. Longer patches mean fewer global passes. A "
            "lasting shift: the model meets other text than it was trained on.",
            query(mean_patch, "mean"),
            *(query(f"histogram_quantile({q}, {patches})", f"p{q * 100:g}") for q in (0.5, 0.95)),
            unit=units.BytesSI,
            width=12,
        ),
    ]


def bandwidth() -> Panels:
    read = rate("fastblt_stage_read_bytes_total", "stage")
    committed = rate("fastblt_committed_bytes_total", "decoder")
    really = rate("fastblt_decoder_stage_read_bytes_total", "decoder")
    estimated = rate("fastblt_decoder_stage_estimated_bytes_total", "decoder")
    plain = rate("fastblt_blt_estimated_bytes_total", "decoder")
    by_stage = rate("fastblt_decoder_stage_read_bytes_total", "decoder", "stage", window=SHOWN)
    bytes_shown = rate("fastblt_committed_bytes_total", "decoder", window=SHOWN)
    return [
        restyle(
            lines(
                61,
                "Read while running",
                "Bytes that a stage reads per second of its own time, and the peak that was measured at the start (the "
                "mean of instances). Near the peak a stage is as fast as the memory: only reading less helps.",
                query(f"{read} / {rate('fastblt_stage_seconds_total', 'stage')}", "{{stage}}"),
                query(f"avg({PEAK})", "peak"),
                unit=units.BytesPerSecondSI,
                colours=STAGES | {"peak": "red"},
            ),
            "B",
        ),
        lines(
            62,
            "Share of the peak",
            "The same as a share. Low in all stages: calls are too small for the hardware, or the machine is shared. "
            "Low in one: its calls have many rows (a prompt computes more than it reads), or its kernel is slow.",
            query(share_of_peak("fastblt_stage_read_bytes_total", "fastblt_stage_seconds_total", "stage"), "{{stage}}"),
            unit=units.PercentUnit,
            colours=STAGES,
        ),
        lines(
            63,
            "Read over all time",
            "Bytes read per second of the clock, with the time in which no stage ran. The gap to Read "
            "while running is idle time and the host's.",
            query(read, "{{stage}}"),
            unit=units.BytesPerSecondSI,
            colours=STAGES,
            stack=True,
        ),
        restyle(
            lines(
                64,
                "Read per generated byte",
                "Solid: as counted, with patcher, keys, values and tables, a batch's weights divided among its "
                "sequences. Dashed: the paper's formula, weights alone and each sequence for itself. More sequences at "
                "once lower the solid line.",
                query(f"{really} / {committed}", "{{decoder}}"),
                query(f"{estimated} / {committed}", "{{decoder}} by formula"),
                unit=units.BytesSI,
                width=12,
                colours=DECODERS,
            ),
            "B",
        ),
        lines(
            65,
            "Saved against BLT",
            "By the paper's formula: weight bytes that plain BLT would have read for the same text and this decoder "
            "did not. Below 0 for long, and no better Time per byte than blt: ask for auto (the alert "
            "FastbltNoSavings).",
            query(f"1 - {estimated} / {plain}", "{{decoder}}"),
            unit=units.PercentUnit,
            width=12,
            colours=DECODERS,
        ),
        matrix(
            66,
            "Read per generated byte, by stage",
            "Bytes that each decoder reads in each stage, over the time range shown. The largest number of a row is "
            "what to save next.",
            f"{by_stage} / on (decoder) group_left {bytes_shown}",
            column="stage",
            unit=units.BytesSI,
        ),
        matrix(
            67,
            "Share of the peak, by stage",
            "How well each decoder's calls use the memory, over the time range shown. A call's time is shared by "
            "rows, so decoders that ran in the same calls look alike.",
            share_of_peak(
                "fastblt_decoder_stage_read_bytes_total",
                "fastblt_decoder_stage_seconds_total",
                "decoder",
                "stage",
                window=SHOWN,
            ),
            column="stage",
            unit=units.PercentUnit,
        ),
    ]


ROWS = {
    "Traffic": traffic,
    "Latency": latency,
    "Engine": engine,
    "Caches": caches,
    "Decoders": decoders,
    "Bandwidth": bandwidth,
}


def share_of_peak(read: str, seconds: str, *by: str, window: str = NOW) -> str:
    """Bytes read, as a share of the peak bandwidth of the same instances over that time."""
    where = [CHOSEN] if "decoder" in by else []
    possible = f"rate({select(seconds, *where)}[{window}]) * on (instance) group_left {PEAK}"
    return f"{rate(read, *by, window=window)} / {total(possible, *by)}"


def variables() -> list[Builder[model.VariableModel]]:
    everything = model.VariableOption(True, "All", "$__all")

    def label(name: str, series: str) -> build.QueryVariable:
        query = build.QueryVariable(name).datasource(SOURCE).query(f"label_values({series}, {name})")
        return query.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)

    return [
        build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"),
        label("job", "fastblt_build_info"),
        label("instance", 'up{job="$job"}').multi(True).include_all(True).all_value(".*").current(everything),
        label("decoder", 'fastblt_sequences_total{job="$job"}')
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything),
    ]


def dashboard() -> model.Dashboard:
    alerts = build.AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).icon_color("red")
    board = (
        build.Dashboard("fastblt")
        .uid("fastblt")
        .description("A server for byte-latent language models. Every panel says what to conclude from it.")
        .tags(["fastblt"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .variables(variables())
        .annotation(alerts.expr('ALERTS{job="$job", alertstate="firing"}'))
    )
    for panel in overview():
        board.with_panel(panel)
    for row, (title, panels) in enumerate(ROWS.items(), 1):
        board.with_row(build.Row(title).id(10 * row))
        for panel in panels():
            board.with_panel(panel)
    return board.build()


def render() -> str:
    return json.dumps(dashboard(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(render())

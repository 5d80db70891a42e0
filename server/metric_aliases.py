"""The same numbers under the names that vLLM gives them, for dashboards, autoscalers and load tests made for it."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client import Metric

from engine.decoders.table import DECODERS

VERIFIED = {name for name, spec in DECODERS.items() if spec.exact}
"""The others decode blocks that are not checked, which are no drafts."""
BLOCKS = "decoder"
"""The pool whose pages are told as blocks: its rows are bytes."""


class Alias(NamedTuple):
    """ours: families without "fastblt_", of one kind, whose samples add up to it. kept: which of their labels stay,
    with vLLM's names; a bucket keeps its bound. verified: whether only decoders count that verify drafts."""

    name: str
    ours: tuple[str, ...]
    kept: dict[str, str] = {}
    verified: bool = False

    def counts(self, labels: dict[str, str]) -> bool:
        """Whether a sample is part of it. A sequence that could not be run is no request to vLLM."""
        return labels.get("finish_reason") != "refused" and (not self.verified or labels["decoder"] in VERIFIED)

    def relabelled(self, labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
        kept = {"le": "le", **self.kept}
        return tuple((kept[name], value) for name, value in labels.items() if name in kept)


ALIASES = (
    Alias("num_requests_running", ("running_sequences",)),
    Alias("num_requests_waiting", ("waiting_sequences",)),
    Alias("kv_cache_usage_perc", ("kv_cache_usage_ratio",)),
    Alias("prompt_tokens", ("prompt_bytes", "prompt_cached_bytes")),
    Alias("prompt_tokens_cached", ("prompt_cached_bytes",)),
    Alias("generation_tokens", ("committed_bytes",)),
    Alias("prefix_cache_queries", ("prompt_bytes", "prompt_cached_bytes")),
    Alias("prefix_cache_hits", ("prompt_cached_bytes",)),
    Alias("num_preemptions", ("preemptions",)),
    Alias("request_success", ("sequences",), {"finish_reason": "finished_reason"}),
    Alias("time_to_first_token_seconds", ("time_to_first_byte_seconds",)),
    Alias("inter_token_latency_seconds", ("inter_chunk_seconds",)),
    Alias("request_time_per_output_token_seconds", ("time_per_byte_seconds",)),
    Alias("e2e_request_latency_seconds", ("end_to_end_seconds",)),
    Alias("request_queue_time_seconds", ("queue_seconds",)),
    Alias("request_prefill_time_seconds", ("prefill_seconds",)),
    Alias("request_decode_time_seconds", ("decode_seconds",)),
    Alias("request_prompt_tokens", ("prompt_size_bytes",)),
    Alias("request_generation_tokens", ("output_size_bytes",)),
    Alias("spec_decode_num_drafts", ("draft_rounds",), verified=True),
    Alias("spec_decode_num_draft_tokens", ("drafted_bytes",), verified=True),
    Alias("spec_decode_num_accepted_tokens", ("accepted_bytes",), verified=True),
    Alias("spec_decode_num_accepted_tokens_per_pos", ("position_accepted_bytes",), {"position": "position"}, True),
)


def vllm(families: Iterable[Metric], model: str) -> Iterable[Metric]:
    """vLLM's families, from all of ours. model: their label "model_name"; their "engine" is always 0."""
    found = {family.name.removeprefix("fastblt_"): family for family in families}
    about = {"model_name": model, "engine": "0"}
    for alias in ALIASES:
        sources = [found[name] for name in alias.ours]
        made = Metric(f"vllm:{alias.name}", sources[0].documentation, sources[0].type)
        totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        for source in sources:
            for sample in source.samples:
                if alias.counts(sample.labels):
                    suffix = sample.name.removeprefix(source.name)
                    totals[suffix, alias.relabelled(sample.labels)] += sample.value
        for (suffix, labels), total in totals.items():
            made.add_sample(made.name + suffix, about | dict(labels), total)
        yield made
    pages = Metric("vllm:cache_config_info", "Always 1.", "gauge")
    for sample in found["cache_info"].samples:
        if sample.labels["pool"] == BLOCKS:
            size, count = sample.labels["page_rows"], sample.labels["pages"]
            pages.add_sample(pages.name, about | {"block_size": size, "num_gpu_blocks": count}, 1)
    yield pages

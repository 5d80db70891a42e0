"""The benchmark against llama.cpp. What runs llama.cpp itself is skipped without the extra `tokens`."""

import json
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import against_tokens, program, report, short, summary
from benchmarks.generate import Reading
from benchmarks.token_engine import TokenReading, token_engine
from benchmarks.token_models import FORMATS, LLAMAS, token_model

PROMPT = [7, 300, 41, 500, 2, 99]


def need_the_extra() -> None:
    if lacks := program.lacking("against_tokens"):
        pytest.skip(lacks)


def theirs(tokens_per_second: float) -> TokenReading:
    return TokenReading([0] * 10, 10 / tokens_per_second, "asleep")


def ours(bytes_per_second: float, read_per_byte: int) -> Reading:
    seconds = 100 / bytes_per_second
    counts = {"committed": 100, "rounds": 20, "decoder_calls": 40, "global_calls": 25}
    return Reading([], seconds, 40, seconds, {}, {}, bytes_read=100 * read_per_byte, **counts)


PAIRS = {
    "f16": {"blt": [(theirs(10), ours(11, 1000))], "blt-dv B=8": [(theirs(r), ours(88, 250)) for r in (10, 20, 40)]},
    "q8_0": {"blt": [(theirs(20), ours(22, 1000))], "blt-dv B=8": [(theirs(r), ours(88, 250)) for r in (20, 40, 80)]},
}
FIGURES = {
    "bytes_per_token": 4.4,
    "llama_cpp": {"version": "0.3.36", "system": "CPU : AVX2 = 1"},
    "llama": {"name": "Llama 3.2 1B", "parameters": 1_235_814_400},
    "our_parameters": 1_500_000_000,
}


def test_speed_ratios_are_of_paired_turns_and_predicted_by_bytes_read() -> None:
    found = against_tokens.figures(PAIRS, {"f16": 500.0, "q8_0": 250.0}, replays=True)
    blt, dv = found["rows"]
    assert blt["against"]["f16"]["ratio"] == pytest.approx({"median": 0.25, "least": 0.25, "most": 0.25})
    assert dv["against"]["f16"]["ratio"] == pytest.approx({"median": 1.0, "least": 0.5, "most": 2.0})
    assert dv["against"]["q8_0"]["ratio"] == pytest.approx({"median": 0.5, "least": 0.25, "most": 1.0})
    assert [row["against"][form]["predicted"] for row in (blt, dv) for form in PAIRS] == [0.5, 0.25, 2.0, 1.0]
    assert [row["acceptance"] for row in (blt, dv)] == ["none needed", "replayed acceptance"]
    assert blt["bytes_per_second"] == pytest.approx({"median": 16.5, "least": 11, "most": 22})
    f16, q8 = found["formats"]
    assert f16["tokens_per_second"] == pytest.approx({"median": 15, "least": 10, "most": 40})
    assert f16["bytes_per_second"] == pytest.approx({"median": 66, "least": 44, "most": 176})
    assert q8["read_mb_per_byte"] == 250 / 1e6 and q8["asleep"] == 1


def test_the_results_page_includes_slower_rows(tmp_path: Path) -> None:
    facts = {"model": "1b shape", "dtype": "bfloat16", "device": "cpu", "notes": ["random weights"], "replays": True}
    content = {"program": "against_tokens", "subject": facts, **FIGURES}
    content |= against_tokens.figures(PAIRS, {"f16": 500e6, "q8_0": 250e6}, replays=True)
    path = report.write("against_tokens-1b-shape", "python -m benchmarks.against_tokens", content, tmp_path)
    summary.draw(path)
    page = summary.write(tmp_path).read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| blt-dv B=8 | replayed acceptance | 88.0 | 0.0 | 0.25 | 1.00 (0.50 to 2.00) |" in page
    assert "| q8_0 | 132.0 (88.0 to 352.0) | 30.0 (20.0 to 80.0) | 250.0 |" in page
    assert "1,236 million parameters, our model 1,500 million" in page and "CPU : AVX2 = 1" in page
    verdicts = summary.verdicts(json.loads(path.read_text()))
    assert [verdict.met for verdict in verdicts] == [None, None]
    assert verdicts[0].figure == "against llama.cpp with f16 (replayed acceptance)"
    assert verdicts[1].found == "0.25 times for blt, 0.50 (0.25 to 1.00) times for blt-dv B=8"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "find_spec", lambda _: None)


@pytest.mark.usefixtures("without")
def test_without_the_extra_against_tokens_explains_how_to_install_it() -> None:
    with pytest.raises(SystemExit) as end:
        against_tokens.main(["--shape", "tiny"])
    # Python prints a code that is a text, and ends with 1.
    assert end.value.code == (
        "against_tokens needs gguf and llama_cpp: .venv/bin/pip install -e '.[tokens]' (it compiles, for ten minutes)"
    )
    assert program.lacking("against_hf") is None


@pytest.mark.usefixtures("without")
def test_without_the_extra_the_short_set_leaves_out_against_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert short.main(["--list"]) == 0
    said = capsys.readouterr()
    assert "against_tokens" not in said.out and "benchmarks.against_hf" in said.out
    assert said.err.startswith("left out: against_tokens needs gguf and llama_cpp") and said.err.count("\n") == 1


def test_with_the_extra_the_short_set_has_against_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "find_spec", lambda name: ModuleSpec(name, None))
    assert short.main(["--list", "--only", "against_tokens"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("python -m benchmarks.against_tokens ") and not said.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--device", "cuda"], "--device must be cpu"),
        (["--shape", "nano"], "--shape must be one of tiny, 1b"),
        (["--bytes", "16"], "--bytes must be at least 34"),
    ],
)
def test_against_tokens_refuses_arguments_that_cannot_be_compared(
    arguments: Sequence[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        against_tokens.main(arguments)
    assert why in capsys.readouterr().err


def test_the_llama_shape_has_the_published_size() -> None:
    llama = LLAMAS["1b"]
    assert llama.parameters == 1_235_814_400
    # Keys and values of 8 heads in 16 layers, 64 numbers of 2 bytes each.
    assert llama.kv_row == 2 * 16 * 8 * 64 * 2


def test_a_llama_cpp_process_that_cannot_start_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(RuntimeError, match="llama.cpp ended with 1; the lines above say why"),
        token_engine(tmp_path / "nothing.gguf", 1, 64),
    ):
        pass
    said = capfd.readouterr().err
    assert "nothing.gguf" in said or "No module named 'llama_cpp'" in said


def test_a_token_model_file_is_written_once_and_reused(tmp_path: Path) -> None:
    need_the_extra()
    sizes = {}
    for form in FORMATS:
        path = token_model(tmp_path, "tiny", form)
        written = path.stat()
        assert token_model(tmp_path, "tiny", form).stat().st_mtime_ns == written.st_mtime_ns
        sizes[form] = written.st_size
    assert len(list(tmp_path.iterdir())) == 3, "nothing unfinished stays"
    assert sizes["f16"] == sizes["bf16"] and sizes["q8_0"] / sizes["f16"] == pytest.approx(17 / 32, abs=0.02)


def test_llama_cpp_writes_the_text_of_transformers(tmp_path: Path) -> None:
    need_the_extra()
    path = token_model(tmp_path, "tiny", "f16")
    expected = {length: greedy(path, PROMPT[:length], 6) for length in (6, 5, 2)}
    assert len(set().union(*expected.values())) > 6, "the texts differ"
    with token_engine(path, 1, 64) as engine:
        assert engine.facts.parameters == LLAMAS["tiny"].parameters
        # The second time the prompt is known; then it is another.
        for length in (6, 6, 5, 2):
            reading = engine.generate(PROMPT[:length], 5)
            assert reading.tokens == expected[length][1:], "its first token comes before the time"
            assert reading.seconds > 0 and reading.waiting in ("awake", "asleep")


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """By transformers in float32 with the weights of the file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LLAMAS["tiny"]
    config = LlamaConfig(
        vocab_size=llama.vocab_size,
        hidden_size=llama.dim,
        intermediate_size=llama.ffn_dim,
        num_hidden_layers=llama.layers,
        num_attention_heads=llama.heads,
        num_key_value_heads=llama.kv_heads,
        head_dim=llama.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": llama.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    weights: dict[str, Any] = {}
    for tensor in GGUFReader(path).tensors:
        *layer, name, _ = tensor.name.split(".")
        data = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if name in ("attn_q", "attn_k"):
            # A GGUF has the two numbers that are rotated together side by side, transformers half a head apart.
            data = data.view(-1, llama.head_dim // 2, 2, llama.dim).transpose(1, 2).reshape(data.shape)
        weights[".".join(["model", *(["layers", layer[1]] if layer else []), names[name], "weight"])] = data
    model = LlamaForCausalLM(config)
    assert model.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]

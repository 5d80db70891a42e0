"""Stages recorded as CUDA graphs write what the same kernels write when they are launched one by one."""

import gc
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import exactness
from benchmarks.gpu_check.setting import Setting
from benchmarks.models import Form, random_model
from benchmarks.report import NANO
from engine.decoders import DECODERS
from engine.step.graphs import Graphs, Recorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["fast", "released", None])
def test_cuda_graphs_write_the_bytes_of_single_launches_in_a_mixed_batch(
    form: Form | None, dtype: str, tmp_path: Path
) -> None:
    setting = Setting("cuda", quick=False, work=tmp_path)
    folder = random_model(tmp_path, "tiny", form, dtype=torch.float32) if form else NANO
    recorded, launched = (
        exactness.texts_of(setting.engine(folder, dtype=dtype, kernels="triton", graphs=graphs), 8, 64)
        for graphs in (True, False)
    )
    assert recorded == launched
    ahead = setting.engine(folder, dtype=dtype, kernels="triton", graphs=True)
    ahead.stepper.ahead.policy = "always"
    # The second time nothing is recorded any more.
    assert [exactness.texts_of(ahead, 8, 64, mixed=False) for _ in range(2)] == [recorded] * 2
    for way, texts in recorded.items():
        if DECODERS[exactness.WAYS[way]["decoder"]].exact:
            assert texts == recorded["blt"], way


def test_torch_kernels_run_on_a_device_with_default_flags(tmp_path: Path) -> None:
    """As operators are told to try them, and as `fastblt check` compares with them. Their host waits for the device."""
    setting = Setting("cuda", quick=False, work=tmp_path)
    folder = random_model(tmp_path, "tiny", "fast", dtype=torch.float32)
    engine = setting.engine(folder, kernels="torch", graphs=None)
    assert not isinstance(engine.stepper.executor, Graphs)
    assert all(exactness.texts_of(engine, 4, 32).values())


def test_cuda_graphs_with_float8_weights_write_the_bytes_of_single_launches(tmp_path: Path) -> None:
    setting = Setting("cuda", quick=False, work=tmp_path)
    if not setting.has_float8():
        pytest.skip("needs a device that computes with e4m3")
    recorded, launched = (
        exactness.texts_of(setting.engine(NANO, dtype="bfloat16", float8=True, graphs=graphs), 4, 48)
        for graphs in (True, False)
    )
    assert recorded == launched


def test_a_repeated_batch_records_no_new_cuda_graph(tmp_path: Path) -> None:
    setting = Setting("cuda", quick=False, work=tmp_path)
    engine = setting.engine(random_model(tmp_path, "tiny", "fast", dtype=torch.float32), graphs=True)
    # Else what is launched depends on what took how long.
    engine.stepper.ahead.policy = "always"
    executor = engine.stepper.executor
    assert isinstance(executor, Graphs)
    first = exactness.texts_of(engine, 4, 48)
    recorded = executor.num_recorded
    assert recorded and exactness.texts_of(engine, 4, 48) == first
    assert executor.num_recorded == recorded


@pytest.mark.parametrize("graphs", [False, True])
def test_measured_stage_time_excludes_planning_on_the_host(graphs: bool, tmp_path: Path) -> None:
    setting = Setting("cuda", quick=False, work=tmp_path)
    engine = setting.engine(random_model(tmp_path, "tiny", "fast", dtype=torch.float32), graphs=graphs)
    engine.stepper.ahead.policy = "always"
    exactness.texts_of(engine, 2, 16)
    before, plan = engine.snapshot(), engine.stepper.stages.launcher.plan
    engine.stepper.stages.launcher.plan = lambda *given: (time.sleep(0.02), plan(*given))[1]  # type: ignore[method-assign,func-returns-value]
    exactness.texts_of(engine, 2, 16)
    after = engine.snapshot()
    for stage, calls in after.calls.items():
        assert after.stage_seconds[stage] - before.stage_seconds[stage] < 0.01 * (calls - before.calls[stage]), stage


def test_recording_a_graph_restores_allocators_and_garbage_collector() -> None:
    recorder, x = Recorder(torch.device("cuda")), torch.arange(8.0, device="cuda")
    torch.empty(1 << 26, device="cuda")
    reserved = torch.cuda.memory_reserved()
    collected: list[bool] = []

    def work() -> torch.Tensor:
        collected.append(gc.isenabled())
        out = x + 1
        if len(collected) == 4:
            raise ValueError("in mid-capture")
        return out

    graph, output = recorder.record(work)
    assert torch.cuda.memory_reserved() >= reserved and collected == [True, False] and gc.isenabled()
    x *= 2
    graph.replay()
    assert output.tolist() == [2.0 * n + 1 for n in range(8)]
    with pytest.raises(ValueError, match="in mid-capture"):
        recorder.record(work)
    assert gc.isenabled()
    again, output = recorder.record(work)
    again.replay()
    assert output.tolist() == [2.0 * n + 1 for n in range(8)], "a failure leaves the stream as it was"

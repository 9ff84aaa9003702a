"""Benchmarks: operations counted by hand, the compared masks are the rule, and a record that survives a case without memory."""

import json

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from longlive.bench import attention as attention_bench
from longlive.bench import train as train_bench
from longlive.bench.flops import attention_flops, training_flops, utilisation, visible_pairs
from longlive.bench.record import STARTED, Record, surroundings
from longlive.bench.timing import kind_of
from longlive.bench.train import TrainSettings, bench_train
from longlive.core.errors import InputError
from longlive.core.tokens import Tokens
from longlive.models.spec import TINY, WAN22_TI2V_5B, DiTDims
from longlive.ops.attention import attention
from longlive.ops.masks import dense_mask


def test_operations_of_a_step_by_hand():
    dims = DiTDims(dim=4, ffn=8, layers=2, heads=2, text_dim=3, text_len=9, freq_dim=2, channels=1)
    # 2 streams x 2 chunks of 5 tokens = 20 tokens; 2 prompts of 7 keys; pairs: 2 streams x (1 + 2) chunks x 25 = 150
    linear = 20 * 2 * (4 * 16 + 2 * 16 + 2 * 32) + 2 * 7 * 2 * (2 * 16)
    attend = 4 * 4 * (150 + 20 * 7)
    outside = 20 * 2 * 16 + 10 * 2 * 16 + 14 * 2 * (12 + 16) + 4 * 2 * (8 + 16 + 96)  # patches, head of the noisy half, text, time
    assert 2 * (linear + attend) + outside == 26576
    assert training_flops(2, dims, chunk_frames=1, frame_tokens=5, text_keys=7) == 3 * 26576


@pytest.mark.parametrize("frames, linear, attend", [(96, 1.5e15, 2.9e15), (192, 3.0e15, 11e15), (384, 5.9e15, 43e15)])
def test_operations_of_the_5b_model_are_the_specified_ones(frames, linear, attend):
    """Forward, per sample (spec training §9.4, B6)."""
    step = training_flops(frames, WAN22_TI2V_5B.dit, chunk_frames=8, frame_tokens=880, text_keys=144)
    assert step / 3 == pytest.approx(linear + attend, rel=0.02)
    heads = 30 * attention_flops(visible_pairs(frames // 8, 7040), 24, 128, backward=False)
    assert heads == pytest.approx(attend, rel=0.03)


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_visible_pairs_are_those_of_the_mask(copies):
    chunk = torch.arange(4).repeat(1 + copies)
    none = torch.zeros(1, 1)
    tokens = Tokens(none, chunk, torch.arange(len(chunk)) >= 4, none.long(), 1, 3)
    assert visible_pairs(4, 3, copies=copies) == dense_mask(tokens).sum().item()
    window = torch.tensor([[[-1, -1], [0, -1], [0, 1], [0, 2]]])
    assert visible_pairs(4, 3, copies=copies, pages=3) == dense_mask(tokens, window).sum().item()


def test_rates():
    assert utilisation(4e15, 2.0, 4, 1e15) == 0.5
    assert attention_flops(100, 2, 3, backward=True) == 3.5 * attention_flops(100, 2, 3, backward=False) == 8400


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNN", "gemm"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, AddFunctor>", "elementwise"),
    ],
)
def test_kernels_are_sorted_by_name(kernel, kind):
    assert kind_of(kernel) == kind


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_compared_mask_is_the_rule():
    chunks, tokens = 3, 2 * attention_bench.BLOCK
    mask = attention_bench.block_mask(chunks, tokens, torch.device("cpu"))
    blocks = dense_mask(attention_bench.film(chunks, 2))[0, 0]
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks) and mask.kv_num_blocks.sum() == 0
    q, k, v = (torch.randn(1, 1, 2 * chunks * tokens, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    want = attention(*(t.transpose(1, 2) for t in (q, k, v)), dense_mask(attention_bench.film(chunks, tokens)))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask).transpose(1, 2), want, rtol=0, atol=1e-5)


def test_attention_is_compared_and_a_way_that_fails_is_an_entry(tmp_path):
    lines, path = [], tmp_path / "attention.json"
    settings = attention_bench.AttentionSettings(chunks=(2,), chunk_tokens=128, heads=1, head_dim=8, repeats=1)
    attention_bench.bench_attention(settings, path, lines.append)
    errors, case = json.loads(path.read_text())
    assert all(error < 1e-5 for name in ("merged", "plain") for error in errors["errors"][name].values())
    assert "CPU" in case["ways"]["flex"]["failed"]  # FlexAttention has no backward there
    assert case["visible_pairs"] == 2 * 3 * 128**2 and case["ways"]["merged"]["forward_backward_seconds"] > 0
    assert any("merged" in line and "TFLOP/s" in line for line in lines)


def small(**changes):
    return TrainSettings(**({"model": "tiny", "frames": (8,), "layouts": ("none",), "layers": 1, "steps": 2, "warmup": 0} | changes))


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_a_step_is_measured(tmp_path, recompute):
    lines, path = [], tmp_path / "train.json"
    (entry,) = bench_train(small(recompute=recompute), path, lines.append)
    flops = training_flops(8, train_bench.replace(TINY.dit, layers=1), chunk_frames=8, frame_tokens=60, text_keys=64)
    assert entry["status"] == "done" and entry["flops_per_step"] == flops
    assert entry["utilisation"] == pytest.approx(flops / entry["seconds_per_step"] / 989e12)
    assert entry["tokens_per_second"] == pytest.approx(2 * 8 * 60 / entry["seconds_per_step"])
    assert json.loads(path.read_text()) == [entry] and any("s/step" in line for line in lines)


def test_a_case_without_memory_is_recorded_and_tried_with_fewer_layers(tmp_path, monkeypatch):
    real = train_bench.TrainingStep.take

    def take(step):
        if step.dims.layers == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 106 GiB.\nMore words.")
        real(step)

    monkeypatch.setattr(train_bench.TrainingStep, "take", take)
    path, lines = tmp_path / "train.json", []
    entries = bench_train(small(layers=2, fallback_layers=1, steps=1), path, lines.append)
    assert [(e["layers"], e["keep_reads"], e["status"]) for e in entries] == [*[(2, keep, "out of memory") for keep in (2, 1, 0)], (1, 1, "done")]
    assert entries[0]["message"] == "CUDA out of memory. Tried to allocate 106 GiB."
    assert bench_train(small(layers=1, steps=1), path, lines.append, resume=True) == entries
    assert any("in the record already" in line for line in lines)
    assert bench_train(small(layers=2, fallback_layers=1, steps=1), path, lines.append, resume=True) == entries


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def broken(step):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train_bench.TrainingStep, "take", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        bench_train(small(), None, lambda line: None)


def test_no_case_begins_late():
    assert bench_train(small(seconds=-1.0), None, lambda line: None) == []


def test_a_record_shows_what_was_begun(tmp_path):
    path = tmp_path / "record.json"
    head = {"benchmark": "x", **surroundings(torch.device("cpu"), 1)}
    record = Record(path, head)
    record.start({"frames": 8})
    assert json.loads(path.read_text()) == [{"frames": 8, "status": STARTED, **head}]
    record.finish({"seconds": 2.0})
    row = {"frames": 8, "status": "done", "seconds": 2.0, **head}
    again = Record(path, {"benchmark": "x", "date": "later"}, resume=True)
    assert again.done({"frames": 8}) and not again.done({"frames": 16})
    again.start({"frames": 16})
    assert json.loads(path.read_text()) == [row, {"frames": 16, "status": STARTED, "benchmark": "x", "date": "later"}]


def test_a_row_names_what_it_ran_on():
    found = surroundings(torch.device("cpu"), 2)
    assert set(found) == {"hardware", "commit", "date", "versions"} and found["hardware"].startswith("cpu")
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["processes"] == 2


@pytest.mark.parametrize("content", ["{", "1", "[1]", '{"benchmark": "x", "cases": []}', '[{"benchmark": "y", "status": "done"}]', '[{"benchmark": "x"}]'])
def test_what_is_no_record_is_not_resumed(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(InputError, match="not a record of bench x") as refused:
        Record(path, {"benchmark": "x"}, resume=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"frames": (12,)}, "chunks of 8"),
        ({"layouts": ("balanced",)}, "launch with torchrun"),
        ({"layouts": ("even",)}, "none of none, contiguous, balanced"),
        ({"fsdp": "some"}, "--fsdp 'some'"),
        ({"recompute": "half"}, "none, blocks"),
        ({"layers": 99}, "1 to 8"),
        ({"window": 1}, "--window 1"),
    ],
)
def test_what_cannot_run_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        bench_train(small(**changes), None, lambda line: None)
    with pytest.raises(InputError, match="whole blocks"):
        attention_bench.AttentionSettings(chunk_tokens=100).check()


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_a_step_in_low_precision_is_measured(precision):
    (entry,) = bench_train(small(precision=precision, steps=1, profile=False), None, lambda line: None)
    assert entry["status"] == "done" and entry["seconds_per_step"] > 0
    with pytest.raises(InputError, match="--precision 'fp5' is none of bf16, fp8, nvfp4"):
        bench_train(small(precision="fp5"), None, lambda line: None)

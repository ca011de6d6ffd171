"""The bench: its schema, what it counts, and a tiny run on the CPU."""

import json
from pathlib import Path

import numpy as np
import pytest

from effattn_lite import registry
from effattn_lite.bench import cached, record, roofline, suite, time_op
from effattn_lite.bench.rows import row_of

RESULTS = sorted((Path(__file__).parents[2] / "book" / "_results").glob("*.json"))
TINY = {"copy_tb_s": 0.01, "product_tflop_s": 0.1}


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_recorded_results_fit_the_schema(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    record.check(found)
    assert found["name"] == path.stem


@pytest.mark.parametrize("name", [*registry.names("op"), "block_sparse_attention"])
def test_a_tiny_run(name, tmp_path):
    rows = suite.rows_of(
        name, device="cpu", dtype="float32", ceiling=TINY, lengths=[24], report=lambda row: None
    )
    assert {"decode" if name in cached.FEATURES else "forward"} <= {row["pass"] for row in rows}
    assert ("step" in {row["pass"] for row in rows}) == row_of(name).stateful
    made = record.make(name, rows, device="cpu", ceilings=TINY, command="python -m effattn_lite bench")
    path = record.write(made, tmp_path)
    record.check(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("lost", [*record.SCHEMA, "ceilings", "ms", "versions.torch"])
def test_the_schema_names_what_is_missing(lost):
    row = {"op": "retnet", "impl": "torch", "shape": {}, "dtype": "float32", "pass": "forward", "ms": 1.0}
    made = record.make("retnet", [row], device="cpu", ceilings=TINY, command="")
    record.check(made)
    if lost == "ms":
        made["rows"][0]["ms"] = "fast"
    elif lost == "versions.torch":
        del made["versions"]["torch"]
    else:
        del made[lost]
    with pytest.raises(ValueError, match=lost.split(".")[-1]):
        record.check(made)


@pytest.mark.parametrize(
    "options, sees",
    [
        ({}, lambda t, j: j <= t),
        ({"causal": False}, lambda t, j: t + j >= 0),
        ({"window": 5}, lambda t, j: (j <= t) & (j > t - 5)),
        ({"window": 5, "sinks": 3}, lambda t, j: (j <= t) & ((j > t - 5) | (j < 3))),
        (
            {"sink_blocks": 1, "local_blocks": 2, "block_size": 4},
            lambda t, j: (j <= t) & ((j // 4 > t // 4 - 2) | (j // 4 < 1)),
        ),
    ],
    ids=["causal", "full", "window", "sinks", "blocks"],
)
def test_pairs_are_counted(options, sees):
    t = np.arange(23)
    assert roofline.pairs(23, **options) == sees(t[:, None], t).sum()


def test_ideal_counts_by_hand():
    sizes = dict(B=1, T=8192, H=16, HKV=16, HV=16, K=128, V=128)
    full = roofline.ideal("softmax_attention", sizes, {})
    assert full["bytes"] == 4 * 8192 * 16 * 128 * 2
    assert full["flops"] == 16 * (8192 * 8193 // 2) * 2 * 256
    linear = roofline.ideal("retnet", sizes, {}, backward=True)
    assert linear == {"bytes": 3 * full["bytes"], "flops": 3 * 4 * 8192 * 16 * 128 * 128}


def test_time_of_a_call_on_the_cpu():
    calls = []
    assert time_op.time_ms(lambda: calls.append(1), device="cpu", measure_ms=0.0) > 0
    assert len(calls) == 4

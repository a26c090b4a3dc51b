import dataclasses
import time

import pytest
import torch

from raytroupe.cluster.errors import ConfigError
from raytroupe.deploy.bench.gpu import tune_linear, tune_quantised, tuning_search
from raytroupe.deploy.bench.gpu.engine_models import LLAMA_3_8B, QWEN3_0_6B
from raytroupe.deploy.bench.gpu.tune_linear import Product, crossover, products_of, tune_product
from raytroupe.deploy.bench.gpu.tuning_search import NEVER, fastest
from raytroupe.kernels.gpu import eight_bit_linear, tuning
from raytroupe.kernels.gpu.eight_bit_linear import EightBitConfig
from raytroupe.kernels.gpu.linear import LinearConfig
from raytroupe.kernels.gpu.moe import BLOCK_ROWS, GroupedConfig
from raytroupe.kernels.gpu.quantised_linear import QuantisedConfig
from raytroupe.kernels.gpu.quantised_moe import GroupedQuantisedConfig
from raytroupe.kernels.gpu.tuning import DEFAULT, TuningTable, kind_of

CONFIGS = {
    "linear": LinearConfig,
    "gated_linear": LinearConfig,
    "experts_gate_up": GroupedConfig,
    "experts_down": GroupedConfig,
    "quantised_linear": QuantisedConfig,
    "quantised_gated_linear": QuantisedConfig,
    "eight_bit_linear": EightBitConfig,
    "eight_bit_gated_linear": EightBitConfig,
    "experts_quantised_gate_up": GroupedQuantisedConfig,
    "experts_quantised_down": GroupedQuantisedConfig,
}


@dataclasses.dataclass(frozen=True)
class Named:
    name: str


def table(kind, **kinds):
    """Entries as (for, outputs, inputs, name of the configuration)."""
    return TuningTable(
        {
            name: {
                "product": [
                    {"for": {"dtype": dtype}, "shape": {"outputs": n, "inputs": k}, "config": {"name": text}}
                    for dtype, n, k, text in entries
                ]
            }
            for name, entries in kinds.items()
        },
        kind,
    )


def find(where, outputs, inputs, dtype="half"):
    return where.find("product", Named, {"dtype": dtype}, {"outputs": outputs, "inputs": inputs}).name


def test_the_nearest_shape_counts_by_the_ratio_of_each_size():
    where = table(
        DEFAULT, default=[("half", 1024, 1024, "small"), ("half", 4096, 1024, "wide"), ("half", 1024, 8192, "long")]
    )
    assert find(where, 4096, 1024) == "wide"
    assert find(where, 1900, 1024) == "small"
    assert find(where, 2200, 1024) == "wide"
    assert find(where, 2048, 1024) == "small"  # as near as "wide", and before it
    assert find(where, 1, 10**6) == "long"


def test_what_is_for_another_dtype_never_counts():
    where = table(DEFAULT, default=[("half", 64, 64, "half"), ("float32", 10**6, 10**6, "float32")])
    assert find(where, 64, 64, "float32") == "float32"
    with pytest.raises(LookupError, match="float64"):
        find(where, 64, 64, "float64")


def test_a_kinds_own_entries_come_before_those_of_a_similar_kind_and_the_default():
    kinds = {"default": [("half", 64, 64, "default")], "h100": [("half", 64, 64, "h100")]}
    assert find(table("h100", **kinds), 64, 64) == "h100"
    assert find(table("h200", **kinds), 64, 64) == "h100"
    assert find(table("a100", **kinds), 64, 64) == "default"
    own = kinds | {"h200": [("half", 4096, 4096, "h200")]}
    assert find(table("h200", **own), 64, 64) == "h100"
    assert find(table("h200", **own), 2048, 4096) == "h200"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA Graphics Device", "nvidia_graphics_device"),
    ],
)
def test_kind_of_a_gpu(name, kind):
    assert kind_of(name) == kind


def test_a_cpu_has_the_default_table():
    found = tuning.load_tuning(torch.device("cpu")).find(
        "linear", LinearConfig, {"dtype": "half"}, {"outputs": 4096, "inputs": 4096}
    )
    default = TuningTable(tuning.read(), DEFAULT)
    assert found == default.find("linear", LinearConfig, {"dtype": "half"}, {"outputs": 4096, "inputs": 4096})


def test_the_default_entries_cover_what_kernels_ask_for():
    default = TuningTable(tuning.read(), DEFAULT)
    shape = {"outputs": 333, "inputs": 777}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        exact = {"dtype": tuning.dtype_name(dtype)}
        for kernel in ("linear", "gated_linear"):
            default.find(kernel, LinearConfig, exact, shape)
        for kernel in ("experts_gate_up", "experts_down"):
            for rows, _ in BLOCK_ROWS:
                default.find(kernel, GroupedConfig, exact | {"block_m": rows}, shape)
        for bits in (4, 8):
            for kernel in ("quantised_linear", "quantised_gated_linear"):
                default.find(kernel, QuantisedConfig, exact | {"bits": bits}, shape)
            for kernel in ("experts_quantised_gate_up", "experts_quantised_down"):
                for rows, _ in BLOCK_ROWS:
                    default.find(kernel, GroupedQuantisedConfig, exact | {"bits": bits, "block_m": rows}, shape)
    for values in ("int8", "float8"):
        for kernel in ("eight_bit_linear", "eight_bit_gated_linear"):
            for rows, _ in eight_bit_linear.BLOCK_ROWS:
                default.find(kernel, EightBitConfig, {"values": values, "block_m": rows}, shape)


def test_every_entry_of_the_file_is_complete():
    for kernels in tuning.read().values():
        for kernel, entries in kernels.items():
            keys = [(entry["for"], entry["shape"]) for entry in entries]
            assert all(keys.count(key) == 1 for key in keys)
            for entry in entries:
                assert entry["source"] in ("measured", "reasoned")
                if kernel in CONFIGS:
                    config = CONFIGS[kernel](**entry["config"])
                    tile = (config.block_n, getattr(config, "block_k", 1), config.warps)
                    assert all(size & (size - 1) == 0 for size in tile)
                    assert min(tile) >= 1


def test_the_file_is_as_the_tuner_writes_it(tmp_path):
    written = tmp_path / "tuning.json"
    tuning.write(tuning.read(), written)
    assert written.read_text() == tuning.FILE.read_text()
    assert tuning.read(written) == tuning.read()


def test_a_new_entry_takes_the_place_of_the_old_one():
    content = {}
    shape = {"outputs": 1, "inputs": 2}
    first = {"for": {"dtype": "half"}, "shape": shape, "config": {"a": 1}, "source": "reasoned"}
    second = {"for": {"dtype": "float32"}, "shape": shape, "config": {"a": 2}, "source": "reasoned"}
    newer = first | {"config": {"a": 3}, "source": "measured"}
    for entry in (first, second, newer):
        tuning.replace(content, "h100", "linear", entry)
    assert content == {"h100": {"linear": [newer, second]}}


def test_the_search_stops_at_the_deadline_with_the_best_so_far():
    times = {"a": 3.0, "b": 1.0, "c": 2.0, "too large": NEVER}
    later, past = time.monotonic() + 60, time.monotonic() - 1
    assert fastest(times, times.__getitem__, later) == "b"
    assert fastest(times, times.__getitem__, past) == "a"
    assert fastest(["too large", "c", "b"], times.__getitem__, past) == "c"
    with pytest.raises(ConfigError, match="no configuration fits"):
        fastest(["too large"], times.__getitem__, later)


def test_crossover_is_where_all_times_together_are_least():
    assert crossover({1: 1.0, 2: 2.0, 4: 9.0}, {1: 2.0, 2: 2.5, 4: 3.0}) == 2
    assert crossover({1: 3.0, 2: 3.0}, {1: 1.0, 2: 1.0}) == 0
    assert crossover({1: 1.0, 2: 1.0}, {1: 3.0, 2: 3.0}) == 2
    assert crossover({1: 1.1, 2: 1.0, 4: NEVER}, {1: 1.0, 2: 3.0, 4: 1.0}) == 2


def test_products_of_the_models():
    assert products_of(LLAMA_3_8B) == [
        Product(6144, 4096), Product(4096, 4096), Product(14_336, 4096, gated=True), Product(4096, 14_336),
        Product(128_256, 4096),
    ]  # fmt: skip
    assert products_of(QWEN3_0_6B)[:3] == [Product(4096, 1024), Product(1024, 2048), Product(3072, 1024, gated=True)]


@pytest.mark.launches("few_rows_linear_kernel")
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_is_tuned_into_an_entry_that_is_found_again(gated, monkeypatch):
    monkeypatch.setattr(tune_linear, "ROWS", (1, 3))
    monkeypatch.setattr(tune_linear, "REPEATS", 1)
    product = Product(24, 64, gated=gated, dtype=torch.float32)
    (tuned,) = tuning_search.run_all(
        [lambda device, deadline: tune_product(product, device, deadline)], torch.device("cpu"), time.monotonic()
    )
    content = tuning.read()
    tuning.replace(content, "h100", tuned.kernel, tuned.entry)
    found = TuningTable(content, "h100").find(
        "gated_linear" if gated else "linear", LinearConfig, {"dtype": "float32"}, {"outputs": 24, "inputs": 64}
    )
    assert found.max_rows in (0, 1, 3)
    assert dataclasses.asdict(found) == tuned.entry["config"]
    assert [row["rows"] for row in tuned.rows] == [1, 3]


@pytest.mark.launches("few_rows_quantised_kernel", "dequantise_kernel", "eight_bit_linear_kernel")
@pytest.mark.parametrize("gated", [False, True])
def test_products_with_quantised_weights_are_tuned_into_entries_that_are_found_again(gated, monkeypatch):
    for name, value in (("ROWS", (1, 3)), ("TUNED_ROWS", (1,)), ("TYPICAL", {16: 2}), ("REPEATS", 1)):
        monkeypatch.setattr(tune_quantised, name, value)
    product = Product(16, 64, gated=gated)
    tasks = [
        lambda device, deadline: tune_quantised.tune_quantised(product, 4, device, deadline),
        lambda device, deadline: tune_quantised.tune_eight_bit(product, "int8", 16, device, deadline),
    ]
    tuned = list(tuning_search.run_all(tasks, torch.device("cpu"), time.monotonic()))
    content = tuning.read()
    for one in tuned:
        tuning.replace(content, "h100", one.kernel, one.entry)
        found = TuningTable(content, "h100").find(
            one.kernel, CONFIGS[one.kernel], one.entry["for"], {"outputs": 16, "inputs": 64}
        )
        assert dataclasses.asdict(found) == one.entry["config"]
    assert [[row["rows"] for row in one.rows] for one in tuned] == [[1, 3], [2]]

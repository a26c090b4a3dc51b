"""torch.distributed over gloo between real processes, and what happens when one is missing."""

import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch
from paged_batch import CPU, random_sequences, run_over_gloo, run_shard
from tiny_models import VOCAB_SIZE, make_tiny_model

from raytroupe.actors.collectives import SingleShard, connect, rendezvous_socket
from raytroupe.cluster.errors import EngineError
from raytroupe.cluster.topology import ShardLayout, all_layouts


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def test_four_processes_give_one_shards_logits(tmp_path):
    sequences = random_sequences([30, 21], VOCAB_SIZE)
    # More steps than stages keep unfinished sends for, so that old ones are waited for as well.
    steps = [[(0, 0, 19), (1, 0, 10)]] + [[(0, 19 + i, 1), (1, 10 + i, 1)] for i in range(11)]
    folders = [make_tiny_model(family, tmp_path / family) for family in ("llama3", "olmo2", "qwen2_moe")]
    expected = [run_shard(folder, ShardLayout(), SingleShard(), sequences, steps) for folder in folders]
    layouts, address = all_layouts(2, 2), free_address()
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_over_gloo, folders, layout, address, sequences, steps) for layout in layouts]
        results = [future.result(timeout=120) for future in futures]
    for layout, of_models in zip(layouts, results, strict=True):
        if not layout.last_stage:
            assert of_models == [[], [], []]
            continue
        for logits, whole in zip(of_models, expected, strict=True):
            for mine, theirs in zip(logits, whole, strict=True):
                torch.testing.assert_close(torch.from_numpy(mine), theirs, rtol=0, atol=1e-4)


def test_a_shard_that_waits_in_vain_says_for_whom():
    with pytest.raises(EngineError, match=r"rank 0 of 2 could not meet its peers at tcp://127\.0\.0\.1:\d+ in 1 s"):
        connect(ShardLayout(tp_rank=0, tp_size=2), free_address(), 1.0, CPU)
    assert not torch.distributed.is_initialized()


def listening_addresses(layout: ShardLayout, init_method: str) -> list[str]:
    """Where this process listens while it is a member of a group."""
    collectives = connect(layout, init_method, 60.0, CPU)
    assert collectives.all_reduce(torch.ones(1)).item() == layout.tp_size
    listening = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    torch.distributed.barrier()
    collectives.close()
    return listening


def test_shards_of_one_node_listen_on_loopback_only():
    layouts, address = all_layouts(2, 1), free_address()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(listening_addresses, layout, address) for layout in layouts]
        listening = [future.result(timeout=120) for future in futures]
    assert len(listening[0]) > len(listening[1]) > 0, "rank 0 holds the rendezvous as well"
    assert {ip for addresses in listening for ip in addresses} == {"127.0.0.1"}


def test_the_rendezvous_takes_over_the_socket_that_rank_0_keeps():
    listener = rendezvous_socket("127.0.0.1")
    port = listener.getsockname()[1]
    with pytest.raises(OSError, match="in use"):
        rendezvous_socket("127.0.0.1", port)
    layout = ShardLayout(tp_rank=0, tp_size=2)
    with pytest.raises(EngineError, match="could not meet its peers"):
        connect(layout, f"tcp://127.0.0.1:{port}", 0.5, CPU, listener.detach())
    rendezvous_socket("127.0.0.1", port).close()  # closed with the attempt


def test_a_single_shard_needs_no_peers():
    collectives = connect(ShardLayout(), "", 1.0, CPU)
    assert isinstance(collectives, SingleShard)
    x = torch.arange(6.0).view(2, 3)
    assert collectives.all_reduce(x) is x
    assert collectives.all_gather_last_dim(x) is x
    collectives.close()

"""Every answer of the CPU platform is still asked for by the installed Megatron-Core."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mmoe.parallel import engine

NEEDED = {
    "devices": ("distributed/param_and_grad_buffer.py", "device=torch.cuda.current_device()"),
    "streams": ("distributed/distributed_data_parallel.py", "torch.cuda.Stream("),
    "random states": ("tensor_parallel/random.py", "torch.cuda"),
    "factories in the schedule": ("pipeline_parallel/schedules.py", 'torch.zeros([], dtype=torch.int, device="cuda")'),
    "factories in the optimizer": ("optimizer/optimizer.py", "dtype=torch.float, device='cuda')"),
    "type strings": ("optimizer/optimizer.py", "param.type() == 'torch.cuda.FloatTensor'"),
}


def core() -> Path:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.mark.parametrize("name", NEEDED)
def test_still_needed(name: str) -> None:
    file, text = NEEDED[name]
    assert text in (core() / file).read_text(), f"{file} no longer has {text}: drop the answer from cpu_platform"


def test_triton_is_imported_unguarded_where_paged_stash_exists() -> None:
    file = core() / "transformer" / "moe" / "ops" / "paged_stash.py"
    assert not file.exists() or "\nimport triton\n" in file.read_text()


def test_device_contexts_still_reach_every_factory() -> None:
    """transformers builds its models under `with torch.device("meta")`."""
    assert engine.cpu_platform.backend() == ("nccl" if torch.cuda.is_available() else "gloo")
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
        assert torch.empty(2).is_meta
        assert torch.arange(3).is_meta
        assert torch.tensor([1.0]).is_meta


@pytest.mark.skipif(torch.cuda.is_available(), reason="the platform does nothing where CUDA is there")
def test_cuda_means_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert engine.cpu_platform.device().type == "cpu"

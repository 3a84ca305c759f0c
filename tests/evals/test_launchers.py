"""What torchrun, Slurm and Open MPI tell a process: its share of a run, and its GPU."""

import pytest

import kimi_linear as kl
from kimi_linear import evals
from kimi_linear.evals.shards import shard_of


@pytest.mark.parametrize(
    "environment,want",
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6"}, (5, 6)),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (0, 2)),
        ({"SLURM_NTASKS": "4"}, (0, 1)),  # an allocation, but not a task of it
    ],
)
def test_shards_of_launchers(environment, want):
    assert shard_of(environment) == want


ONE, TWO = {"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "4,5"}


@pytest.mark.parametrize(
    "environment,gpus,want",
    [
        ({}, 2, "auto"),
        ({"LOCAL_RANK": "1"}, 2, "cuda:1"),
        ({"LOCAL_RANK": "0"}, 2, "cuda:0"),
        ({"SLURM_LOCALID": "1", **TWO}, 2, "cuda:1"),
        ({"SLURM_LOCALID": "3", **ONE}, 1, "auto"),  # bound to a GPU of its own
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 0, "auto"),  # on CPUs
        ({"LOCAL_RANK": "2"}, 2, None),
    ],
)
def test_devices_of_launchers(monkeypatch, environment, gpus, want):
    def shared(name, index=0):
        if index >= gpus:
            raise kl.DeviceError(f"there is no {name}:{index}")

    monkeypatch.setattr("kimi_linear._backends.shared", shared)
    if want is None:
        with pytest.raises(kl.DeviceError, match="cuda:2"):
            evals.local_device(environment)
    else:
        assert evals.local_device(environment) == want


@pytest.mark.parametrize("rank,world", [("a", "2"), ("-1", "2"), ("2", "2"), ("0", "0")])
def test_wrong_variables(rank, world):
    with pytest.raises(ValueError):
        shard_of({"RANK": rank, "WORLD_SIZE": world})

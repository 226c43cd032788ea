"""One update: what it returns is checked by the runs of test_train.py; here, what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import LaunchDeepspeed

from moepp_ds.update import _on_device


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_tokens_reach_the_device_as_int64(device: str, dtype: type[np.integer]) -> None:
    tokens_BS1 = np.arange(6, dtype=dtype).reshape(2, 3)
    on_device = _on_device(tokens_BS1, torch.device(device))
    assert (on_device.dtype, on_device.device.type) == (torch.int64, device)
    assert on_device.tolist() == tokens_BS1.tolist()


@pytest.mark.dist
def test_a_gradient_that_is_no_number_is_traced_to_its_rows(launch_deepspeed: LaunchDeepspeed) -> None:
    """Every loss is finite, one micro batch of rank 1 is not: both ranks name it, and no weight has changed.

    16 rows in micro batches of 4: rank 1 has rows 4 to 7, and 12 to 15 in the second accumulation step.
    """
    done = launch_deepspeed(2, "tests.programs.bad_gradient")
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    assert sorted(report["rank"] for report in reports) == [0, 1], done.stdout[-3000:]
    for report in reports:
        assert report["said"].startswith(
            "gradient of update 1 is not finite although every loss is: rank 1 rows 12 to 15; the weights were not"
        )
        assert report["weights_same"]

import torch

from diptych.cluster.gpus import visible_gpus


def test_launcher_counts_the_gpus_that_workers_will_see() -> None:
    assert visible_gpus() == torch.cuda.device_count()

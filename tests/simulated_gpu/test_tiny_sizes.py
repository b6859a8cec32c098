"""The tiny models of these tests have the sizes that the figures of the other tests rest on."""

from __future__ import annotations

import pytest
from torch import nn

from simulated_gpu.gpu_runs import VARIANTS, tiny_files
from trainers.checkpoint import Checkpoint
from trainers.family import detect

NF4_BLOCK = 64


@pytest.mark.parametrize("variant_id", VARIANTS)
def test_rows_are_as_long_as_bitsandbytes_decodes_rightly(variant_id: str) -> None:
    """Its CPU kernel decodes shorter rows of nf4 wrongly, on the simulated GPU and on the CPU alike: wrong was compared with wrong."""
    family, _ = VARIANTS[variant_id]
    job = tiny_files(family.id, variant_id)
    detection = detect(Checkpoint.open(job.base.transformer), variant_id)
    transformer = family.build(detection.config)
    blocks = [block for path in family.blocks for block in transformer.get_submodule(path).children()]
    rows = {linear.in_features for block in blocks for linear in block.modules() if isinstance(linear, nn.Linear)}
    assert min(rows) >= NF4_BLOCK
    assert len(blocks) >= 3, "as many as slots would be no streaming"

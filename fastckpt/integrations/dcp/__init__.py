"""Storage for torch.distributed.checkpoint: what `dcp.save`, `dcp.async_save` and `dcp.load` write to and read from.

    dcp.save(state, checkpoint_id="s3://bucket/run/step-100", storage_writer=FastckptWriter())
    dcp.load(state, checkpoint_id="s3://bucket/run/step-100", storage_reader=FastckptReader())

    planner ─→ items ─→ writing/rank.upload ─→ packs, votes      votes ─→ layout ─→ planner ─→ reading/assembly ─→ tensors, in place
    torch's    state    on every rank          turns: one commit           torch's Metadata

A checkpoint_id is a repository (docs/format.md, section 11) of one living checkpoint. docs/how-to/dcp.md shows how it is used.
"""

from fastckpt.integrations.dcp.planner import FastckptSavePlanner
from fastckpt.integrations.dcp.reader import FastckptReader
from fastckpt.integrations.dcp.writer import FastckptWriter

__all__ = ["FastckptReader", "FastckptSavePlanner", "FastckptWriter"]

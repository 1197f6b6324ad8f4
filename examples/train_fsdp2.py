"""Training with FSDP2 (fully_shard) that may be killed at any moment, and goes on bit for bit when it is started again:

torchrun --nproc-per-node 2 examples/train_fsdp2.py DIR_OR_S3_URL [--steps 40] [--every 10] [--digest]
"""

import argparse
import hashlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastckpt

BATCH, WIDTH, LAYERS = 8, 64, 3

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--every", type=int, default=10, help="steps between saves")
parser.add_argument("--digest", action="store_true", help="print a digest of this rank's state at the end")
args = parser.parse_args()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, mesh = dist.get_rank(), init_device_mesh(device.type, (dist.get_world_size(),))
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS))).to(device)
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after fully_shard: of this rank's shards
state = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState()}
with fastckpt.Checkpointer(args.url, state, every=fastckpt.Every(steps=args.every)) as ckpt:
    for step in range(ckpt.restore(), args.steps):  # every rank makes the same calls
        samples = torch.Generator().manual_seed(step * dist.get_world_size() + rank)
        optimizer.zero_grad()
        model(torch.randn(BATCH, WIDTH, generator=samples).to(device)).pow(2).mean().backward()
        optimizer.step()
        if ckpt.step(step + 1):  # a notice to one rank ends all of them at one step
            break
    else:
        ckpt.save_now(args.steps)
if args.digest:
    tensors = [*model.parameters(), *(t for one in optimizer.state.values() for t in one.values())]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    found = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in local))
    print(f"rank {rank}: {found.hexdigest()}", flush=True)
dist.destroy_process_group()
sys.exit(ckpt.exit_code)

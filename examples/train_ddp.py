"""Data-parallel training (DDP) that may be killed at any moment, and goes on bit for bit when it is started again:

torchrun --nproc-per-node 2 examples/train_ddp.py DIR_OR_S3_URL [--steps 40] [--every 10] [--digest]
"""

import argparse
import hashlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import fastckpt

BATCH, SAMPLES, WIDTH = 8, 256, 64


def batch_of(step: int, data: torch.Tensor) -> torch.Tensor:
    """This rank's samples of a step. Their order depends on the epoch alone, so a run that goes on sees what it would have seen."""
    rank, world = dist.get_rank(), dist.get_world_size()
    epoch, number = divmod(step, SAMPLES // (BATCH * world))
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
    return data[order[rank::world][number * BATCH : (number + 1) * BATCH]]


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
torch.manual_seed(0)
data = torch.randn(SAMPLES, WIDTH).to(device)
net = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH))
model = nn.parallel.DistributedDataParallel(net.to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(dist.get_rank())  # each rank drops other values: generators are saved for each rank
state = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState()}
with fastckpt.Checkpointer(args.url, state, every=fastckpt.Every(steps=args.every)) as ckpt:
    for step in range(ckpt.restore(), args.steps):  # every rank makes the same calls
        optimizer.zero_grad()
        model(batch_of(step, data)).pow(2).mean().backward()
        optimizer.step()
        if ckpt.step(step + 1):  # a notice to one rank ends all of them at one step
            break
    else:
        ckpt.save_now(args.steps)
if args.digest:
    tensors = [*net.parameters(), *(t for one in optimizer.state.values() for t in one.values())]
    found = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in [*tensors, torch.get_rng_state()]))
    print(f"rank {dist.get_rank()}: {found.hexdigest()}", flush=True)
dist.destroy_process_group()
sys.exit(ckpt.exit_code)

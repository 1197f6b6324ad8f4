"""Training with FSDP2 (fully_shard) that may be killed at any moment, and goes on bit for bit when it is started again:

torchrun --nproc-per-node 2 examples/train_fsdp2.py DIR_OR_S3_URL [--steps 40] [--every 10] [--digest]

With another --nproc-per-node it goes on too: no sample of an epoch is lost or seen twice.
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

BATCH, SAMPLES, WIDTH, LAYERS = 24, 256, 64, 3  # BATCH: samples of an optimizer step, of all ranks together

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
data = torch.randn(SAMPLES, WIDTH).to(device)
model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS))).to(device)
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after fully_shard: of this rank's shards
sampler = fastckpt.ElasticSampler(SAMPLES, batch_size=BATCH, endless=True)
state = {"model": model, "optimizer": optimizer, "sampler": sampler, "rng": fastckpt.RNGState()}
every = fastckpt.Every(steps=args.every)
# On another number of ranks each goes on with the generators of the saved rank of its number.
reassign = lambda name, states, rank, world: states[rank % len(states)]  # noqa: E731
with fastckpt.Checkpointer(args.url, state, every=every, reassign=reassign) as ckpt:
    for step, samples in zip(
        range(ckpt.restore(), args.steps), sampler, strict=False
    ):  # every rank makes the same calls
        loss = model(data[samples]).pow(2).mean() * sampler.weight()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ckpt.step(step + 1):  # a notice to one rank ends all of them at one step
            break
    else:
        ckpt.save_now(args.steps)
if args.digest:
    tensors = [*model.parameters(), *(t for one in optimizer.state.values() for t in one.values())]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    found = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in local))
    sys.stdout.write(f"rank {rank}: {found.hexdigest()}\n")  # as one write: torchrun's workers are not buffered
dist.destroy_process_group()
sys.exit(ckpt.exit_code)

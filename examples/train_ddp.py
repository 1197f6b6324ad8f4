"""Data-parallel training (DDP) that may be killed at any moment, and goes on bit for bit when it is started again:

torchrun --nproc-per-node 2 examples/train_ddp.py DIR_OR_S3_URL [--steps 40] [--every 10] [--digest]

With another --nproc-per-node it goes on too: no sample of an epoch is lost or seen twice.
"""

import argparse
import hashlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import fastckpt

BATCH, SAMPLES, WIDTH = 24, 256, 64  # samples of an optimizer step, of all ranks together; of an epoch

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
    tensors = [*net.parameters(), *(t for one in optimizer.state.values() for t in one.values())]
    found = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in [*tensors, torch.get_rng_state()]))
    print(f"rank {dist.get_rank()}: {found.hexdigest()}", flush=True)
dist.destroy_process_group()
sys.exit(ckpt.exit_code)

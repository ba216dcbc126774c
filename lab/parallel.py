"""Several processes as one: what torchrun starts on one machine or several, each with a GPU of its own.

    torchrun --nproc-per-node 8 grpo.py --model DIR --data FILE --out DIR

All run the same script and hold the same weights to the bit. They share out what takes time: the prompts that are
sampled (`shared`, here), the completions that are judged and the rows of a step (grpo.share, sft.micro_batches), whose
gradients are summed once a step. All else each does alike, with the same random numbers. The first one writes, prints
and decides what depends on the time.
"""

import json
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

MINUTES = float(os.environ.get("RANK_TIMEOUT", 30))  # to wait for the slowest process


def rank():
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


@contextmanager
def processes():
    """Within the block the processes of torchrun know one another; without torchrun nothing changes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=MINUTES))
    dist.watchers = dist.new_group(backend="gloo")
    check_sum()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    yield
    wait()
    dist.destroy_process_group()


def check_sum():
    """Raises ValueError where a known gradient does not come to the sum of all."""
    n = dist.get_world_size()
    known = torch.full((3,), rank() + 1.0, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(known)
    if known.tolist() != [n * (n + 1) / 2] * 3:
        raise ValueError(f"{dist.get_backend()} of torch {torch.__version__} makes {known[0]} of the sum of 1 to {n}")


def wait():
    """Until all processes are here. Raises RuntimeError, which names those that are missing, after MINUTES."""
    if dist.is_initialized():
        dist.monitored_barrier(dist.watchers, timedelta(minutes=MINUTES), wait_all_ranks=True)


def is_of_processes(error):
    """Whether it says that another process has died or does not come."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "monitoredBarrier" in str(error)


def missing(error):
    """A line on who is missing, as far as this process can see."""
    try:
        dist.monitored_barrier(dist.watchers, timedelta(seconds=10), wait_all_ranks=True)
    except (RuntimeError, KeyboardInterrupt) as seen:  # who waits is ended by torchrun meanwhile
        error = seen if str(seen) else error
    return f"a process has died or does not come: {str(error).partition(chr(10))[0]}"


def first(value):
    """The first process's value, which JSON can hold, in all of them."""
    if not dist.is_initialized():
        return value
    content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    return json.loads(bytes(gather(content)[0].tolist()))


def gather(t):
    """[the tensor of each process], of as many rows as each has."""
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(t)]))
    most = max(int(count) for count in counts)
    padded = torch.cat((t, t.new_zeros(most - len(t), *t.shape[1:])))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:int(count)] for part, count in zip(parts, counts)]


def shared(generate):
    """A generate, as grpo.train takes it, whose prompts the processes share out; all get all of its completions.

    The generator, alike in all, gives each process a seed and then stands alike again: saved by one, it is that of all.
    """
    def sample(model, prompts, n=1, *, generator, kept=None, **settings):
        if not dist.is_initialized():
            return generate(model, prompts, n=n, generator=generator, **settings, **passed(kept))
        seed = torch.randint(2 ** 62, (), generator=generator, device=generator.device).item() + rank()
        own = prompts[rank()::dist.get_world_size()] or prompts[:1]  # without a prompt: one that nobody keeps
        own_generator, own_kept = torch.Generator(generator.device).manual_seed(seed), None if kept is None else []
        results = generate(model, own, n=n, generator=own_generator, **settings, **passed(own_kept))
        wait()
        ids, lengths, logprobs = (gather(result) for result in results)
        if kept is not None:
            kept += in_order(gather_sets(own_kept, lengths, ids[0].device), len(prompts), n)
        return tuple(torch.stack(in_order(parts, len(prompts), n)) for parts in (ids, lengths, logprobs))

    return sample


def passed(kept):
    return {} if kept is None else {"kept": kept}


def in_order(parts, prompts, n):
    """The rows of `prompts` prompts, n each, as they were before the processes shared them out."""
    return [parts[i % len(parts)][i // len(parts) * n + j] for i in range(prompts) for j in range(n)]


def gather_sets(own, lengths, device):
    """What top-p kept in each process: for each of its rows so many sets of ids as `lengths` says."""
    sets = [ids for row in own for ids in row]
    values, sizes = gather(torch.cat(sets)), gather(torch.tensor([len(ids) for ids in sets], device=device))
    parts = []
    for ids, of_sets, of_rows in zip(values, sizes, lengths):
        pieces = iter(ids.split(of_sets.tolist()))
        parts.append([[next(pieces) for _ in range(length)] for length in of_rows.tolist()])
    return parts

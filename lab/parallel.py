"""Several processes as one: what torchrun starts on one machine or several, each with a GPU of its own.

    torchrun --nproc-per-node 8 grpo.py --model DIR --data FILE --out DIR

All run the same script and hold the same weights, bit for bit (lab/sharding.py: a part of them). They share out what
takes time: the prompts that are sampled (`shared`, here), the completions that are judged and the rows of a step
(grpo.share, sft.micro_batches), whose gradients are summed once a step. Everything else each does in the same way, with
the same random numbers. The first one writes, prints, and decides what depends on the clock, such as when to save.
"""

import json
import os
import sys
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

MINUTES = float(os.environ.get("RANK_TIMEOUT", 30))  # to wait for the slowest process
barrier_group = None  # of gloo alone: no other backend's barrier can name who is late


def is_under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank():
    """This process's number, from 0; before it has joined the others, as torchrun has told it."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if is_under_torchrun() else 0


@contextmanager
def processes():
    """Within the block the processes of torchrun know one another; without torchrun nothing changes.

    One that fails dies at once, and torchrun ends the others: waiting for them would hang.
    """
    if not is_under_torchrun() or dist.is_initialized():
        yield
        return
    global barrier_group
    time, backend = timedelta(minutes=MINUTES), "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=time)
    barrier_group = dist.new_group(backend="gloo", timeout=time)
    check_all_reduce()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with redirect_stdout(sys.stdout if rank() == 0 else nowhere):
            yield
    wait()
    dist.destroy_process_group()


def check_all_reduce():
    """Raises ValueError where known numbers do not come to their sum."""
    n = dist.get_world_size()
    known = torch.full((3,), rank() + 1.0, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(known)
    if known.tolist() != [n * (n + 1) / 2] * 3:
        raise ValueError(f"{dist.get_backend()} of torch {torch.__version__}: the sum of 1 to {n} is {known.tolist()}")


def wait():
    """Until all processes are here. Raises RuntimeError after MINUTES; the first one's names those that are late."""
    if dist.is_initialized():
        dist.monitored_barrier(barrier_group, timedelta(minutes=MINUTES), wait_all_ranks=True)


def peer_failed(error):
    """Whether a RuntimeError means that another process has died or is late. (NCCL ends a process without one.)"""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error) or "monitoredBarrier" in str(error)


def describe_peer_failure(error):
    """One line; it names the missing processes where this one can see them within 10 seconds."""
    if barrier_group is not None and "monitoredBarrier" not in str(error):
        try:
            dist.monitored_barrier(barrier_group, timedelta(seconds=10), wait_all_ranks=True)
        except RuntimeError as seen:
            error = seen
        except KeyboardInterrupt:  # torchrun's SIGTERM (lab/checkpoint.py: hear_sigterm)
            pass
    return f"a process has died or is late: {str(error).splitlines()[0]}"


def first(value):
    """The first process's value, which JSON can hold, in all of them. Without torchrun the value."""
    if not dist.is_initialized():
        return value
    content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    return json.loads(bytes(gather_rows(content)[0].tolist()))


def gather_rows(t):
    """[the tensor of each process], in all of them; the numbers of rows may differ, the rest of the shape may not."""
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(t)]))
    most = max(int(count) for count in counts)
    padded = torch.cat((t, t.new_zeros(most - len(t), *t.shape[1:])))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:int(count)] for part, count in zip(parts, counts)]


def shared(generate):
    """A generate, as grpo.train takes it, whose prompts the processes share out; all get all of its completions.

    All draw one number from the common generator, which so stays the same in all: any one can save it. A process's own
    seed is this number plus its rank; another number of processes samples other completions.
    """
    def sample(model, prompts, n=1, *, generator, **settings):
        if not dist.is_initialized():
            return generate(model, prompts, n=n, generator=generator, **settings)
        seed = torch.randint(2 ** 62, (), generator=generator, device=generator.device).item() + rank()
        own = prompts[rank()::dist.get_world_size()] or prompts[:1]  # without a prompt: the first, dropped in in_order
        own_generator = torch.Generator(generator.device).manual_seed(seed)
        results = generate(model, own, n=n, generator=own_generator, **settings)
        wait()  # names who is late; the messages below would only time out
        ids, lengths, logprobs = (gather_rows(result) for result in results)
        return tuple(torch.stack(in_order(parts, len(prompts), n)) for parts in (ids, lengths, logprobs))

    return sample


def in_order(parts, prompts, n):
    """The rows of `prompts` prompts, n each: prompt i is in process i % len(parts), there the i // len(parts)-th."""
    return [parts[i % len(parts)][(i // len(parts)) * n + j] for i in range(prompts) for j in range(n)]

"""What processes send in a rollout of GRPO and in a step of SFT: by the formulas of docs/scale.md, and as counted.

    torchrun --nproc-per-node 2 tests/scale.py              # the cpu preset's model
    torchrun --nproc-per-node 2 tests/scale.py --shard

Counted are the bytes that one process hands to each kind of message. On a ring it sends 2 (W - 1) / W of what is summed
("all_reduce") and (W - 1) / W of what is gathered or of the gradients that are shared out ("reduce_scatter"). The copy
of a sharded model that samples, 2 bytes a parameter once a rollout, is not counted: it goes another way through torch.
"""

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
import model as transformer  # noqa: E402
import pipeline  # noqa: E402
import sft  # noqa: E402
from lab import parallel, sharding  # noqa: E402

KINDS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "all_gather_into_tensor": "all_gather",
         "all_gather_single": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
         "reduce_scatter_single": "reduce_scatter"}  # names of torch.distributed, of several versions


def counting(bytes_of):
    """Counts the bytes of torch.distributed's messages: of a gather what arrives, of a sum what is sent."""
    for name, kind in KINDS.items():
        send = getattr(dist, name, None)
        if send is None:
            continue

        def counted(*args, send=send, kind=kind, **kwargs):
            tensors = [*(kwargs.get(key) for key in ("output_tensor", "input_tensor", "output", "input")), *args]
            flat = [t for part in tensors for t in (part if isinstance(part, list) else [part])]
            sizes = [t.nbytes for t in flat if isinstance(t, torch.Tensor)]
            is_list = any(isinstance(part, list) for part in tensors)
            bytes_of[kind] += sum(sizes[:-1]) if is_list else max(sizes)
            return send(*args, **kwargs)

        setattr(dist, name, counted)


def rollout_formula(c, W, P, root, B, T, passes, sharded):
    """{kind: bytes} of one rollout with one rule.

    P, root: parameters, and those outside the layers; passes: of micro-batches, forward and backward, of all updates.
    """
    gathered = B // W * W * (c.max_new_tokens * (8 + 4) + 8) + 3 * 8 * W  # ids, log-probabilities, lengths; counts
    scored = 4 * B * T * ((c.old_logprobs == "trainer") + (c.beta > 0))   # under pi_old, under the reference
    summed = 4 * B + scored + c.minibatches * 5 * 8                       # judgements; each update's five metrics
    if not sharded:
        return {"all_reduce": summed + c.minibatches * 4 * P, "all_gather": gathered, "reduce_scatter": 0}
    gathered += passes * 4 * (2 * P - root)  # the layers again for the backward pass
    return {"all_reduce": summed, "all_gather": gathered, "reduce_scatter": passes * 4 * P}


def step_formula(P, root, sharded):
    """{kind: bytes} of one step of SFT, of one micro-batch a process."""
    if not sharded:
        return {"all_reduce": 4 * P + 4, "all_gather": 0, "reduce_scatter": 0}
    return {"all_reduce": 4, "all_gather": 4 * (2 * P - root), "reduce_scatter": 4 * P}


def measured_rollout(model, c, bytes_of):
    """(B, T, passes) of one rollout, counted."""
    shapes, micro_batches = {"passes": 0}, grpo.micro_batches

    def counted(rows, ends, budget):
        for batch in micro_batches(rows, ends, budget):
            shapes["passes"] += len(rows) < len(ends)  # of an update
            yield batch

    grpo.micro_batches = counted
    bytes_of.clear()
    grpo.train(model, [{"ids": [5] * (8 + i)} for i in range(c.prompts_per_rollout)],
               encode=lambda example: example["ids"], decode=str, generate=parallel.shared(transformer.generate),
               end_ids=(1,), rewards={"rule": lambda text, example: float(len(text) % 7)}, config=c,
               log=lambda metrics, r: shapes.update(B=len(r.texts), T=r.mask.shape[1]))
    grpo.micro_batches = micro_batches
    return shapes


def say(what, formula, bytes_of):
    for kind, expected in formula.items():
        print(f"{what:8} {kind:15} by formula {expected:12,}   counted {bytes_of[kind]:12,}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard", action="store_true")
    sharded, bytes_of = parser.parse_args().shard, Counter()
    with parallel.processes():
        torch.set_num_threads(1)
        W, preset = dist.get_world_size(), pipeline.PRESETS["cpu"]
        config = transformer.Config(vocab_size=1024, max_position_embeddings=preset.context, **preset.model)
        model = transformer.Transformer(config).init_weights(torch.Generator().manual_seed(0))
        P = sum(p.numel() for p in model.parameters())
        root = P - sum(p.numel() for p in model.layers.parameters())
        if sharded:
            sharding.shard(model)
        counting(bytes_of)
        c = replace(preset.zero, rollouts=1, max_new_tokens=64)
        shapes = measured_rollout(model, c, bytes_of)
        print(f"{P:,} parameters, {root:,} of them outside the layers; {W} processes; {shapes}")
        say("rollout", rollout_formula(c, W, P, root, sharded=sharded, **shapes), bytes_of)
        bytes_of.clear()
        examples = [(torch.randint(4, 1000, (preset.pretrain.row_length,)).tolist(), 0) for _ in range(12)]
        sft.train(model, examples, replace(preset.pretrain, epochs=1))
        say("SFT step", step_formula(P, root, sharded), bytes_of)


if __name__ == "__main__":
    main()

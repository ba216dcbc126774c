"""What processes send one another in a rollout of GRPO and a step of SFT: by the formulas of docs/scale.md, and counted.

    torchrun --nproc-per-node 2 tests/scale.py              # the cpu preset's model
    torchrun --nproc-per-node 2 tests/scale.py --shard

Counted are the bytes that one process hands to each kind of message. On a ring it sends 2 (W - 1) / W of what is summed
("all_reduce") and (W - 1) / W of what is gathered or of the gradients that are shared out ("reduce_scatter").
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


def rollout_formula(P, W, c, B, T, passes, rules, sharded):
    """Bytes of one rollout with c.minibatches updates, by kind. passes: of micro-batches, forward and backward."""
    sampled = B // W * W * (c.max_new_tokens * (8 + 4) + 8)     # ids, their log-probabilities, lengths
    judged = 4 * B * rules
    scored = 4 * B * T * (2 if c.beta else 1)                   # under pi_old and the reference
    found = {"all_gather": sampled, "all_reduce": judged + scored}
    if sharded:  # the weights for each forward and again for each backward pass; a whole copy to sample from
        forward_only = passes["scoring"]
        found["all_gather"] += 4 * P * (forward_only + 2 * passes["updates"]) + 4 * P
        found["reduce_scatter"] = 4 * P * passes["updates"]
    else:
        found["all_reduce"] += 4 * P * c.minibatches
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard", action="store_true")
    sharded = parser.parse_args().shard
    bytes_of = Counter()
    with parallel.processes():
        torch.set_num_threads(1)
        W, preset = dist.get_world_size(), pipeline.PRESETS["cpu"]
        config = transformer.Config(vocab_size=1024, max_position_embeddings=preset.context, **preset.model)
        model = transformer.Transformer(config).init_weights(torch.Generator().manual_seed(0))
        P = sum(p.numel() for p in model.parameters())
        if sharded:
            sharding.shard(model)
        c, shapes = replace(preset.zero, rollouts=1, max_new_tokens=64), {}
        counting(bytes_of)

        def log(metrics, r):
            shapes.update(B=len(r.texts), T=r.mask.shape[1])
            shapes["scoring"] = sum(1 for _ in grpo.micro_batches(range(len(r.texts)), r.ends, c.micro_batch_tokens))

        updates, micro_batches = [0], grpo.micro_batches

        def counted_batches(rows, ends, budget):
            for batch in micro_batches(rows, ends, budget):
                updates[0] += len(rows) < len(ends)
                yield batch

        grpo.micro_batches = counted_batches
        grpo.train(model, [{"ids": [5] * (8 + i)} for i in range(c.prompts_per_rollout)],
                   encode=lambda example: example["ids"], decode=str, generate=parallel.shared(transformer.generate),
                   end_ids=(1,), rewards={"rule": lambda text, example: float(len(text) % 7)}, config=c, log=log)
        passes = {"scoring": 0 if c.old_logprobs == "sampler" else shapes["scoring"], "updates": updates[0]}
        expected = rollout_formula(P, W, replace(c, beta=c.beta), shapes["B"], shapes["T"], passes, 1, sharded)
        if c.old_logprobs == "sampler":
            expected["all_reduce"] -= 4 * shapes["B"] * shapes["T"]
        print(f"{P:,} parameters, {W} processes, {shapes}, passes {passes}")
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            print(f"rollout  {kind:15} formula {expected.get(kind, 0):12,}   counted {bytes_of[kind]:12,}")
        bytes_of.clear()
        examples = [(torch.randint(4, 1000, (preset.pretrain.row_length,)).tolist(), 0) for _ in range(12)]
        sft.train(model, examples, replace(preset.pretrain, epochs=1))
        step = {"all_reduce": 4 * P} if not sharded else {"all_gather": 8 * P, "reduce_scatter": 4 * P}
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            print(f"SFT step {kind:15} formula {step.get(kind, 0):12,}   counted {bytes_of[kind]:12,}")


if __name__ == "__main__":
    main()

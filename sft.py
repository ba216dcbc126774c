"""Next-token training with a mask: supervised fine-tuning, and pretraining as the case without a mask.

An example is (ids, prompt_length): the loss falls on the tokens after the prompt, the end token included
(prompt_length 0, pretraining: on all but the first). Examples are packed into rows and do not see one another.
The recipe's stages that run through here: pretraining, cold start [R1 v2 B.3.2], SFT-2 [B.4.2], distillation [B.4.3].

    python sft.py --model DIR --data FILE.jsonl --out DIR     # rows {"prompt": str, "completion": str}
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2 ** 28 if torch.cuda.is_available() else 2 ** 26  # positions x vocabulary: 1 GB or 256 MB in fp32


@dataclass(frozen=True)
class SFTConfig:
    lr: float = 1e-3            # R1: 5e-5 at 671B [v2 B.4.2]; small models take larger steps
    min_lr_ratio: float = 0.1   # cosine down to a tenth, as R1
    warmup: float = 0.05        # share of the steps; not published
    epochs: int = 2             # R1: 2-3
    batch_tokens: int = 8192    # positions of one update, padding included
    micro_batch_rows: int = 16  # rows of one forward pass; changes memory and speed, not the result
    row_length: int = 256       # packed row
    weight_decay: float = 0.1   # on matrices only
    betas: tuple = (0.9, 0.95)
    grad_clip: float = 1.0
    dtype: str = "bfloat16"     # or float32, float16: of the forward pass; weights, gradients and Adam stay fp32
    seed: int = 0


def pack(examples, row_length):
    """First-fit packing: each example, in order, goes whole into the first of up to 8 open rows that has room.

    Returns tensors (R, row_length): ids; segments (1.. within a row, 0 for padding); positions (from 0 in each
    example); targets, the next token where the loss falls and -100 elsewhere. Longer examples are truncated to a row.
    """
    full, open_rows = [], []
    for ids, prompt_length in examples:
        ids = ids[:row_length]
        if len(ids) == 0:
            continue
        row = next((r for r in open_rows if r["used"] + len(ids) <= row_length), None)
        if row is None:
            if len(open_rows) == 8:  # close the fullest
                full.append(open_rows.pop(max(range(8), key=lambda i: open_rows[i]["used"])))
            row = {"used": 0, "examples": []}
            open_rows.append(row)
        row["used"] += len(ids)
        row["examples"].append((ids, prompt_length))
    rows = full + open_rows
    ids, segments, positions = (torch.zeros(len(rows), row_length, dtype=torch.long) for _ in range(3))
    targets = torch.full((len(rows), row_length), -100)
    for r, row in enumerate(rows):
        at = 0
        for s, (tokens, prompt_length) in enumerate(row["examples"], 1):
            end, tokens = at + len(tokens), torch.tensor(tokens)
            ids[r, at:end], segments[r, at:end], positions[r, at:end] = tokens, s, torch.arange(len(tokens))
            first = max(prompt_length, 1)  # the token at i is predicted at i-1
            targets[r, at + first - 1:end - 1] = tokens[first:]
            at = end
    return ids, segments, positions, targets


def pack_epochs(examples, c: SFTConfig):
    """The rows of all epochs, one after another, as `pack` gives them: each epoch packs in another order."""
    order, epochs = torch.Generator().manual_seed(c.seed), []
    for _ in range(c.epochs):
        shuffled = torch.randperm(len(examples), generator=order).tolist()
        packed = pack([examples[i] for i in shuffled], c.row_length)
        mixed = torch.randperm(len(packed[0]), generator=torch.Generator().manual_seed(c.seed))  # full rows came first
        epochs.append([x[mixed] for x in packed])
    return [torch.cat(parts) for parts in zip(*epochs)]


def learning_rate(step, steps, c: SFTConfig):
    """Linear warm-up, then a cosine down to about lr * min_lr_ratio."""
    warmup = max(1, round(c.warmup * steps))
    if step < warmup:
        return c.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(parameters, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """Decay on matrices only, not on biases and norms."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], lr=lr, betas=betas, fused=True)


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] of each row. logits (N, V), targets (N,) -> (N,) in fp32.

    As F.cross_entropy, but the forward pass also computes the gradient, softmax - onehot. On a CPU it does so in pieces
    that stay in the processor's cache: of bf16 logits no fp32 (N, V) is written to memory.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        losses, gradient = [], torch.empty_like(logits)
        piece = 128 if logits.device.type == "cpu" else max(1, len(logits))
        for x, target, g in zip(logits.split(piece), targets[:, None].split(piece), gradient.split(piece)):
            p = x.softmax(-1, dtype=torch.float32)
            # log p[target] by way of the largest logit: p[target] itself may be too small for a float
            max_logit, max_logprob = x.amax(-1, keepdim=True).float(), p.amax(-1, keepdim=True).log()
            losses.append(max_logit - x.gather(1, target).float() - max_logprob)
            g.copy_(p.scatter_(1, target, p.gather(1, target) - 1))
        ctx.save_for_backward(gradient)
        return torch.cat(losses)[:, 0]

    @staticmethod
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None


def loss_sum(model, ids, segments, positions, targets, dtype):
    """The summed cross-entropy over the targets of these rows.

    A model with hidden(...) -> (B, T, D), head(states) and config.vocab_size makes logits at the targets only.
    """
    def loss_of(states, targets):
        return CrossEntropy.apply(model.head(states), targets).sum()

    learned = (targets.flatten() >= 0).nonzero()[:, 0]  # (n,) positions with a target
    targets = targets.flatten()[learned]                # (n,)
    # no cache: one bf16 cast of the head for all of its pieces would sum their gradients in bf16
    with torch.autocast(ids.device.type, getattr(torch, dtype), dtype != "float32", cache_enabled=False):
        if not (hasattr(model, "hidden") and hasattr(model, "head")):
            logits = model(ids, positions=positions, segments=segments).flatten(0, 1)         # (B*T, V)
            return CrossEntropy.apply(logits.index_select(0, learned), targets).sum()
        states = model.hidden(ids, positions=positions, segments=segments).flatten(0, 1)      # (B*T, D)
        states = states.index_select(0, learned)                                              # (n, D)
        size = LOGITS_AT_ONCE // model.config.vocab_size
        if len(targets) <= size:
            return loss_of(states, targets)
        pieces = zip(states.split(size), targets.split(size))  # a large vocabulary's (n, V) would not fit
        return sum(checkpoint(loss_of, *piece, use_reentrant=False) for piece in pieces)  # computed again in backward


def micro_batches(batch, count):
    """Yields this process's micro-batches: up to `count` rows of each of the batch's tensors.

    A process without a row gets one of padding: under FSDP all must make each pass.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for rows in zip(*(x.split(count * processes) for x in batch)):
        own = [x[rank::processes] for x in rows]
        if len(own[0]) == 0:
            own = [torch.zeros_like(x[:1]) for x in rows[:3]] + [torch.full_like(rows[3][:1], -100)]
        yield own


def sum_over_processes(loss, parameters):
    """Returns the sum of the losses, and sums the gradients in place. FSDP has summed sharded ones already."""
    if not dist.is_initialized():
        return loss
    loss = torch.tensor(loss, device=parameters[0].device)
    own = [loss, *(p.grad for p in parameters if p.grad is not None and not hasattr(p, "placements"))]
    for i in range(0, len(own), 32):  # 32 in a message
        flat = torch.cat([t.flatten() for t in own[i:i + 32]])
        dist.all_reduce(flat)
        for t, total in zip(own[i:i + 32], flat.split([t.numel() for t in own[i:i + 32]])):
            t.copy_(total.view_as(t))
    return loss.item()


def train(model, examples, config: SFTConfig, make_optimizer=adamw, objective=None, log=None, save=None, resume=None):
    """Train `model` on examples [(ids, prompt_length)], in place; returns the last metrics. make_optimizer: as adamw.

    objective: its loss_sum is used, its progress set, its after_step(model) -> metrics called (v3_pretraining.py).
    log(metrics, batch) and save(model=..., optimizer=..., scaler=..., step=...) are called after each step; batch holds
    its rows, as `pack` gives them. resume(model=..., optimizer=..., scaler=...) puts such a state back and returns
    {"step": ...}. A step whose loss or gradient is not finite changes nothing: "overflow" where only float16's scaled
    gradient is not (the scale is then halved), else "skipped".
    Raises ValueError when there is no example, or none with a token to learn.
    """
    c, device = config, next(model.parameters()).device
    if not any(min(len(ids), c.row_length) > max(prompt_length, 1) for ids, prompt_length in examples):
        raise ValueError(f"none of the {len(examples)} examples has a token to learn")
    optimizer = make_optimizer(model.parameters(), lr=c.lr, weight_decay=c.weight_decay, betas=c.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=c.dtype == "float16")
    objects = dict(model=model, optimizer=optimizer, scaler=scaler)
    data = pack_epochs(examples, c)
    rows_a_step = max(1, c.batch_tokens // c.row_length)
    steps = math.ceil(len(data[0]) / rows_a_step)
    step, metrics = 0, {}
    get_loss = loss_sum if objective is None else objective.loss_sum
    if resume is not None:
        step = resume(**objects)["step"]
    model.train()
    while step < steps:
        started = time.time()
        batch = [x[step * rows_a_step:(step + 1) * rows_a_step] for x in data]  # ids, segments, positions, targets
        learned = (batch[3] != -100).sum().item()  # of the whole step: the size of micro-batches changes nothing
        total = 0.0
        if objective is not None:
            objective.progress = step / steps
        for rows in micro_batches(batch, c.micro_batch_rows):
            loss = get_loss(model, *(x.to(device) for x in rows), c.dtype) / max(learned, 1)
            scaler.scale(loss).backward()
            total += loss.item()
        trained = [getattr(p, "master", p) for p in model.parameters()]  # variants/offload.py: gradients are p.master's
        total = sum_over_processes(total, trained)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, c.grad_clip).item()
        lr = learning_rate(step, steps, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        is_finite = math.isfinite(total + grad_norm)
        if is_finite:  # Adam would keep a NaN for good
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        overflow = not is_finite and math.isfinite(total) and scaler.get_scale() > 1
        scaler.update()  # an overflow halves the scale, which without float16 is 1
        step += 1
        metrics = {"step": step, "steps": steps, "loss": total, "lr": lr, "grad_norm": grad_norm,
                   "tokens": int((batch[1] > 0).sum()), "skipped": float(not is_finite and not overflow),
                   "overflow": float(overflow), "seconds": time.time() - started}
        if objective is not None:
            metrics |= objective.after_step(model)
        if log is not None:
            log(metrics, batch)
        if save is not None:
            save(**objects, step=step)
    return metrics


def tokenize(row, tokenizer, pretrain=False):
    """(ids, prompt_length) of a row {"prompt", "completion"}; in pretraining the prompt is learned too."""
    prompt = tokenizer.encode_prompt(row["prompt"])
    ids = prompt + tokenizer.encode(row["completion"]) + [tokenizer.end_id]
    return ids, 0 if pretrain else len(prompt)


def main():
    from lab.scripts import fine_tune  # here, so that the training imports without the rest of the project
    fine_tune(SFTConfig, tokenize, train, adamw)


if __name__ == "__main__":
    main()

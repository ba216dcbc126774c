"""How DeepSeek-V3 was pretrained: experts balanced without a loss, and a second token predicted [V3 2.1.2, 2.2, 4.2].

After each step the bias of an overloaded expert falls and that of an underloaded one rises; it only affects the choice,
and so adds no gradient against the data. A loss of tiny weight keeps single sequences from extremes. One more block
predicts the token after the next; only pretraining needs it, and `save` leaves it out.

    model = init_weights(Transformer(Config()), generator)    # of variants/deepseek_v3.py
    add_next_token(model, generator)
    sft.train(model, examples, config, objective=Objective())

In reinforcement learning the biases stay as they are: the sampler and the trainer choose by the same ones.

Shapes: B rows, T positions, D hidden size, V vocabulary, E experts, K of them for a token, n real tokens.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@torch.no_grad()
def init_weights(model, generator=None, of=None):
    """As model.py's: normal, std 0.02 at width 768, scaled as 1/sqrt(width); less in what adds to the stream.

    of: the part of the model that is meant; None: all of it. Returns the model.
    """
    std = 0.02 * math.sqrt(768 / model.config.hidden_size)
    for name, p in (of or model).named_parameters():
        if "o_proj" in name or "down_proj" in name:
            p.normal_(0, std / math.sqrt(2 * len(model.layers)), generator=generator)
        elif p.dim() >= 2:
            p.normal_(0, std, generator=generator)
    return model


@torch.no_grad()
def balance(routers, loads, gamma=0.001):
    """Moves each router's bias by gamma, against the load (E,) of its experts in the last step [V3 2.1.2].

    Returns the busiest expert's load over the mean, of the worst router: 1 is even, E / K the most.
    """
    busiest = [torch.ones(())]
    for router, load in zip(routers, loads):
        bias = router.e_score_correction_bias
        if bias.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"a router's bias is in {bias.dtype}, where steps of {gamma} vanish")
        bias += gamma * (load.mean() - load).sign()
        busiest.append((load.max() / load.mean().clamp(min=1e-9)).cpu())
    return torch.stack(busiest).max().item()


def sequence_balance(scores, real, K):
    """The balance loss of each row (B,), 1 where its experts are used evenly [V3 eq. 17-20], without alpha.

    scores (n, E): affinities of the tokens that are no padding, those where real (B, T) is True, in order.
    """
    E, index, tokens = scores.shape[1], index_of(real), real.sum(1).clamp(min=1)[:, None]
    best = torch.zeros_like(scores).scatter(1, scores.topk(K).indices, 1.0)  # without the bias: eq. 18

    def mean_of_rows(values):  # (n, E) -> (B, E)
        return values.new_zeros(real.numel(), E).index_copy(0, index, values).view(*real.shape, E).sum(1) / tokens

    frequency = mean_of_rows(best) * E / K
    return (frequency * mean_of_rows(scores / scores.sum(1, keepdim=True))).sum(1)


def cross_entropy(logits, targets):
    """-log softmax(logits)[target] of each row: logits (n, V), targets (n,) -> (n,)"""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def index_of(real):
    """Where real (B, T) is True: (n,) of the B * T."""
    return real.flatten().nonzero()[:, 0]


def shifted(x, fill):
    """x (B, T) of the next position; `fill` at the last."""
    return F.pad(x[:, 1:], (0, 1), value=fill)


# ------------------------------------------------------------------------------------------- multi-token prediction

class NextToken(nn.Module):
    """Multi-token prediction of depth 1: the token after the next, by a block of the model's class [V3 2.2]."""

    def __init__(self, model):
        super().__init__()
        c, norm, block = model.config, type(model.norm), type(model.layers[-1])
        self.hnorm, self.enorm, self.norm = (norm(c.hidden_size, c.rms_norm_eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.block = block(c, layer=c.num_hidden_layers)

    def forward(self, x, embedded, rotation, mask, real_index):
        """x, embedded (B, T, D): the last layer's states, not normed, and the next tokens; rotation, mask: of the
        model's layout; real_index: of the tokens with a next one."""
        x = self.eh_proj(torch.cat((self.hnorm(x), self.enorm(embedded)), dim=-1))  # V3 eq. 21
        x, routing = self.block(x, rotation, mask, real_index)
        return self.norm(x), routing


def add_next_token(model, generator=None):
    """Gives the model a NextToken as `mtp`, with weights as the model's own are at first. Returns the model."""
    model.mtp = NextToken(model)
    init_weights(model, generator, of=model.mtp)
    return model.to(model.embed_tokens.weight.device)


# ------------------------------------------------------------------------------------------- the losses

class Objective:
    """The objective of sft.train, which sets `progress`, the part of the steps that is done."""

    def __init__(self, mtp_weights=(0.3, 0.1), switch=2 / 3, alpha=1e-4, gamma=0.001, cross_entropy=cross_entropy):
        """mtp_weights: before and after the progress `switch`; V3 switches after 10 of 14.8T tokens.
        alpha: weight of the sequence-wise loss; gamma: step of `balance`; 0: none."""
        self.mtp_weights, self.switch, self.alpha, self.gamma = mtp_weights, switch, alpha, gamma
        self.cross_entropy = cross_entropy
        self.progress, self.sums, self.loads = 0.0, {}, []

    def loss_sum(self, model, ids, segments, positions, targets, dtype):
        """As sft.loss_sum; plus the losses for the token after the next, and of balance, times their weights.

        A row's balance is multiplied by its number of targets, since sft.train divides by the targets of all rows.
        """
        with torch.autocast(ids.device.type, getattr(torch, dtype), dtype != "float32", cache_enabled=False):
            x = model.embed(ids)
            layout = model.layout(x, positions, segments)
            x, routings = model.states(x, layout)
            loss = self.loss_of("next_token_loss", model, model.norm(x), targets)
            routings = [(segments > 0, *routing) for routing in routings]
            if hasattr(model, "mtp"):
                rotation, mask, _ = layout
                follows = (segments > 0) & (segments == shifted(segments, 0))  # is there a next token
                after_next = shifted(targets, -100).masked_fill(~follows, -100)
                states, routing = model.mtp(x, model.embed(shifted(ids, 0)), rotation, mask, index_of(follows))
                weight = self.mtp_weights[0] if self.progress < self.switch else self.mtp_weights[1]
                loss = loss + weight * self.loss_of("mtp_loss", model, states, after_next)
                if routing is not None:
                    routings.append((follows, *routing))
        for real, scores, _ in routings:  # in float32, as the affinities are
            of_rows = sequence_balance(scores, real, model.config.num_experts_per_tok)
            loss = loss + self.alpha * (of_rows * (targets >= 0).sum(1)).sum()
        self.count([chosen for _, _, chosen in routings], model.config.n_routed_experts)
        return loss

    def loss_of(self, name, model, states, targets):
        """The summed cross-entropy of states (B, T, D), over targets (B, T) that are not -100; its mean is logged."""
        learned = index_of(targets >= 0)
        logits = model.head(states.flatten(0, 1).index_select(0, learned))  # (n, V)
        loss = self.cross_entropy(logits, targets.flatten()[learned]).sum()
        total, count = self.sums.get(name, (0, 0))
        self.sums[name] = total + loss.detach(), count + len(learned)
        return loss

    def count(self, choices, experts):
        """Adds to self.loads how many of the tokens each router has sent to each expert."""
        loads = [(chosen.flatten() == torch.arange(experts, device=chosen.device)[:, None]).sum(1).float()
                 for chosen in choices]
        if self.loads:
            loads = [before + load for before, load in zip(self.loads, loads)]
        self.loads = loads

    def after_step(self, model):
        """Balances; returns the step's mean losses without their weights, and what `balance` returns."""
        sums = {name: torch.stack((total, total.new_tensor(count))) for name, (total, count) in self.sums.items()}
        if dist.is_initialized():  # torchrun's processes have shared out the step's rows
            for t in (*sums.values(), *self.loads):
                dist.all_reduce(t)
        metrics = {name: (total / count.clamp(min=1)).item() for name, (total, count) in sums.items()}
        metrics["busiest_expert"] = balance(model.routers(), self.loads, self.gamma)
        self.sums, self.loads = {}, []
        return metrics

"""How DeepSeek-V3 was pretrained: experts balanced without a loss, and a second token predicted [V3 2.1.2, 2.2, 4.2].

After each step the bias of an overloaded expert falls and that of an underloaded one rises; it only chooses, so that no
gradient works against the data. A loss of tiny weight keeps single sequences from extremes. A further block predicts
the token after the next; only pretraining needs it, and a directory does not hold it.

    model = Transformer(Config()).init_weights(generator)    # of variants/deepseek_v3.py
    add_next_token(model, generator)
    sft.train(model, examples, config, objective=Objective())

In reinforcement learning the biases stay as they are: the sampler and the trainer choose by the same ones.

Shapes: B rows, T positions, D hidden size, V vocabulary, E experts, K of them for a token, n real tokens.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


@torch.no_grad()
def balance(model, gamma=0.001):
    """Moves each router's bias by gamma, against the loads since the last call, and clears them [V3 2.1.2].

    Returns the busiest expert's load over the mean, of the worst router: 1 is even, E / K the most.
    """
    busiest = [torch.ones(())]
    for router in model.routers():
        load = router.load.float()
        router.e_score_correction_bias += gamma * (load.mean() - load).sign()
        busiest.append((load.max() / load.mean().clamp(min=1)).cpu())
        router.load.zero_()
    return torch.stack(busiest).max().item()


def sequence_balance(scores, real, chosen_of_each):
    """The balance loss of each row (B,), 1 where its experts are used evenly [V3 eq. 17-20], without alpha.

    scores (n, E): affinities of the tokens that are real (B, T), in order; chosen_of_each: K.
    """
    E, at, tokens = scores.shape[1], real.flatten().nonzero()[:, 0], real.sum(1).clamp(min=1)[:, None]
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(chosen_of_each).indices, 1.0)  # by affinity: eq. 18

    def mean_of_rows(values):  # (n, E) -> (B, E)
        return values.new_zeros(real.numel(), E).index_copy(0, at, values).view(*real.shape, E).sum(1) / tokens

    frequency = mean_of_rows(chosen) * E / chosen_of_each
    return (frequency * mean_of_rows(scores / scores.sum(1, keepdim=True))).sum(1)


def summed_cross_entropy(model, states, targets):
    """Over the targets (B, T) that are not -100, of states (B, T, D)."""
    learned = (targets.flatten() >= 0).nonzero()[:, 0]
    logits = model.head(states.flatten(0, 1).index_select(0, learned))  # (n, V)
    return F.cross_entropy(logits.float(), targets.flatten()[learned], reduction="sum")


def shifted(x, fill):
    """Each position's successor; the last has none."""
    return F.pad(x[:, 1:], (0, 1), value=fill)


# ------------------------------------------------------------------------------------------- multi-token prediction

class NextToken(nn.Module):
    """Multi-token prediction of depth 1: the token after the next, by one more block [V3 2.2]."""

    def __init__(self, model):
        super().__init__()
        c, norm, block = model.config, type(model.norm), type(model.layers[-1])
        self.hnorm, self.enorm, self.norm = (norm(c.hidden_size, c.rms_norm_eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.block = block(c, layer=c.num_hidden_layers)

    def forward(self, x, embedded, cos, sin, mask, real):
        """x (B, T, D): the last layer's states, not normed; embedded (B, T, D): of the next tokens."""
        x = self.eh_proj(torch.cat((self.hnorm(x), self.enorm(embedded)), dim=-1))  # V3 eq. 21
        x, routing = self.block(x, cos, sin, mask, real)
        return self.norm(x), routing


def add_next_token(model, generator=None):
    """Gives the model a NextToken as `mtp`, with weights as the model's own are at first. Returns the model."""
    model.mtp = NextToken(model)
    model.init_weights(generator, of=model.mtp)
    return model.to(model.embed_tokens.weight.device)


# ------------------------------------------------------------------------------------------- the losses

class Objective:
    """What sft.train takes as its objective. It sets `progress`, the part of the steps that is done."""

    def __init__(self, mtp_weights=(0.3, 0.1), switch=2 / 3, alpha=1e-4, gamma=0.001):
        """mtp_weights: before and after this part of the steps; V3 switches after 10 of 14.8T tokens.
        alpha: of the sequence-wise loss; gamma: of `balance`. 0 turns them off."""
        self.mtp_weights, self.switch, self.alpha, self.gamma = mtp_weights, switch, alpha, gamma
        self.progress, self.sums = 0.0, {}

    def loss_sum(self, model, ids, segments, positions, targets, dtype):
        """As sft.loss_sum; plus the losses for the token after the next, and of balance, times their weights.

        A row's balance counts as many times as it has targets, so that micro-batches change nothing.
        """
        with torch.autocast(ids.device.type, getattr(torch, dtype), dtype != "float32", cache_enabled=False):
            place = model.place(ids, positions, segments)
            x, routings = model.hidden_and_routing(ids, place)
            loss = summed_cross_entropy(model, model.norm(x), targets)
            self.add("next_token_loss", loss, (targets >= 0).sum())
            routings = [(scores, segments > 0) for scores, _ in routings]
            if hasattr(model, "mtp"):
                *place, _ = place
                follows = (segments > 0) & (segments == shifted(segments, 0))  # is there a next token
                after_next = shifted(targets, -100).masked_fill(~follows, -100)
                states, routing = model.mtp(x, model.embed(shifted(ids, 0)), *place, follows)
                mtp_loss = summed_cross_entropy(model, states, after_next)
                self.add("mtp_loss", mtp_loss, (after_next >= 0).sum())
                loss = loss + self.mtp_weights[self.progress >= self.switch] * mtp_loss
                if routing is not None:
                    routings.append((routing[0], follows))
        for scores, real in routings:
            of_rows = sequence_balance(scores, real, model.config.num_experts_per_tok)
            loss = loss + self.alpha * (of_rows * (targets >= 0).sum(1)).sum()
        return loss

    def add(self, name, total, count):
        totals, counts = self.sums.get(name, (0, 0))
        self.sums[name] = totals + total.detach(), counts + count

    def after_step(self, model):
        """Balances; returns the step's mean losses without their weights, and the busiest expert's load."""
        metrics = {name: (total / count.clamp(min=1)).item() for name, (total, count) in self.sums.items()}
        self.sums = {}
        return metrics | {"busiest_expert": balance(model, self.gamma)}

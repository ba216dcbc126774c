"""Adam on the CPU: the card holds half-precision weights alone; float32 weights and Adam's moments are the CPU's.

Full training takes 16 bytes a parameter, of which Adam's step alone needs 12: they stay in the CPU's memory, where
torch's own fused Adam steps on them [ZeRO-Offload, arXiv 2101.06840]. A gradient goes there as soon as the backward
pass has made it, and is added up in float32; after a step the weights come back, rounded.

    masters = load(dir, "cpu", torch.float32)                       # the model as it will be saved
    model = copy.deepcopy(masters).to("cuda", torch.bfloat16)       # what computes: 2 bytes a parameter
    optimizer = step_on_cpu(Adam(masters.parameters(), lr=1e-5, fused=True), model, masters)

Then as with any optimizer: backward, clip (the masters' gradients), step, zero_grad. With both in float32 it is the
same training to the last bit.
"""

import torch


def step_on_cpu(optimizer, model, masters):
    """The optimizer of the masters' parameters, tied to a model of the same architecture on any device."""
    for p, master in zip(model.parameters(), masters.parameters(), strict=True):
        p.master, p.half = master, torch.empty_like(p, device="cpu", requires_grad=False)
        if p.is_cuda:
            p.half = p.half.pin_memory()  # memory that the card reads and writes by itself
        p.wide = torch.empty_like(master, requires_grad=False)  # kept: fresh memory costs as much as a transfer
        p.register_post_accumulate_grad_hook(take_gradient)
    optimizer.register_step_post_hook(lambda *_: send_weights(model, masters))
    return optimizer


@torch.no_grad()
def take_gradient(p):
    """After each backward pass: from the card to the master's gradient, in float32."""
    p.half.copy_(p.grad)  # waits until the gradient is there
    p.grad, master = None, p.master
    if master.grad is None:
        master.grad = p.wide.copy_(p.half)
    else:
        master.grad += p.half


@torch.no_grad()
def send_weights(model, masters):
    """Rounds the masters into the model; one is under way to the card while the next is rounded."""
    for p, master in zip(model.parameters(), masters.parameters(), strict=True):
        p.half.copy_(master)
        p.copy_(p.half, non_blocking=True)

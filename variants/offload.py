"""Adam on the CPU: the card holds half-precision weights alone; float32 weights and Adam's moments are the CPU's.

Full training takes 16 bytes a parameter: float32 weight, gradient and two moments. They stay in the CPU's memory, which
takes 2 to 4 more for transfers; torch's own fused Adam steps there [ZeRO-Offload, arXiv 2101.06840]. A gradient goes
there as soon as the backward pass has made it, and is added up in float32; after a step the weights come back, rounded.

    masters = load(dir, "cpu", torch.float32)                       # the model as it will be saved
    model = copy.deepcopy(masters).to("cuda", torch.bfloat16)       # what computes: 2 bytes a parameter
    make_optimizer = lambda _, lr: step_on_cpu(grpo.adam(masters.parameters(), lr), model, masters)
    grpo.train(model, ..., make_optimizer=make_optimizer)

The gradients to clip are the masters'. With both in float32 it is the same training to the last bit.
"""

import torch


def step_on_cpu(optimizer, model, masters):
    """The masters' optimizer, tied to a model of the same architecture on any device, which is trained in full."""
    for p, master in zip(model.parameters(), masters.parameters(), strict=True):
        p.master, p.host = master, torch.empty_like(p, device="cpu", requires_grad=False)
        if p.is_cuda:
            p.host = p.host.pin_memory()  # memory that the card reads and writes by itself
        p.wide = torch.empty_like(master, requires_grad=False)  # kept: new memory costs as much as a transfer
        p.register_post_accumulate_grad_hook(take_gradient)
    optimizer.register_step_post_hook(lambda *_: send_weights(model, masters))
    return optimizer


@torch.no_grad()
def take_gradient(p):
    """Adds p's gradient, as soon as the backward pass has it, to the master's, in float32."""
    p.host.copy_(p.grad)  # waits until the gradient is there
    p.grad, master = None, p.master
    if master.grad is None:
        master.grad = p.wide.copy_(p.host)
    else:
        master.grad += p.host


@torch.no_grad()
def send_weights(model, masters):
    """Rounds the masters into the model; while one tensor travels to the card, the next is rounded."""
    for p, master in zip(model.parameters(), masters.parameters(), strict=True):
        p.host.copy_(master)
        p.copy_(p.host, non_blocking=True)

"""The layers in place of model.py's: they compute the same, faster on a CPU or in less memory."""

import copy
import math

import pytest
import torch

from lab.layers import CPUAttention, CPULinear, CPURMSNorm, attend, fast_layers, recompute, rms_norm
from model import Attention, KVCache, RMSNorm, generate
from test_model import tiny


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("segments", [False, True], ids=["", "packed"])
def test_on_a_cpu_the_fast_layers_have_the_logits_and_gradients_of_the_models_own(kind, segments):
    plain = tiny(model_type=kind).double()
    fast = fast_layers(copy.deepcopy(plain))
    kinds = {type(part) for part in fast.modules()}
    assert {CPUAttention, CPURMSNorm} <= kinds and not {Attention, RMSNorm} & kinds
    ids = torch.randint(32, (3, 20), generator=torch.Generator().manual_seed(0))
    settings = {}
    if segments:
        settings = {"segments": torch.tensor([1] * 7 + [2] * 9 + [0] * 4).expand(3, 20),
                    "positions": torch.tensor([*range(7), *range(9), *range(4)]).expand(3, 20)}
    a, b = plain(ids, **settings), fast(ids, **settings)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(plain, a.logsumexp(-1).sum()), gradients(fast, b.logsumexp(-1).sum()))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_fast_layers_decode_what_the_models_own_decode(kind):
    plain = tiny(model_type=kind)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    ids, lengths, logprobs = generate(plain, prompts, 2, 20, 0)
    again, _, _ = generate(fast_layers(copy.deepcopy(plain)), prompts, 2, 20, 0)
    assert torch.equal(ids, again)
    cache = KVCache(plain.config, torch.tensor([2, 0]), torch.float32)
    other = KVCache(plain.config, torch.tensor([2, 0]), torch.float32)
    batch = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    fast = fast_layers(copy.deepcopy(plain))
    for columns in (batch, batch[:, :1]):
        a, b = plain(columns, cache=cache), fast(columns, cache=other)
        torch.testing.assert_close(a[:, -1], b[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [(1,), (7,), (64,), (65,), (3, 50), (2, 3, 40), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_product_of_few_shapes_has_the_values_and_gradients_of_the_plain_one(rows, dtype):
    g = torch.Generator().manual_seed(0)
    plain = torch.nn.Linear(8, 5).to(dtype)
    fast = fast_layers(torch.nn.Sequential(copy.deepcopy(plain)))
    assert isinstance(fast[0], CPULinear)
    x = torch.randn(*rows, 8, generator=g).to(dtype).requires_grad_()
    outside = torch.randn(*rows, 5, generator=g).to(dtype)
    results = []
    for model in (plain, fast):
        y = model(x)
        results.append((y, *torch.autograd.grad((y * outside).sum(), [x, *model.parameters()])))
    tolerance = {} if dtype == torch.float64 else {"atol": 0.1, "rtol": 2e-2}  # bf16 adds up in another order
    for expected, ours in zip(*results):
        torch.testing.assert_close(ours, expected, **tolerance)


def test_products_of_a_thousand_numbers_of_rows_have_few_shapes(monkeypatch):
    shapes, linear = set(), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *more: (shapes.add(x.shape), linear(x, *more))[1])
    layer = fast_layers(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    for rows in range(1, 1000):
        assert layer(torch.zeros(rows, 4)).shape == (rows, 4)
    assert len(shapes) == 23  # 8, 16, ... 64, then 128, 192, ... 1024


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 3, 8)])
def test_the_gradient_of_rms_norm_is_that_of_torchs_own_in_float64(shape, dtype, atol):
    g = torch.Generator().manual_seed(0)
    x, weight, outside = (torch.randn(s, generator=g).to(dtype) for s in (shape, shape[-1:], shape))
    ours, theirs = ([t.to(d, copy=True).requires_grad_() for t in (x, weight)] for d in (dtype, torch.float64))
    y = rms_norm(*ours, 1e-5)
    expected = torch.nn.functional.rms_norm(theirs[0], shape[-1:], theirs[1], 1e-5)
    y.backward(outside), expected.backward(outside.double())
    torch.testing.assert_close(y.double(), expected, atol=atol, rtol=0)
    rtol = 0.02 if dtype == torch.bfloat16 else 1e-5
    for mine, their in zip(ours, theirs):
        torch.testing.assert_close(mine.grad.double(), their.grad, atol=atol, rtol=rtol)
    with torch.no_grad():
        assert torch.equal(rms_norm(*ours, 1e-5), y)


def saved_bytes(run):
    """What autograd keeps for the backward pass of run()."""
    sizes = {}

    def note(t):
        sizes[t.untyped_storage().data_ptr()] = t.nbytes
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = run()
    loss.backward()
    return sum(sizes.values())


def test_recomputed_activations_change_no_gradient_and_keep_a_fraction_of_the_memory():
    ids, results = torch.randint(20, (4, 40), generator=torch.Generator().manual_seed(0)), []
    for again in (False, True):
        model = tiny(num_hidden_layers=4)
        if again:
            recompute(model)
        kept = saved_bytes(lambda: model(ids).logsumexp(-1).sum())
        results.append((kept, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert torch.equal(results[0][1], results[1][1]) and results[1][0] < 0.25 * results[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_hand_and_by_the_fused_kernel_agree(dtype):
    """Short rows go by hand on a CPU, long ones through the kernel: causal, packed and with one new token."""
    q, k, v = (torch.randn(2, heads, 520, 8, generator=torch.Generator().manual_seed(heads)).to(dtype)
               for heads in (4, 2, 2))
    atol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    packed = torch.rand(2, 1, 520, 520, generator=torch.Generator().manual_seed(0)) < 0.5
    packed |= torch.eye(520, dtype=torch.bool)
    packed = torch.where(packed, 0.0, -math.inf).to(dtype)
    for t, mask in ((520, None), (520, packed), (1, packed[:, :, -1:])):
        kernel = attend(q[:, :, -t:], k, v, mask)
        half = slice(None, 256)  # a length that goes by hand
        if mask is None:
            by_hand = attend(q[:, :, half], k[:, :, half], v[:, :, half], None)
            assert torch.allclose(by_hand.float(), kernel[:, :, half].float(), atol=atol)
        else:
            scores = (q[:, :, -t:].float() @ k.float().repeat_interleave(2, 1).mT) / 8 ** 0.5
            expected = (scores + mask).softmax(-1) @ v.float().repeat_interleave(2, 1)
            assert torch.allclose(kernel.float(), expected, atol=atol)


@pytest.mark.parametrize("queries", [5, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_a_double_loop_over_queries_and_keys(queries, masked):
    generator = torch.Generator().manual_seed(0)
    keys = 5 if masked or queries > 1 else 1  # without a mask the last key is the first query's
    sizes = (4, queries), (2, keys), (2, keys)
    q, k, v = (torch.randn(2, heads, length, 4, generator=generator) for heads, length in sizes)
    mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.6
    mask[..., 0] = True
    got = attend(q, k, v, torch.where(mask, 0.0, -math.inf) if masked else None)
    for b in range(2):
        for h in range(4):
            for t in range(queries):
                seen = [s for s in range(keys) if (mask[b, 0, t, s] if masked else s <= t)]
                scores = [math.exp(q[b, h, t].double() @ k[b, h // 2, s].double() / 2) for s in seen]
                expected = sum(w * v[b, h // 2, s].double() for w, s in zip(scores, seen)) / sum(scores)
                assert torch.allclose(got[b, h, t].double(), expected, atol=1e-5)

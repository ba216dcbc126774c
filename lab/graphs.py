"""Decoding on a GPU: a step's hundreds of kernels, a new token for each row, are recorded once and launched as one.

Small steps cost mostly their launches: each takes microseconds of the CPU, often more than the kernel runs. A recording
(a CUDA graph) uses fixed memory, so a Decoder holds the weights, the cache and the ids that its recordings read, and is
kept from call to call. The rows of a batch are a power of two and the columns a multiple of 64: few recordings serve
all batches. Sampling is not part of them; it waits for the GPU at every 16th step only (with top_p below 1 and a large
vocabulary: at each).

    generate(model, prompts, ...)   # as model.generate, which it is where the model is not on a GPU
"""

import copy

import torch

import model as transformer
from model import prefill, sample

BLOCK = 64          # columns
SHARE = 1 / 20      # of the GPU's memory: a Decoder that takes more is not kept
decoders = {}       # (architecture, dtype, device) -> the Decoder of the last call


def generate(model, prompts, **settings):
    """As model.generate: the same arguments and results. The random numbers are drawn for other rows than there."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return transformer.generate(model, prompts, **settings)
    with torch.cuda.device(device):  # streams and recordings belong to the current device
        return generate_recorded(model, prompts, **settings)


@torch.no_grad()
def generate_recorded(model, prompts, n=1, max_new_tokens=128, temperature=1.0, top_p=1.0, end_ids=(), generator=None):
    logits, cache = prefill(model, prompts)  # (N, V)
    count, device = len(prompts) * n, logits.device
    steps = min(max_new_tokens, model.config.max_position_embeddings - cache.length)
    batch = torch.arange(power_of_two(count), device=device)
    prompt_of = (batch // n).clamp(max=len(prompts) - 1)
    decoder = decoder_for(model, len(batch), cache.length + steps)
    decoder.begin(cache, prompt_of)
    logits, cache = logits[prompt_of], None

    # rows of the batch beyond `count` are spare: done from the start, they write to the last row, which nobody reads
    active, done = batch.clamp(max=count), batch >= count
    ids = torch.zeros(count + 1, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(count + 1, max_new_tokens, device=device)
    lengths = torch.zeros(count + 1, dtype=torch.long, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    for t in range(steps):
        token, logprob = sample(logits, temperature, top_p, generator)
        ids[active, t] = token.masked_fill(done, 0)
        logprobs[active, t] = logprob.masked_fill(done, 0)
        lengths[active] += ~done
        done |= torch.isin(token, ends)
        if t % 16 == 15 and len(ends) > 0:
            left = (~done).nonzero()[:, 0]  # here the CPU waits
            if len(left) == 0:
                break
            size = power_of_two(len(left))
            if size < len(done):
                batch = torch.arange(size, device=device)
                rows = left[batch.clamp(max=len(left) - 1)]
                done = batch >= len(left)
                active, token = active[rows].masked_fill(done, count), token[rows]
                decoder.keep(rows)
        if t + 1 < steps:
            logits = decoder.step(token)
    if decoder.bytes() > SHARE * memory_of(device):
        decoders.clear()
    return ids[:count], lengths[:count], logprobs[:count]


def memory_of(device):
    return torch.cuda.get_device_properties(device).total_memory


def power_of_two(count):
    """The next one, from count on."""
    return 1 << (count - 1).bit_length()


def decoder_for(model, rows, columns):
    """A Decoder with this model's weights and room for so much; if possible that of the last call."""
    parameter = next(model.parameters())
    key = repr(model.config), parameter.dtype, parameter.device
    decoder = decoders.get(key)
    if decoder is None or rows > decoder.rows or columns > decoder.columns:
        decoder = decoders.pop(key, None)
        if decoder is not None:  # it goes first: both might not fit
            rows, columns = max(rows, decoder.rows), max(columns, decoder.columns)
            del decoder
        decoder = decoders[key] = Decoder(model, rows, columns, cuda_graph)
    torch._foreach_copy_(list(decoder.model.parameters()), list(model.parameters()))
    return decoder


class Decoder:
    """A model with the fixed memory of its recordings; record(run) -> (output, replay).

    k, v (layers, rows, K, columns, d) and ids (rows, 1): a batch uses the first rows and columns of them.
    """

    def __init__(self, model, rows, columns, record):
        c = model.config
        self.model, self.record, self.recordings = copy.deepcopy(model), record, {}
        self.rows, self.columns = rows, -(-columns // BLOCK) * BLOCK
        like = next(model.parameters())
        self.k, self.v = (like.new_zeros(c.num_hidden_layers, rows, c.num_key_value_heads, self.columns, c.head_dim)
                          for _ in range(2))
        self.start = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=like.device)
        self.column = torch.zeros(1, dtype=torch.long, device=like.device)  # where the new token goes

    def bytes(self):
        return self.k.nbytes + self.v.nbytes + sum(p.nbytes for p in self.model.parameters())

    def begin(self, cache, rows):
        """Takes these rows of a KVCache, repeats allowed, as its batch."""
        self.batch, self.length = len(rows), cache.length
        self.start[:self.batch] = cache.start[rows]
        for mine, theirs in ((self.k, cache.k), (self.v, cache.v)):
            for layer in range(len(mine)):  # one after the other: the copies are small
                mine[layer, :self.batch, :, :self.length] = theirs[layer, rows, :, :self.length]

    def keep(self, rows):
        """The batch becomes these rows of it."""
        self.batch = len(rows)
        self.start[:self.batch] = self.start[rows]
        for tensor in (self.k, self.v):
            for layer in tensor:
                layer[:self.batch, :, :self.length] = layer[rows, :, :self.length]

    def step(self, token):
        """Logits (B, V) after one more token (B,) in each row; the next call overwrites them."""
        columns = -(-(self.length + 1) // BLOCK) * BLOCK
        self.ids[:self.batch, 0] = token
        self.column.fill_(self.length)
        if (self.batch, columns) not in self.recordings:
            self.recordings[self.batch, columns] = self.record(self.run(self.batch, columns))
        logits, replay = self.recordings[self.batch, columns]
        replay()
        self.length += 1
        return logits

    def run(self, batch, columns):
        """The step of so many rows and columns as a function without arguments."""
        def step():
            return self.model(self.ids[:batch], cache=FixedCache(self, batch, columns))[:, -1]
        return step


class FixedCache:
    """What the model takes as its KVCache: the new token's column is a number on the device, for a recording."""

    length = 0  # the model adds to it, and compares with its context: the column is what counts

    def __init__(self, decoder, batch, columns):
        self.k, self.v = decoder.k[:, :batch, :, :columns], decoder.v[:, :batch, :, :columns]
        self.start, self.column = decoder.start[:batch], decoder.column

    def reserve(self, columns):
        return self.k.shape[3]

    def columns(self, count):
        return self.column

    def update(self, layer, k, v):
        self.k[layer].index_copy_(2, self.column, k)
        self.v[layer].index_copy_(2, self.column, v)
        return self.k[layer], self.v[layer]


def cuda_graph(run):
    """Records run() -> tensor. Returns that tensor, and a function that computes its content again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls allocate workspaces and choose kernels, which must not be recorded
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
        output = run()
    return output, graph.replay

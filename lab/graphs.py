"""Decoding on a GPU: a step's hundreds of kernels, a new token for each row, are recorded once and launched as one.

Small steps cost mostly their launches: each takes microseconds of the CPU, often more than the kernel runs. A recording
(a CUDA graph) uses fixed memory, so a Decoder holds the weights, the cache and the ids that its recordings read, and is
kept from call to call. A recording's rows are a power of two and its columns a multiple of 64: few serve all batches.
The loop around the steps is model.generate's; sampling is not recorded.

    generate(model, prompts, ...)   # as model.generate: the same arguments, results and random numbers
"""

import copy

import torch

import model as transformer
from lab.layers import fixed_shapes

BLOCK = 64      # columns
SHARE = 1 / 20  # of the GPU's memory: a Decoder that takes more is not kept
decoders = {}   # (architecture, dtype, device) -> its Decoder


def generate(model, prompts, **settings):
    device = next(model.parameters()).device
    if device.type != "cuda":
        return transformer.generate(model, prompts, **settings)
    with torch.cuda.device(device):  # streams and recordings belong to the current device
        return generate_recorded(model, prompts, **settings)


def generate_recorded(model, prompts, n=1, max_new_tokens=128, **settings):
    lengths = [len(prompt) for prompt in prompts]
    steps = min(max_new_tokens, model.config.max_position_embeddings - min(lengths))  # of the shortest prompt's row
    columns = max(lengths) + steps
    decoder = decoder_for(model, power_of_two(len(prompts) * n), columns)
    result = transformer.generate(decoder, prompts, n=n, max_new_tokens=max_new_tokens, **settings)
    if decoder.bytes() > SHARE * memory_of(decoder.start.device):
        decoders.clear()
    return result


def memory_of(device):
    return torch.cuda.get_device_properties(device).total_memory


def power_of_two(count):
    """The next one, from count on."""
    return 1 << (count - 1).bit_length()


def blocks(columns):
    """So many columns or more, a multiple of BLOCK."""
    return -(-columns // BLOCK) * BLOCK


def decoder_for(model, rows, columns):
    """A Decoder with this model's weights and room for so much; if possible that of the last call."""
    parameter = next(model.parameters())
    key = repr(model.config), parameter.dtype, parameter.device, *base_of(model)
    decoder = decoders.get(key)
    if decoder is None or rows > decoder.rows or columns > decoder.columns:
        decoder = decoders.pop(key, None)
        if decoder is not None:  # it goes first: both might not fit
            rows, columns = max(rows, decoder.rows), max(columns, decoder.columns)
            del decoder
        decoder = decoders[key] = Decoder(model, rows, columns, cuda_graph)
    pairs = [(mine, theirs.detach()) for mine, theirs in zip(tensors_of(decoder.model), tensors_of(model))
             if mine is not theirs]
    torch._foreach_copy_(*map(list, zip(*pairs)))
    return decoder


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]  # a router's bias is a buffer


def base_of(model):
    """{id: parameter} of the base below LoRA's adapters (variants/lora.py): it stays where it is, and is not copied."""
    return {id(p): p for p in model.parameters() if hasattr(p, "is_base")}


class Decoder:
    """model.py's Transformer, with its steps of one token per row recorded by record(run) -> (output, replay).

    kept {"k" and "v" of a KVCache, or "k" of a LatentCache: (layers, rows, K, columns, d)} and ids (rows, 1): a batch
    uses the first rows and columns.
    """

    def __init__(self, model, rows, columns, record):
        self.record, self.recordings = record, {}
        self.base, dtype = base_of(model), next(model.parameters()).dtype
        own = {id(p): torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in model.parameters()
               if id(p) not in self.base}
        self.model = fixed_shapes(copy.deepcopy(model, own | self.base)).requires_grad_(False)
        self.rows, self.columns = rows, blocks(columns)
        device = next(self.model.parameters()).device
        self.start = torch.zeros(rows, dtype=torch.long, device=device)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # where the new token goes
        memory = self.model.new_cache(self.start)
        memory.reserve(self.columns)
        self.kept = {name: getattr(memory, name) for name in ("k", "v") if hasattr(memory, name)}
        self.cache = None  # whose keys and values lie in `kept`

    def __getattr__(self, name):
        return getattr(self.model, name)

    def bytes(self):
        own = [p for p in self.model.parameters() if id(p) not in self.base]
        return sum(tensor.nbytes for tensor in [*self.kept.values(), *own])

    def __call__(self, ids, cache):
        """Logits (B, 1, V) of ids (B, 1); the next call overwrites them."""
        if cache is not self.cache:  # after the prompts, and when rows have left
            self.take(cache)
        rows, columns = power_of_two(len(ids)), blocks(cache.length + 1)
        self.ids[:len(ids)] = ids
        self.column.fill_(cache.length)
        if (rows, columns) not in self.recordings:
            self.recordings[rows, columns] = self.record(self.step(rows, columns))
        logits, replay = self.recordings[rows, columns]
        replay()
        cache.length += 1
        return logits[:len(ids)]

    def take(self, cache):
        """Moves a cache into the fixed memory, from where its `select` copies rows out again."""
        rows, live = len(cache.start), slice(cache.length)
        self.start[:rows] = cache.start
        for name, mine in self.kept.items():
            mine[:, :rows, :, live] = getattr(cache, name)[:, :, :, live]
            setattr(cache, name, mine[:, :rows])
        self.cache = cache

    def step(self, rows, columns):
        """The step of so many rows and columns as a function without arguments."""
        def run():
            return self.model(self.ids[:rows], cache=FixedCache(self, rows, columns))
        return run


class FixedCache:
    """What the model takes as its cache: the new token's column is a number on the device, for a recording."""

    length = padding = 0  # the model adds to it, and compares with its context: the column is what counts

    def __init__(self, decoder, rows, columns):
        self.kept = [tensor[:, :rows, :, :columns] for tensor in decoder.kept.values()]
        self.start, self.column = decoder.start[:rows], decoder.column

    def reserve(self, columns):
        return self.kept[0].shape[3]

    def columns(self, count):
        return self.column

    def update(self, layer, *new):
        for tensor, of_token in zip(self.kept, new):
            tensor[layer].index_copy_(2, self.column, of_token)
        of_layer = [tensor[layer] for tensor in self.kept]
        return of_layer if len(of_layer) > 1 else of_layer[0]


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

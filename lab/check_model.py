"""Diagnoses an untrusted model directory before anything of it is loaded.

`check_model(dir)` passes over what model.py can load: a dense Llama, Qwen2 or Qwen3 whose tensors are those that its
config.json describes. Else it raises a ValueError of one line, which names the file and the field or tensor. It reads
config.json, the index and the headers of the weights, and takes no memory for what they claim to be.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MOST_BYTES = 2 ** 25  # of a JSON file
LARGEST = 2 ** 20  # of a size
LARGEST_FLOAT = 1e12
MOST_LAYERS = 1000
LONGEST_MESSAGE = 500


def check_model(dir):
    """Raises ValueError for what is not a whole dense Llama, Qwen2 or Qwen3."""
    dir = Path(dir)
    with naming_file(dir / "config.json") as path:
        config = read_fields(path)
        check_fields(config)
        expected = tensor_shapes(config)
    source, paths = weight_files(dir)
    found = set()
    for path in paths:
        with naming_file(path):
            found |= check_header(path, expected, config["tie_word_embeddings"])
    for name in expected:
        if name not in found:
            raise ValueError(f"{source}: tensor {name} is missing")


@contextmanager
def naming_file(path):
    """Whatever is raised in here becomes a ValueError of one line that begins with the path."""
    try:
        yield path
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{path}: {first_line}".replace("\n", " ")[:LONGEST_MESSAGE]) from None


def check_regular(path):
    """A pipe would never end, and a directory that was fetched may hold a link to a device."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")


def read_json(path):
    check_regular(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError("over 32 MB, which no model's is")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


# ------------------------------------------------------------------------------------------- config.json

def read_fields(path):
    """{field: value} as model.read_config understands them; "rope" holds the rotary ones."""
    raw = present(read_json(path))
    older, newer = present(raw.get("rope_scaling", {})), present(raw.get("rope_parameters", {}))  # transformers 4 and 5
    rope = newer | older
    if "original_max_position_embeddings" in raw:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    types = {part[name] for part in (older, newer) for name in ("rope_type", "type") if name in part}
    if len(types) > 1:
        raise ValueError(f"rope_parameters {rope} name several types")
    rope["rope_type"] = types.pop() if types else "default"
    fields = {  # what it means when a field is absent
        "num_key_value_heads": raw.get("num_attention_heads"),
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    if raw.get("model_type") == "qwen3":
        fields["head_dim"] = 128
    return fields | raw | rope | {"rope": rope}


def present(fields):
    return {name: value for name, value in fields.items() if value is not None}


def check_fields(config):
    check_features(config)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings"):
        check_number(config, name, int, LARGEST)
    check_number(config, "num_hidden_layers", int, MOST_LAYERS)
    for name in ("rope_theta", "rms_norm_eps"):
        check_number(config, name, (int, float), LARGEST_FLOAT)
    if type(config["tie_word_embeddings"]) is not bool:
        raise ValueError(f"tie_word_embeddings is {config['tie_word_embeddings']!r}")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise ValueError(f"num_attention_heads {config['num_attention_heads']} is no multiple of "
                         f"num_key_value_heads {config['num_key_value_heads']}")
    if "head_dim" not in config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    check_number(config, "head_dim", int, LARGEST)
    if config["head_dim"] % 2:
        raise ValueError(f"head_dim {config['head_dim']} is odd; rotary positions turn pairs")
    check_rope(config["rope"], config["rope_theta"])


def check_number(fields, name, types, largest, prefix=""):
    value = fields.get(name)
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or not 0 < value <= largest:
        raise ValueError(f"{prefix}{name} is {value!r}")


def check_features(config):
    """Raises ValueError for what model.py does not compute."""
    kind = config.get("model_type")
    architectures = config.get("architectures", list(ARCHITECTURES.values()))
    rope = config["rope"]
    activation = config.get("hidden_act", "silu")
    if ARCHITECTURES.get(kind) not in architectures:
        raise unsupported(f"model_type {kind!r} with architectures {architectures}")
    if rope.get("partial_rotary_factor", 1) != 1 or any(isinstance(value, dict) for value in rope.values()):
        raise unsupported(f"rope_parameters {rope}")
    if config.get("use_sliding_window") or set(config.get("layer_types", [])) - {"full_attention"}:
        raise unsupported("a sliding window")
    if config.get("quantization_config"):
        raise unsupported("quantization_config")
    if config.get("mlp_bias"):
        raise unsupported(f"mlp_bias of a {kind}")
    if config.get("attention_bias") and kind != "qwen2":
        raise unsupported(f"attention_bias of a {kind}")
    if activation not in ("silu", "swish"):
        raise unsupported(f"hidden_act {activation!r}")


def unsupported(what):
    return ValueError(f"{what} is not supported, only dense {', '.join(ARCHITECTURES.values())}")


def check_rope(rope, theta):
    """The numbers that a longer context is computed from."""
    def check(name):
        check_number(rope, name, (int, float), LARGEST_FLOAT, "rope scaling: ")

    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope scaling {kind!r} is not supported: linear, llama3 and yarn are")
    if kind == "default":
        return
    check("factor")
    if "original_max_position_embeddings" in rope:
        check("original_max_position_embeddings")
    if kind == "llama3":
        check("low_freq_factor")
        check("high_freq_factor")
        if not rope["low_freq_factor"] < rope["high_freq_factor"]:
            raise ValueError(f"rope scaling: low_freq_factor {rope['low_freq_factor']} is not below "
                             f"high_freq_factor {rope['high_freq_factor']}")
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            if name in rope:
                check(name)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            check("mscale")
            check("mscale_all_dim")
        if theta == 1:  # every pair turns alike: none is the one that turns so often
            raise ValueError("rope scaling: yarn with a rope_theta of 1")


# ------------------------------------------------------------------------------------------- weights

def tensor_shapes(c):
    """{name: shape} of the tensors that the files must hold."""
    hidden, mlp, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q_rows, kv_rows = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    layer = {
        "input_layernorm.weight": [hidden],
        "self_attn.q_proj.weight": [q_rows, hidden],
        "self_attn.k_proj.weight": [kv_rows, hidden],
        "self_attn.v_proj.weight": [kv_rows, hidden],
        "self_attn.o_proj.weight": [hidden, q_rows],
        "post_attention_layernorm.weight": [hidden],
        "mlp.gate_proj.weight": [mlp, hidden],
        "mlp.up_proj.weight": [mlp, hidden],
        "mlp.down_proj.weight": [hidden, mlp],
    }
    if c["model_type"] == "qwen2":
        layer |= {"self_attn.q_proj.bias": [q_rows], "self_attn.k_proj.bias": [kv_rows],
                  "self_attn.v_proj.bias": [kv_rows]}
    if c["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm.weight": [head], "self_attn.k_norm.weight": [head]}
    shapes = {"model.embed_tokens.weight": [c["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [c["vocab_size"], hidden]
    for i in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def weight_files(dir):
    """The file that names the weights, to name where a tensor is missing, and the safetensors files."""
    single, index = dir / "model.safetensors", dir / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return single, [single]
    with naming_file(index):
        paths = {dir / name for name in read_json(index)["weight_map"].values()}
        for path in paths:
            if path.parent != dir or path.suffix != ".safetensors":
                raise ValueError(f"{path} is no safetensors file of this directory")
    return index, sorted(paths)


def check_header(path, expected, tied):
    """The names of a file's tensors, each a float of the expected shape."""
    check_regular(path)
    names = set()
    with safe_open(path, "pt") as file:
        for name in file.keys():
            if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                continue  # old files hold what is computed, and a tied head twice
            tensor = file.get_slice(name)
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            if shape != expected.get(name) or dtype not in FLOATS:
                raise ValueError(f"tensor {name} is {dtype} {shape}, config.json describes "
                                 f"{expected.get(name, 'no such tensor')}")
            names.add(name)
    return names

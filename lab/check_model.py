"""Diagnoses an untrusted model directory before anything of it is loaded.

`check_model(dir)` passes over what model.py can load, a dense Llama, Qwen2 or Qwen3, and what variants/deepseek_v3.py
can, a DeepSeek-V3 that is not quantised, whose tensors are those that its config.json describes. Else it raises a
ValueError of one line, which names the file and the field or tensor. It reads config.json, the index and the headers of
the weights, and takes no memory for what they claim to be.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "deepseek_v3": "DeepseekV3ForCausalLM"}
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MOST_BYTES = 2 ** 25  # of a JSON file
LARGEST = 2 ** 20  # of a size
LARGEST_FLOAT = 1e12
MOST_LAYERS = 1000
MOST_EXPERTS = 2 ** 16  # of all layers
LONGEST_MESSAGE = 500


def check_model(dir, head="ForCausalLM"):
    """Raises ValueError for what is not a whole model of one of ARCHITECTURES; head: "ForSequenceClassification" for a
    reward model of these kinds."""
    dir = Path(dir)
    with naming_file(dir / "config.json") as path:
        config = read_fields(path) | {"head": head}
        check_fields(config)
        expected, past = tensor_shapes(config), f"model.layers.{config['num_hidden_layers']}."
    source, paths = weight_files(dir)
    found = set()
    for path in paths:
        with naming_file(path):
            found |= check_header(path, expected, config["tie_word_embeddings"], past if is_deepseek(config) else None)
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
    if is_deepseek(raw):
        fields |= {"n_shared_experts": 0, "rope_interleave": True, "num_nextn_predict_layers": 0}
    if raw.get("model_type") == "qwen3":
        fields["head_dim"] = 128
    return fields | raw | rope | {"rope": rope}


def is_deepseek(config):
    return config.get("model_type") == "deepseek_v3"


def present(fields):
    return {name: value for name, value in fields.items() if value is not None}


def check_fields(config):
    check_features(config)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings"):
        check_number(config, name, int, LARGEST)
    check_number(config, "num_hidden_layers", int, MOST_LAYERS)
    if is_deepseek(config):
        check_experts(config)
        config["head_dim"] = config["qk_rope_head_dim"]  # the part that rotates
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


def check_experts(c):
    """The fields that only a DeepSeek-V3 has."""
    for name in ("moe_intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                 "num_experts_per_tok", "n_routed_experts", "n_group", "topk_group"):
        check_number(c, name, int, LARGEST)
    for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
        check_number(c, name, int, MOST_LAYERS, least=0)
    if "q_lora_rank" in c:
        check_number(c, "q_lora_rank", int, LARGEST)
    check_number(c, "routed_scaling_factor", (int, float), LARGEST_FLOAT)
    for name in ("norm_topk_prob", "rope_interleave"):
        if type(c.get(name)) is not bool:
            raise ValueError(f"{name} is {c.get(name)!r}")
    experts, groups = c["n_routed_experts"], c["n_group"]
    if experts % groups or not c["topk_group"] <= groups or (groups > 1 and experts // groups < 2):
        raise ValueError(f"n_routed_experts {experts} are not in n_group {groups} groups of two or more, of which "
                         f"topk_group {c['topk_group']} are chosen")
    if c["num_experts_per_tok"] > experts // groups * c["topk_group"]:
        raise ValueError(f"num_experts_per_tok {c['num_experts_per_tok']} is more than topk_group {c['topk_group']} "
                         f"groups of {experts // groups} have")
    if c["qk_rope_head_dim"] % 2:
        raise ValueError(f"qk_rope_head_dim {c['qk_rope_head_dim']} is odd; rotary positions turn pairs")
    if experts * c["num_hidden_layers"] > MOST_EXPERTS:
        raise ValueError(f"n_routed_experts {experts} in {c['num_hidden_layers']} layers")


def check_number(fields, name, types, largest, prefix="", least=None):
    """Above 0, or at least `least`."""
    value = fields.get(name)
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or not (0 < value if least is None else least <= value) or value > largest:
        raise ValueError(f"{prefix}{name} is {value!r}")


def check_features(config):
    """Raises ValueError for what model.py does not compute."""
    kind = config.get("model_type")
    architectures = config.get("architectures", list(ARCHITECTURES.values()))
    rope = config["rope"]
    activation = config.get("hidden_act", "silu")
    head = config.get("head", "ForCausalLM")
    if ARCHITECTURES.get(kind, "").replace("ForCausalLM", head) not in architectures:
        raise unsupported(f"model_type {kind!r} with architectures {architectures}", head)
    if head == "ForSequenceClassification" and len(config.get("id2label", "LABEL_0 LABEL_1".split())) != 1:
        raise ValueError(f"id2label {config.get('id2label')} are not one label: a reward is one number")
    if rope.get("partial_rotary_factor", 1) != 1 or any(isinstance(value, dict) for value in rope.values()):
        raise unsupported(f"rope_parameters {rope}")
    if config.get("use_sliding_window") or set(config.get("layer_types", [])) - {"full_attention"}:
        raise unsupported("a sliding window")
    if config.get("quantization_config"):
        raise unsupported("quantization_config")
    if config.get("mlp_bias"):
        raise unsupported(f"mlp_bias of a {kind}")
    if is_deepseek(config):
        for name, ours in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
            if config.get(name, ours) != ours:
                raise unsupported(f"{name} {config[name]!r} of a {kind}")
    if config.get("attention_bias") and kind != "qwen2":
        raise unsupported(f"attention_bias of a {kind}")
    if activation not in ("silu", "swish"):
        raise unsupported(f"hidden_act {activation!r}")


def unsupported(what, head="ForCausalLM"):
    *dense, deepseek = (name.replace("ForCausalLM", head) for name in ARCHITECTURES.values())
    return ValueError(f"{what} is not supported, only dense {', '.join(dense)}, and {deepseek}")


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
    shapes = {"model.embed_tokens.weight": [c["vocab_size"], c["hidden_size"]],
              "model.norm.weight": [c["hidden_size"]]}
    if c.get("head") == "ForSequenceClassification":
        shapes["score.weight"] = [1, c["hidden_size"]]
    elif not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [c["vocab_size"], c["hidden_size"]]
    for i in range(c["num_hidden_layers"]):
        layer = deepseek_layer(c, i) if is_deepseek(c) else dense_layer(c)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def dense_layer(c):
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
    return layer


def deepseek_layer(c, i):
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    layer = {
        "input_layernorm.weight": [hidden],
        "self_attn.kv_a_proj_with_mqa.weight": [latent + rope, hidden],
        "self_attn.kv_a_layernorm.weight": [latent],
        "self_attn.kv_b_proj.weight": [heads * (nope + value), latent],
        "self_attn.o_proj.weight": [hidden, heads * value],
        "post_attention_layernorm.weight": [hidden],
    }
    rank = c.get("q_lora_rank")
    if rank is None:
        layer["self_attn.q_proj.weight"] = [heads * (nope + rope), hidden]
    else:
        layer |= {"self_attn.q_a_proj.weight": [rank, hidden], "self_attn.q_a_layernorm.weight": [rank],
                  "self_attn.q_b_proj.weight": [heads * (nope + rope), rank]}
    if i < c["first_k_dense_replace"]:
        return layer | gated("mlp", hidden, c["intermediate_size"])
    layer |= {"mlp.gate.weight": [c["n_routed_experts"], hidden],
              "mlp.gate.e_score_correction_bias": [c["n_routed_experts"]]}
    for e in range(c["n_routed_experts"]):
        layer |= gated(f"mlp.experts.{e}", hidden, c["moe_intermediate_size"])
    if c["n_shared_experts"]:
        layer |= gated("mlp.shared_experts", hidden, c["n_shared_experts"] * c["moe_intermediate_size"])
    return layer


def gated(name, hidden, width):
    return {f"{name}.gate_proj.weight": [width, hidden], f"{name}.up_proj.weight": [width, hidden],
            f"{name}.down_proj.weight": [hidden, width]}


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


def check_header(path, expected, tied, left_out=None):
    """The names of a file's tensors, each a float of the expected shape. left_out: how the names begin of those that
    only pretraining needs."""
    check_regular(path)
    names = set()
    with safe_open(path, "pt") as file:
        for name in file.keys():
            if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                continue  # old files hold what is computed, and a tied head twice
            tensor = file.get_slice(name)
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            if left_out and (name.startswith(left_out) or 0 in shape):
                continue  # what predicts a second token; a shared expert of width 0, as transformers writes
            if shape != expected.get(name) or dtype not in FLOATS:
                raise ValueError(f"tensor {name} is {dtype} {shape}, config.json describes "
                                 f"{expected.get(name, 'no such tensor')}")
            names.add(name)
    return names

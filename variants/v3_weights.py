"""DeepSeek-V3's directories of config.json and safetensors, as `transformers` has them; beside deepseek_v3.py.

    model = load(dir, Config, Transformer)    # of deepseek_v3.py
    save(model, dir, tokenizer)

Its experts are stacked here, (E, ...), and stand one by one in the files; gate_up_proj is two tensors there.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def hf_tensors(model):
    """{Hugging Face's name: a view of our tensor}, without mtp, which only pretraining needs."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("mtp.") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        full_name = name if name == "lm_head.weight" else f"model.{name}"
        matrices = {full_name: tensor}
        if ".experts." in name:  # the routed ones: experts.down_proj -> experts.0.down_proj.weight, ...
            names = [full_name.replace("experts.", f"experts.{e}.") + ".weight" for e in range(len(tensor))]
            matrices = dict(zip(names, tensor))
        for matrix_name, matrix in matrices.items():
            if "gate_up_proj" in matrix_name:
                gate, up = matrix.chunk(2)
                tensors[matrix_name.replace("gate_up_proj", "gate_proj")] = gate
                tensors[matrix_name.replace("gate_up_proj", "up_proj")] = up
            else:
                tensors[matrix_name] = matrix
    return tensors


def save(model, dir, tokenizer=None):
    """Writes a model directory that `transformers` opens too."""
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer.save(dir)
    end_ids = getattr(tokenizer, "end_ids", [None])
    end = {"eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids}
    config = asdict(model.config) | end | {
        "num_nextn_predict_layers": 0, "num_key_value_heads": model.config.num_attention_heads, "bos_token_id": None,
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu", "attention_bias": False,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch.")}
    sampling = end | {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    weights = {name: rows.cpu().contiguous() for name, rows in hf_tensors(model).items()}
    save_file(weights, dir / "model.safetensors", {"format": "pt"})
    (dir / "generation_config.json").write_text(json.dumps(sampling))
    (dir / "config.json").write_text(json.dumps(config, indent=2))


def without_none(raw):
    return {name: value for name, value in raw.items() if value is not None}


def read_config(dir, Config):
    """The Config of a directory's config.json; lab/check_model.py diagnoses a broken one."""
    raw = json.loads(Path(dir, "config.json").read_text(encoding="utf-8"), object_hook=without_none)
    rope = raw.get("rope_parameters", {}) | raw.get("rope_scaling", {})  # of transformers 5, and 4
    if (raw["model_type"] != "deepseek_v3" or raw.get("scoring_func", "sigmoid") != "sigmoid"
            or raw.get("topk_method", "noaux_tc") != "noaux_tc" or raw.get("quantization_config")
            or raw.get("attention_bias") or raw.get("mlp_bias") or raw.get("moe_layer_freq", 1) != 1
            or raw.get("hidden_act", "silu") not in ("silu", "swish")
            or raw["n_routed_experts"] % raw["n_group"]):
        raise ValueError(f"{dir}: not a DeepSeek-V3 as deepseek_v3.py computes it")
    defaults = {"q_lora_rank": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                "n_shared_experts": 0, "rope_interleave": True}
    values = defaults | raw | rope  # rope last: transformers 5 keeps rope_theta there
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    if "original_max_position_embeddings" in raw:
        scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    scaling["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return Config(**{field.name: values[field.name] for field in fields(Config)})


@torch.no_grad()
def load(dir, Config, Transformer, device=None, dtype=None, **rope):
    """The model of a Hugging Face directory, on the GPU if there is one; dtype None: as stored (pass float32 to train),
    the routers always in float32; rope=...: in place of rope_frequencies (variants/rope_scaling.py)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shards = sorted(Path(dir).glob("model*.safetensors"))
    files = {name: path for path in shards for name in safe_open(path, "pt").keys()}
    with torch.device("meta"):  # no memory and no random numbers for what is replaced
        model = Transformer(read_config(dir, Config), **rope)
    first = "model.embed_tokens.weight"
    model.to(dtype or safe_open(files[first], "pt").get_slice(first)[:0].dtype)  # no row is read
    for router in model.routers():
        router.float()
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:  # to_empty has made two of them
        model.lm_head.weight = model.embed_tokens.weight
    for name, rows in hf_tensors(model).items():
        with safe_open(files[name], "pt") as file:
            tensor = file.get_tensor(name)
        if tensor.shape != rows.shape:
            raise ValueError(f"{files[name]}: tensor {name} is {list(tensor.shape)}, not {list(rows.shape)}")
        rows.copy_(tensor)
    return model

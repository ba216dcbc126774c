"""A concept file is copied alone into an empty folder and used there (STYLE.md, "A file that can be copied")."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {  # beside the standard library
    "model": {"torch", "safetensors", "tqdm"}, "tokenizer": {"tiktoken", "tqdm"}, "sft": {"torch", "tqdm"}, "rewards": set(),
    "grpo": {"torch", "tqdm"}, "ppo": {"torch", "tqdm"}, "prime": {"torch", "tqdm"}, "process": {"torch"},
    "configs": set(), "distill": set(), "graphs": {"torch"},
    "evaluate": {"numpy", "tqdm"}, "checkpoint": {"torch", "safetensors", "numpy"}}
CONCEPTS = [name for name in ALLOWED if (ROOT / f"{name}.py").exists()]

TOY = """
class Toy(torch.nn.Module):
    "A table: the next token depends on this one."
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 8)
        torch.nn.init.zeros_(self.table.weight)

    def forward(self, ids, positions=None, segments=None):
        return self.table(ids)
"""

EXAMPLES = {
    "ppo": """
        import ppo
        rewards, values, mask = torch.tensor([[0., 0, 0, 1]]), torch.tensor([[9., 0.2, 0.4, 0.7]]), torch.tensor([[0, 1, 1, 1]])
        advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
        assert torch.allclose(advantages, torch.tensor([[0, 0.8, 0.6, 0.3]])) and torch.allclose(returns, mask.float())
    """,
    "prime": """
        import prime
        process, mask = torch.tensor([[0.5, 0.1], [0.2, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        advantages = prime.prime_advantages(process, torch.tensor([[1.0, 0.0]]), mask)
        assert torch.allclose(advantages, torch.tensor([[0.5 + 0.1 - 2 * 0.2 + 1, 0.1 - 0.2 + 1], [0.2 - 0.3 - 1, 0.0]]))
    """,
    "process": """
        import process
        rewards, ends = torch.tensor([[0., 1, 0], [0, 0, 3]]), torch.tensor([[False, True, False], [False, False, True]])
        advantages = process.process_advantages(rewards, ends, group_size=2, scale_by_std=False)
        assert advantages.tolist() == [[-1, -1, 0], [1, 1, 1]]
    """,
    "configs": """
        import configs
        assert configs.PUBLISHED["r1-zero"]["group_size"] == 16 and configs.METHODS["dapo"]["clip_high"] == 0.28
    """,
    "model": """
        import model
        net = model.Transformer(model.Config(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1))
        net.init_weights(torch.Generator().manual_seed(0))
        ids, lengths, logprobs = model.generate(net, [[1, 2], [3]], n=2, max_new_tokens=5, generator=torch.Generator().manual_seed(0))
        assert ids.shape == (4, 5) and (logprobs < 0).all()
        model.save(net, "weights")
        again = model.load("weights")
        tokens = torch.tensor([[1, 2, 3]])
        assert torch.equal(net(tokens), again(tokens))
    """,
    "tokenizer": """
        import json, pathlib, tokenizer
        spec = tokenizer.train_bpe(["Tom has 12 apples."] * 3, 280)
        pathlib.Path("tokenizer.json").write_text(json.dumps(spec))
        tok = tokenizer.Tokenizer(".")
        assert tok.decode(tok.encode("<think>Tom 三</think>")) == "<think>Tom 三</think>"
    """,
    "sft": TOY + """
        import sft
        net = Toy()
        last = sft.train(net, [([1, 2, 3, 4], 1)] * 40, sft.SFTConfig(lr=0.3, batch_tokens=16, row_length=8, dtype="float32"))
        assert last["loss"] < 0.2 and net(torch.tensor([[2]])).argmax() == 3
    """,
    "graphs": """
        import graphs
        generate = graphs.with_graphs(lambda model, prompts, n: (model, prompts, n))
        net = torch.nn.Linear(2, 2)
        assert generate(net, [[1]], n=3) == (net, [[1]], 3)
    """,
    "rewards": """
        import rewards
        example = {"prompt": "2+3?", "answer": "5", "language": "en", "kind": "reasoning"}
        text = "<think> two and three </think><answer> 5 </answer>"
        assert [rewards.REWARDS[n](text, example) for n in ("accuracy", "format", "language_consistency")] == [1, 1, 1]
    """,
    "grpo": TOY + """
        import grpo
        def generate(model, prompts, n, max_new_tokens, temperature, end_ids, generator):
            ids = torch.tensor([p for p in prompts for _ in range(n)])[:, -1:]
            for _ in range(max_new_tokens):
                probabilities = (model(ids[:, -1]) / temperature).softmax(-1)
                ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
            out = ids[:, 1:]
            ends = (out == end_ids[0]).int()
            lengths = torch.where(ends.any(1), ends.argmax(1) + 1, max_new_tokens)
            return out, lengths, torch.zeros(out.shape)
        rewards = []
        grpo.train(Toy(), [[1], [2]], encode=list, decode=lambda ids: ids, generate=generate, end_ids=[0],
                   rewards={"ones": lambda ids, example: ids.count(5) / len(ids)}, log=lambda m, r: rewards.append(m["reward"]),
                   config=grpo.GRPOConfig(rollouts=20, prompts_per_rollout=2, group_size=8, max_new_tokens=4, lr=0.1, warmup=1,
                                          dtype="float32"))
        assert rewards[0] < 0.3 and rewards[-1] > 0.7, rewards
    """,
    "distill": """
        import distill
        rows, counts = distill.rejection_sample([{"prompt": "2+3?"}], [["5", "6", "5"]], lambda t, e: t == "5", lambda t, e: True)
        assert counts["kept"] == counts["correct"] == counts["distinct"] == 1
        assert len(distill.distill(None, rows * 3, [{"prompt": "hello", "completion": "hi"}], lambda row: row, lambda m, e: e)) == 4
    """,
    "evaluate": """
        import evaluate
        assert evaluate.pass_at_k(4, 1, 2) == 0.5 and evaluate.majority_at_k([5, 5, 7], 5, 3) == 1
        assert evaluate.bootstrap([1, 1, 1]) == (1, 1, 1)
    """,
    "checkpoint": """
        import checkpoint
        net, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        checkpoint.save("state", *checkpoint.state_of(model=net, step=3))
        assert checkpoint.restore(*checkpoint.load("state"), model=other) == {"step": 3}
        assert torch.equal(net.weight, other.weight)
    """,
}

AROUND = """
import io, random, sys
sys.path.insert(0, ".")
sys.stdout, sys.stderr, shown = io.StringIO(), io.StringIO(), (sys.stdout, sys.stderr)
import {packages}
state = lambda: [random.getstate(), *[str(sys.modules[m].random.get_state()) for m in ["numpy"] if m in sys.modules],
                 *[sys.modules[m].get_rng_state().tolist() + [sys.modules[m].get_default_dtype(), sys.modules[m].get_num_threads(),
                   sys.modules[m].is_grad_enabled()] for m in ["torch"] if m in sys.modules]]
before = state()
import {name}
assert state() == before, "importing changed a random state or a flag"
assert sys.stdout.getvalue() + sys.stderr.getvalue() == "", "importing printed something"
loaded = {{m.partition(".")[0] for m in sys.modules}} & {siblings!r}
assert loaded == {{{name!r}}}, loaded
sys.stdout, sys.stderr = shown
"""


def alone(name, script, folder):
    """Runs a script in a fresh interpreter, in a folder that holds one file of ours and nothing else."""
    shutil.copy(ROOT / f"{name}.py", folder)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run([sys.executable, "-I", "-c", script], cwd=folder, env=clean, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_concept_file_alone_in_an_empty_folder_imports_silently_and_works(name, tmp_path):
    packages = sorted(ALLOWED[name] - {"tqdm"}) or ["json"]
    siblings = {path.stem for path in ROOT.glob("*.py")}
    script = AROUND.format(name=name, packages=", ".join(packages), siblings=siblings) + textwrap.dedent(EXAMPLES[name])
    result = alone(name, script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_every_concept_file_has_an_example_here():
    assert set(CONCEPTS) == set(EXAMPLES)


@pytest.mark.parametrize("name", CONCEPTS)
def test_at_the_top_a_concept_file_imports_the_standard_library_and_its_packages_only(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.Lambda))
              for node in ast.walk(function)}
    found = set()
    for node in ast.walk(tree):
        if id(node) not in inside and isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found.add(node.module.partition(".")[0])
        elif id(node) not in inside and isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    assert found - set(sys.stdlib_module_names) <= ALLOWED[name]


@pytest.mark.parametrize("name", CONCEPTS)
def test_only_main_imports_siblings(name):
    siblings = {path.stem for path in ROOT.glob("*.py")} | {"data"}
    for function in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and function.name != "main":
            for node in ast.walk(function):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) else []
                assert not {m.partition(".")[0] for m in modules} & siblings, f"{name}.{function.name} line {node.lineno}"


@pytest.mark.parametrize("name", CONCEPTS)
def test_the_body_of_a_concept_file_only_defines(name):
    """No call stands alone at the top, no loop and no flag: importing does nothing."""
    for node in ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert is_docstring or is_main or isinstance(
            node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)), f"line {node.lineno}"
        for target in getattr(node, "targets", []):
            assert isinstance(target, (ast.Name, ast.Tuple)), f"line {node.lineno}: sets something of another module"


@pytest.mark.parametrize("name", CONCEPTS)
def test_nothing_says_cuda_by_itself(name):
    """Device and dtype come from the inputs or the parameters."""
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node.value) != "torch"), node.lineno


def test_what_two_files_hold_twice_agrees():
    """The price of files that can be copied."""
    import rewards
    import tokenizer
    assert list(tokenizer.TAGS) == rewards.TAGS


SCRATCH = """
import sys
sys.path.insert(0, ".")
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import grpo

class Wrapped(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(input_ids=ids, use_cache=False).logits

@torch.no_grad()
def generate(model, prompts, n, max_new_tokens, temperature, end_ids, generator):
    rows, logprobs, lengths = [], [], []
    for prompt in prompts:
        ids = torch.tensor([prompt] * n)
        scores = []
        for _ in range(max_new_tokens):
            p = (model(ids)[:, -1].float() / temperature).log_softmax(-1)
            token = torch.multinomial(p.exp(), 1, generator=generator)
            ids, scores = torch.cat([ids, token], 1), scores + [p.gather(1, token)]
        rows.append(ids[:, len(prompt):])
        logprobs.append(torch.cat(scores, 1))
    ids = torch.cat(rows)
    ended = torch.isin(ids, torch.tensor(end_ids)).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, max_new_tokens)
    return ids, lengths, torch.cat(logprobs)

torch.manual_seed(0)
torch.set_num_threads(1)
model = Wrapped(LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                             num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.1)))
curve = []
grpo.train(model, [[1, 2], [4, 5, 6]], encode=list, decode=lambda ids: ids, generate=generate, end_ids=[3],
           rewards={"sevens": lambda ids, example: ids.count(7) / len(ids)},
           config=grpo.GRPOConfig(rollouts=12, prompts_per_rollout=2, group_size=16, lr=1e-2, warmup=1, max_new_tokens=5, dtype="float32"),
           log=lambda metrics, rollout: curve.append(metrics))
rewards = [m["reward"] for m in curve]
assert rewards[0] < 0.2 and rewards[-1] > 0.6, rewards
assert curve[0]["sampler_gap"] < 1e-5
"""


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_grpo_copied_alone_trains_a_transformers_model_in_a_scratch_project(tmp_path):
    result = alone("grpo", SCRATCH, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_readme_links_to_the_lines_that_it_names():
    lines = {"`rollout`": "def rollout(", "one line": "total = sum(weights", "`group_advantages`": "def group_advantages(",
             "`policy_loss`": "objective = torch.min(ratio", "`kl_divergence`": "def kl_divergence(", "this line": "token_loss / lengths",
             "the loop": "c.minibatches", "here": "reference.load_state_dict", "`recipe` in pipeline.py": "def recipe("}
    links = re.findall(r"\[([^\]]+)\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {text for text, _, _ in links} == lines.keys()
    for text, file, number in links:
        assert lines[text] in (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1], text

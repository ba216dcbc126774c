"""A concept file is copied alone into an empty folder and used there; and which file may import which."""

import ast
import importlib.util
import inspect
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
    "model": {"torch", "safetensors", "tqdm"}, "tokenizer": {"tiktoken", "regex"}, "rewards": set(),
    "sft": {"torch", "tqdm"}, "grpo": {"torch", "tqdm"}, "distill": set(), "evaluate": {"numpy", "tqdm"},
    "variants/ppo": {"torch", "tqdm"}, "variants/prime": {"torch", "tqdm"}, "variants/process": {"torch"},
    "variants/dapo": {"torch"}, "variants/rope_scaling": {"torch"}, "variants/configs": set(),
    "variants/lora": {"torch"}, "variants/offload": {"torch"}, "variants/deepseek_v3": {"torch"},
    "variants/v3_pretraining": {"torch"}, "variants/v3_weights": {"torch", "safetensors"},
    "variants/reward_model": {"torch"},
    "lab/checkpoint": {"torch", "safetensors", "numpy"}}
CONCEPTS = [*ALLOWED]
FOLDERS = ("variants", "lab", "data")
OURS = [path for folder in (ROOT, *(ROOT / name for name in FOLDERS)) for path in sorted(folder.glob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in OURS}
SIBLINGS = {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)

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
    "variants/ppo": TOY + """
        from types import SimpleNamespace
        import ppo
        class Policy(Toy):
            def hidden(self, ids):
                return self.table(ids)
        config = SimpleNamespace(dtype="float32", micro_batch_tokens=8, grad_clip=1.0)
        ids, mask = torch.tensor([[1, 2, 3, 4], [1, 5, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
        rollout = SimpleNamespace(ids=ids, ends=[4, 2], mask=mask, old_logprobs=torch.zeros(2, 3),
                                  rewards=torch.tensor([[1.0, 0.0]]))
        policy = Policy()
        torch.nn.init.normal_(policy.table.weight, generator=torch.Generator().manual_seed(0))
        estimator = ppo.PPO(policy, config, ppo.PPOConfig(critic_lr=0.1, whiten=False))
        first = estimator.advantages(rollout)
        assert first.tolist() == [[1, 1, 1], [0, 0, 0]], first
        for _ in range(100):
            estimator.advantages(rollout), estimator.learn(rollout, [0, 1])
        last = estimator.advantages(rollout)
        # token 1 is followed by a 1 or by a 0
        assert last[0, 1:].abs().max() < 0.1 and abs(last[0, 0] - 0.5) < 0.2, last
        rewards, values = torch.tensor([[0., 0, 0, 1]]), torch.tensor([[9., .2, .4, .7]])
        mask = torch.tensor([[0, 1, 1, 1]])
        advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
        assert torch.allclose(advantages, torch.tensor([[0, 0.8, 0.6, 0.3]])) and torch.allclose(returns, mask.float())
    """,
    "variants/prime": TOY + """
        from types import SimpleNamespace
        import prime
        process, mask = torch.tensor([[0.5, 0.1], [0.2, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        advantages = prime.prime_advantages(process, torch.tensor([[1.0, 0.0]]), mask)
        expected = torch.tensor([[0.5 + 0.1 - 2 * 0.2 + 1, 0.1 - 0.2 + 1], [0.2 - 0.3 - 1, 0.0]])
        assert torch.allclose(advantages, expected)
        config = SimpleNamespace(dtype="float32", micro_batch_tokens=8, grad_clip=1.0, temperature=1.0)
        ids, mask = torch.tensor([[1, 2, 3, 4], [1, 5, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
        rollout = SimpleNamespace(ids=ids, ends=[4, 2], mask=mask, old_logprobs=torch.zeros(2, 3),
                                  parts={"accuracy": torch.tensor([[1.0, 0.0]])})
        estimator = prime.PRIME(Toy(), config, prime.PRIMEConfig(prm_lr=0.1, prm_beta=0.5))
        assert estimator.advantages(rollout).tolist() == [[1, 1, 1], [-1, 0, 0]]
        for _ in range(50):
            estimator.advantages(rollout)
        assert estimator.learn(rollout, [0])["prm_accuracy"] == 1 and estimator.metrics["prm_loss"] < 0.1
    """,
    "variants/dapo": """
        import torch
        from types import SimpleNamespace
        import dapo
        rollout = SimpleNamespace(rewards=torch.tensor([[0., 1], [1, 1]]))
        assert dapo.has_signal(rollout).tolist() == [True, False]
        assert dapo.length_penalty(torch.tensor([0, 8, 9, 12]), 10, 4).tolist() == [0, -0.5, -0.75, -1]
    """,
    "variants/lora": """
        import lora
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        before, weight = net(x), net[0].weight.clone()
        lora.add_adapters(net, rank=2, generator=torch.Generator().manual_seed(0))
        assert torch.equal(net(x), before)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(100):
            loss = (net(x) - x[:, :2]).square().mean()
            loss.backward(), optimizer.step(), optimizer.zero_grad()
        assert loss < 0.1 and torch.equal(net[0].weight, weight), loss
        after = net(x)
        assert torch.allclose(lora.merge(net)(x), after, atol=1e-5) and not lora.adapters(net)
    """,
    "variants/deepseek_v3": """
        import torch
        import deepseek_v3
        config = deepseek_v3.Config(vocab_size=16, hidden_size=16, num_hidden_layers=2, moe_intermediate_size=8)
        net, tokens = deepseek_v3.Transformer(config), torch.tensor([[1, 2, 3]])
        cache = net.new_cache(torch.zeros(1, dtype=torch.long))
        steps = [net(tokens[:, t:t + 1], cache=cache) for t in range(3)]
        assert torch.allclose(torch.cat(steps, dim=1), net(tokens), atol=1e-5)
    """,
    "variants/reward_model": TOY + """
        from types import SimpleNamespace
        import reward_model
        class Body(torch.nn.Module):
            config = SimpleNamespace(hidden_size=8)
            def __init__(self):
                super().__init__()
                self.hidden = torch.nn.Embedding(8, 8)
        torch.manual_seed(0)
        judge, pairs = reward_model.RewardModel(Body()), [([1, 2, 7], [1, 2, 6]), ([5, 7], [5, 6])] * 50
        done = reward_model.train(judge, pairs, reward_model.RewardConfig(lr=0.1, batch_rows=10, dtype="float32"))
        assert done["accuracy"] == 1 and done["loss"] < 0.1, done
        good, bad = reward_model.score(judge, [[3, 7], [3, 6]], "float32")
        assert good > bad
    """,
    "variants/v3_weights": """
        import torch
        from dataclasses import dataclass
        import v3_weights
        @dataclass
        class Config:
            tie_word_embeddings: bool = False
            num_attention_heads: int = 2
            n_group: int = 1
            n_routed_experts: int = 3
        class Toy(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                self.config, self.embed_tokens, self.experts = config, torch.nn.Embedding(4, 2), torch.nn.Module()
                self.experts.gate_up_proj = torch.nn.Parameter(torch.randn(3, 2, 2))
            def routers(self):
                return []
        def with_type(config):
            return vars(config) | {"model_type": "deepseek_v3"}
        v3_weights.asdict, net = with_type, Toy(Config())
        v3_weights.save(net, "weights")
        again = v3_weights.load("weights", Config, Toy, "cpu")
        assert torch.equal(again.experts.gate_up_proj, net.experts.gate_up_proj)
    """,
    "variants/v3_pretraining": """
        import torch
        from types import SimpleNamespace
        import v3_pretraining
        router, load = SimpleNamespace(e_score_correction_bias=torch.zeros(3)), torch.tensor([3.0, 0, 3])
        assert v3_pretraining.balance([router], [load], gamma=0.5) == 1.5
        assert router.e_score_correction_bias.tolist() == [-0.5, 0.5, -0.5]
        even = torch.eye(4).roll(1, 0) + 1e-6
        loss = v3_pretraining.sequence_balance(even, torch.ones(1, 4).bool(), 1)
        assert abs(loss.item() - 1) < 1e-4
    """,
    "variants/offload": """
        import copy
        import torch
        import offload
        masters = torch.nn.Linear(4, 2)
        model, alone = copy.deepcopy(masters), copy.deepcopy(masters)
        adam = lambda net: torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
        steps = [(model, offload.step_on_cpu(adam(masters), model, masters)), (alone, adam(alone))]
        for net, optimizer in steps:
            for _ in range(5):
                net(torch.ones(1, 4)).square().sum().backward()
                optimizer.step(), optimizer.zero_grad()
        assert torch.equal(model.weight, alone.weight) and torch.equal(masters.weight, alone.weight)
    """,
    "variants/rope_scaling": """
        from types import SimpleNamespace
        import rope_scaling
        config = SimpleNamespace(head_dim=4, rope_theta=100.0, max_position_embeddings=64,
                                 rope_scaling={"rope_type": "linear", "factor": 2.0})
        frequency, scale = rope_scaling.scaled_frequencies(config)
        assert (frequency - torch.tensor([0.5, 0.05])).abs().max() < 1e-6 and scale == 1
    """,
    "variants/process": """
        import process
        rewards = torch.tensor([[0., 1, 0], [0, 0, 3]])
        ends = rewards > 0
        advantages = process.process_advantages(rewards, ends, group_size=2, scale_by_std=False)
        assert advantages.tolist() == [[-1, -1, 0], [1, 1, 1]]
    """,
    "variants/configs": """
        import configs
        assert configs.PUBLISHED["r1-zero"]["group_size"] == 16 and configs.METHODS["dapo"]["clip_high"] == 0.28
    """,
    "model": """
        import model
        net = model.Transformer(model.Config(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1))
        net.init_weights(torch.Generator().manual_seed(0))
        ids, lengths, logprobs = model.generate(net, [[1, 2], [3]], n=2, max_new_tokens=5,
                                                generator=torch.Generator().manual_seed(0))
        assert ids.shape == (4, 5) and (logprobs < 0).all()
        model.save(net, "weights")
        again = model.load("weights")
        tokens = torch.tensor([[1, 2, 3]])
        assert torch.equal(net(tokens), again(tokens))
    """,
    "tokenizer": """
        import json, pathlib, tokenizer
        vocab = {char: i for i, char in enumerate([*tokenizer.BYTE, "To", "Tom"])}
        added = [{"id": 258 + i, "content": tag, "special": False} for i, tag in enumerate(tokenizer.TAGS)]
        added.append({"id": 262, "content": "<|endoftext|>", "special": True})
        spec = {"added_tokens": added, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                "decoder": {"type": "ByteLevel"},
                "model": {"type": "BPE", "vocab": vocab, "merges": ["T o", "To m"]}}
        pathlib.Path("tokenizer.json").write_text(json.dumps(spec))
        tok = tokenizer.Tokenizer(".")
        ids = tok.encode("<think>Tom 三</think>")
        assert ids[:2] == [258, 257] and tok.decode(ids) == "<think>Tom 三</think>"
    """,
    "sft": TOY + """
        import sft
        net = Toy()
        config = sft.SFTConfig(lr=0.3, batch_tokens=16, row_length=8, dtype="float32")
        last = sft.train(net, [([1, 2, 3, 4], 1)] * 40, config)
        assert last["loss"] < 0.2 and net(torch.tensor([[2]])).argmax() == 3
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
                   rewards={"ones": lambda ids, example: ids.count(5) / len(ids)},
                   log=lambda m, r: rewards.append(m["reward"]),
                   config=grpo.GRPOConfig(rollouts=20, prompts_per_rollout=2, group_size=8, max_new_tokens=4, lr=0.1,
                                          warmup=1, dtype="float32"))
        assert rewards[0] < 0.3 and rewards[-1] > 0.7, rewards
    """,
    "distill": """
        import distill
        rows, counts = distill.rejection_sample([{"prompt": "2+3?"}], [["5", "6", "5"]], correct=lambda t, e: t == "5",
                                                one_language=lambda t, e: True)
        assert counts["kept"] == counts["correct"] == counts["distinct"] == 1
        general = [{"prompt": "hello", "completion": "hi"}]
        assert len(distill.distill(None, rows * 3, general, encode=dict, train=lambda model, examples: examples)) == 4
    """,
    "evaluate": """
        import evaluate
        assert evaluate.pass_at_k(4, 1, 2) == 0.5 and evaluate.majority_at_k([5, 5, 7], 5, 3) == 1
        assert evaluate.bootstrap([1, 1, 1]) == (1, 1, 1)
    """,
    "lab/checkpoint": """
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

def state():
    states = [random.getstate()]
    if "numpy" in sys.modules:
        states.append(str(sys.modules["numpy"].random.get_state()))
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        states += [torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
                   torch.is_grad_enabled()]
    return states

before = state()
import {name}
assert state() == before, "importing changed a random state or a flag"
assert sys.stdout.getvalue() + sys.stderr.getvalue() == "", "importing printed something"
loaded = {{m.partition(".")[0] for m in sys.modules}} & {siblings!r}
assert loaded == {{{name!r}}}, loaded
sys.stdout, sys.stderr = shown
"""


FORKS = """
import numpy, os, regex, safetensors, signal, sys, tiktoken, torch, traceback
for folder in sys.argv[1:]:
    if os.fork() == 0:  # the child leaves the loop and ends like any interpreter
        signal.alarm(60)  # one that hangs is killed, and named
        os.chdir(folder)
        os.dup2(os.open("said", os.O_CREAT | os.O_WRONLY), 1), os.dup2(1, 2)
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        exec(compile(open("script").read(), "script", "exec"), {"__name__": "__main__"})
        break
    open(f"{folder}/status", "w").write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


def fresh_interpreter(script, *args, cwd):
    """What it prints: an interpreter that knows the installed packages and nothing of this project."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run([sys.executable, "-I", "-c", script, *args], cwd=cwd, env=clean, capture_output=True,
                            text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a folder that held this file and a script with its example, which has run there}; in forks of one fresh
    interpreter, since each would take seconds to import torch."""
    made, stems = {}, {path.stem for path in MODULES.values()} | set(FOLDERS)
    for name, example in EXAMPLES.items():
        made[name] = tmp_path_factory.mktemp("alone")
        shutil.copy(ROOT / f"{name}.py", made[name])
        packages = sorted(ALLOWED[name] - {"tqdm"}) or ["json"]
        around = AROUND.format(name=Path(name).stem, packages=", ".join(packages), siblings=stems)
        (made[name] / "script").write_text(around + textwrap.dedent(example) + "\nprint('to its end')")
    fresh_interpreter(FORKS, *map(str, made.values()), cwd=ROOT)
    return made


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_concept_file_alone_in_an_empty_folder_imports_silently_and_works(name, folders):
    said = (folders[name] / "said").read_text()
    assert ((folders[name] / "status").read_text(), said) == ("0", "to its end\n")


def test_the_folder_of_variants_copied_as_it_is_imports_alone(tmp_path):
    shutil.copytree(ROOT / "variants", tmp_path / "variants", ignore=shutil.ignore_patterns("__pycache__"))
    script = "import sys; sys.path.insert(0, ''); from variants import configs, ppo, prime, process; print(ppo.PPO)"
    assert "variants.ppo.PPO" in fresh_interpreter(script, cwd=tmp_path)


def test_every_concept_file_has_an_example_here():
    top = {path.stem for path in ROOT.glob("*.py")} - {"pipeline"}
    variants = {f"variants/{path.stem}" for path in ROOT.glob("variants/*.py")} - {"variants/__init__"}
    assert EXAMPLES.keys() == ALLOWED.keys() == top | variants | {"lab/checkpoint"}


# ------------------------------------------------------------------------------------------- who imports whom

def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    """[(node, module)] of each import in a tree, functions included; of `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node, node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def functions_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]


@pytest.mark.parametrize("name", CONCEPTS)
def test_at_the_top_a_concept_file_imports_the_standard_library_and_its_packages_only(name):
    tree = parsed(ROOT / f"{name}.py")
    inside = {id(node) for function in functions_of(tree) for node in ast.walk(function)}
    found = {module.partition(".")[0] for node, module in imported(tree) if id(node) not in inside}
    assert found - set(sys.stdlib_module_names) <= ALLOWED[name]


@pytest.mark.parametrize("name", CONCEPTS)
def test_only_main_imports_siblings(name):
    for function in functions_of(parsed(ROOT / f"{name}.py")):
        for node, module in imported(function):
            if module.partition(".")[0] in SIBLINGS:
                assert getattr(function, "name", "") == "main", f"line {node.lineno}: {module}"


def graph_of_imports():
    """{module of ours: those of ours that it imports, at any level}."""
    edges = {}
    for name, path in MODULES.items():
        edges[name] = {module for _, module in imported(parsed(path)) if module in MODULES and module != name}
    return edges


def test_no_file_imports_another_in_a_circle_not_even_within_functions():
    edges, done = graph_of_imports(), set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    assert {"pipeline", "lab.scripts", "variants.ppo", "data.world"} <= done


def test_the_recipe_and_what_runs_it_are_imported_by_nothing_below():
    above = {"pipeline", "lab.run", "lab.compare", "lab.ablations", "lab.preferences"}
    for name, others in graph_of_imports().items():
        if name not in above:
            assert not others & above, name
    assert not any(others & {"pipeline"} for others in graph_of_imports().values())


@pytest.mark.parametrize("name", CONCEPTS)
def test_the_body_of_a_concept_file_only_defines(name):
    """No call stands alone at the top, no loop and no flag: importing does nothing."""
    for node in parsed(ROOT / f"{name}.py").body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert is_docstring or is_main or isinstance(
            node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
        ), f"line {node.lineno}"
        for target in getattr(node, "targets", [node.target] if hasattr(node, "target") else []):
            assert isinstance(target, (ast.Name, ast.Tuple)), f"line {node.lineno}: sets something of another module"


@pytest.mark.parametrize("name", CONCEPTS)
def test_nothing_says_cuda_by_itself(name):
    """Device and dtype come from the inputs or the parameters."""
    for node in ast.walk(parsed(ROOT / f"{name}.py")):
        assert not (isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node.value) != "torch"), (
            node.lineno)


def test_what_two_files_hold_twice_agrees():
    """The price of files that can be copied."""
    import grpo
    import rewards
    import tokenizer
    from variants import ppo, prime
    assert list(tokenizer.TAGS) == list(rewards.TAGS)
    for copy in (ppo, prime):
        for name in ("share", "sum_over_processes", "micro_batches"):
            assert inspect.getsource(getattr(copy, name)) == inspect.getsource(getattr(grpo, name))


def test_no_line_of_a_python_file_is_longer_than_120_characters():
    files = [*MODULES.values(), *ROOT.glob("tests/**/*.py")]
    wide = [f"{path.relative_to(ROOT)}:{number}" for path in files
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not wide, wide


# ------------------------------------------------------------------------------------------- a model from elsewhere

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
    rows, logprobs = [], []
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
settings = dict(rollouts=12, prompts_per_rollout=2, group_size=16, lr=1e-2, warmup=1, max_new_tokens=5, dtype="float32")
rules = {"sevens": lambda ids, example: ids.count(7) / len(ids), "seven": lambda ids, example: float(7 in ids)}
curve = []

def train(rule, config, estimator=None):
    grpo.train(model, [[1, 2], [4, 5, 6]], encode=list, decode=lambda ids: ids, generate=generate, end_ids=[3],
               rewards={rule: rules[rule]}, config=config, advantage_estimator=estimator,
               log=lambda metrics, rollout: curve.append(metrics))
    return [metrics["reward"] for metrics in curve]
"""

METHODS = {
    "distill": """
        import distill
        from functools import partial
        from transformers import Qwen2Config, Qwen2ForCausalLM
        teacher = Wrapped(Qwen2ForCausalLM(Qwen2Config(vocab_size=16, hidden_size=24, intermediate_size=48,
                                                       num_hidden_layers=1, num_attention_heads=2,
                                                       num_key_value_heads=1)))
        teacher.inner.lm_head.weight.data *= 20
        config = grpo.GRPOConfig(**settings, beta=0.0)
        train("sevens", config, distill.OnPolicy(teacher, partial(grpo.all_logprobs, config=config)))
        kl = [metrics["reverse_kl"] for metrics in curve]
        assert sum(kl[:2]) / 2 > 0.5 and sum(kl[-2:]) / 2 < 0.5 * sum(kl[:2]) / 2, kl
    """,
    "grpo": """
        rewards = train("sevens", grpo.GRPOConfig(**settings))
        assert rewards[0] < 0.2 and rewards[-1] > 0.6, rewards
        assert curve[0]["sampler_gap"] < 1e-5
    """,
    "variants/ppo": """
        import ppo
        config = grpo.GRPOConfig(**settings, mean="token", beta=0.0)
        states = lambda trunk, ids: trunk.inner.model(input_ids=ids, use_cache=False).last_hidden_state
        rewards = train("sevens", config, ppo.PPO(model, config, ppo.PPOConfig(critic_lr=1e-2), hidden=states))
        assert rewards[0] < 0.2 and sum(rewards[-2:]) / 2 > 0.5, rewards
    """,
    "variants/prime": """
        import prime
        config = grpo.GRPOConfig(**settings, mean="token", beta=0.0)
        rewards = train("seven", config, prime.PRIME(model, config, prime.PRIMEConfig(prm_lr=3e-3), outcome="seven"))
        assert sum(rewards[:2]) / 2 < 0.5 and sum(rewards[-2:]) / 2 > 0.8, rewards
    """}


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("name", METHODS)
def test_grpo_copied_alone_or_with_a_variant_trains_a_transformers_model_in_a_scratch_project(name, tmp_path):
    for file in {"grpo", name}:
        shutil.copy(ROOT / f"{file}.py", tmp_path)
    fresh_interpreter(SCRATCH + textwrap.dedent(METHODS[name]), cwd=tmp_path)


# ------------------------------------------------------------------------------------------- links of the documents

def defined_in(path):
    return {node.name for node in ast.walk(parsed(path)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))])
def test_each_function_that_a_document_names_beside_its_file_is_defined_there(page):
    """Written as `name` in [file.py](file.py)."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, link in re.findall(r"`(\w+)(?:\(\))?` in \[[^\]]*\]\(([\w./]+\.py)\)", text):
        assert name in defined_in((ROOT / page).parent / link), f"{name} in {link}"

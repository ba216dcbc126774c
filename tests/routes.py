"""Three routes to a small model: SFT on R1's traces, RL alone, and on-policy distillation, from the same small bases.

    python pipeline.py --seed 0 --ablations      # each seed; makes what is compared
    python tests/routes.py runs/cpu-0 runs/cpu-1 runs/cpu-2

The table goes to results/routes. "As early": on validation problems at temperature 1, when a route by reinforcement
learning had cost as much as SFT on the traces costs.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lab  # noqa: E402, F401
import numpy as np  # noqa: E402
import torch  # noqa: E402

import evaluate  # noqa: E402
import grpo  # noqa: E402
import pipeline  # noqa: E402
from lab import checkpoint  # noqa: E402
from lab.architectures import load  # noqa: E402
from lab.graphs import generate  # noqa: E402
from lab.layers import fast_layers  # noqa: E402
from lab.scripts import rules  # noqa: E402
from lab.sources import MiniWorld  # noqa: E402

ROUTES = {"student": "SFT on traces", "control": "RL alone", "on_policy": "on-policy distillation"}
COLUMNS = {"accuracy": "solved, %", "hard": "harder ones, %", "pass@1": "pass@1", "pass@16": "pass@16",
           "early": "as early, %", "samples": "samples", "flops": "10^12 FLOPs", "seconds": "seconds"}


def on_validation(dir, source):
    """Percent of the validation problems, as the curves of reinforcement learning measure it."""
    model = grpo.cast_copy(fast_layers(load(dir, "cpu")), "bfloat16")
    tokenizer, generator = source.tokenizer, torch.Generator().manual_seed(0)
    prompts = [tokenizer.encode_prompt(example["prompt"]) for example in source.validation]

    def sample(prompts, **settings):
        return generate(model, prompts, end_ids=tokenizer.end_ids, generator=generator, **settings)

    config = evaluate.EvalConfig(samples=4, temperature=1.0, top_p=1.0, max_new_tokens=200)
    texts, _ = evaluate.complete(prompts, sample, tokenizer.decode, config)
    rule = rules()["accuracy_any"]
    return 100 * np.mean([rule(text, example) for example, row in zip(source.validation, texts) for text in row])


def figures(run, route, student):
    """What the table shows of one route."""
    name = f"{route}_{student}"
    results, times = (json.loads((run / file).read_text()) for file in ("results.json", "times.json"))
    stage = results["stages"][name]
    many = checkpoint.read_arrays(run / "extras" / f"{name}_many.npz")
    found = {"accuracy": 100 * stage["evaluation"]["accuracy_any"][0],
             "hard": 50 * sum(stage["evaluation"][f"accuracy_any_hard_{family}"][0] for family in ("story", "search")),
             "pass@1": 100 * many["accuracy_any"].mean(), "pass@16": 100 * many["pass@16"].mean(),
             "flops": stage["flops"] / 1e12, "seconds": times["stages"][name]}
    if route == "student":
        found["samples"] = results["stages"]["traces"]["counts"]["sampled"]
        source = MiniWorld(pipeline.PRESETS["cpu"], results["meta"]["seed"])
        return found | {"early": on_validation(run / name, source)}
    rows = checkpoint.read_jsonl(run / name / "metrics.jsonl")
    budget = results["stages"][f"student_{student}"]["flops"] / stage["flops"]  # as a part of this route's
    early = [row for row in rows if "validation_accuracy_any" in row and row["step"] <= budget * rows[-1]["step"] + 0.5]
    found["samples"] = rows[-1]["samples"]
    return found | ({"early": 100 * early[-1]["validation_accuracy_any"]} if early else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "routes")
    args = parser.parse_args()
    kept = {"runs": [run.name for run in args.runs], "torch": torch.__version__}
    for student in ("qwen", "llama"):
        print(f"\n{student}\n\n| | " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
        for route, title in ROUTES.items():
            found = kept[f"{route}_{student}"] = [figures(run, route, student) for run in args.runs]
            cells = [" / ".join(f"{run[name]:,.1f}" if name == "flops" else f"{run[name]:,.0f}" if name in run else ""
                                for run in found) for name in COLUMNS]
            print(f"| {title} | " + " | ".join(cells) + " |")
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "figures.json").write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()

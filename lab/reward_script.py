"""The script of variants/reward_model.py.

    python -m variants.reward_model --model DIR --data FILE --out DIR

A row is {"prompt", "chosen", "rejected"} or {"prompt", "response", "safe"}. Every tenth is held out, and measured at
the end: how many are right, with an interval, and whether the probabilities mean what they say.
"""

import numpy as np
import torch

from data.forms import numbered_rows
from lab import records
from lab.adapters import open_model
from lab.checkpoint import print_flush
from lab.command import Parser, add_saving, add_template, fields_of, new_directory, saving
from lab.reward_models import encoder, save_reward_model, summary


def read_preferences(path, encode):
    """Rows as variants/reward_model.py's train takes them. Raises ValueError with file and line."""
    rows, kinds = [], set()
    for number, row in numbered_rows(path):
        row = row if isinstance(row, dict) else {}
        if has_texts(row, "prompt", "chosen", "rejected"):
            rows.append(tuple(encode(row, summary(row[name])) for name in ("chosen", "rejected")))
            kinds.add("pairs")
        elif has_texts(row, "prompt", "response") and type(row.get("safe")) is bool:
            rows.append((encode(row, row["response"]), float(row["safe"])))
            kinds.add("responses")
        else:
            raise ValueError(f"{path}:{number}: neither prompt, chosen and rejected as texts, nor prompt and response "
                             "as texts and safe as true or false")
    if len(kinds) != 1 or len(rows) < 10:
        raise ValueError(f"{path}: {len(rows)} rows, {' and '.join(sorted(kinds))}: at least 10 of one kind")
    return rows


def has_texts(row, *names):
    return all(isinstance(row.get(name), str) for name in names)


# ------------------------------------------------------------------------------------------- the script

def run(RewardConfig, RewardModel, train, score):
    parser = Parser(description="Train a reward model on preferences.")
    parser.add_argument("--model", required=True, help="directory of the model that it starts from")
    parser.add_argument("--data", required=True, help='JSONL, JSON or CSV: rows {"prompt", "chosen", "rejected"} or '
                                                      '{"prompt", "response", "safe"}')
    parser.add_argument("--out", required=True, help="where the reward model goes")
    add_template(parser)
    parser.add_fields(RewardConfig)
    add_saving(parser)
    args = parser.parse_args()
    with parser.one_line_errors(args.out):
        config = fields_of(args, RewardConfig)
        transformer, tokenizer = open_model(args.model, torch.float32, template=args.template)
        rows = read_preferences(args.data, encoder(tokenizer))
        out, held_out = new_directory(args.out), rows[9::10]
        rows = [row for i, row in enumerate(rows) if i % 10 != 9]
        model = RewardModel(transformer).to(next(transformer.parameters()).device)
        with saving(out, args) as checkpointer:
            train(model, rows, config, log=Printer(out, next(model.parameters()).device), save=checkpointer.save,
                  resume=checkpointer.resume)
            measured = measure(model.eval(), held_out, score, config.dtype)
            print(f"held out: {len(held_out)} rows, {measured['accuracy']:.1%} right "
                  f"[{measured['low']:.1%}, {measured['high']:.1%}], calibration error {measured['calibration']:.3f}")
            save_reward_model(model, tokenizer, "summary" if isinstance(rows[0][1], list) else "response", out)


class Printer:
    def __init__(self, dir, device):
        self.dir, self.device = dir, device

    def __call__(self, m):
        if m["step"] % 10 == 0 or m["step"] == m["steps"]:
            records.write_metrics(self.dir, m, self.device)
            print_flush(f"step {m['step']}/{m['steps']}  loss {m['loss']:.4f}  right {m['accuracy']:.0%}  "
                        f"grad norm {m['grad_norm']:.2f}")


def measure(model, rows, score, dtype):
    """Accuracy with its 95% interval (Wilson), and the expected calibration error over ten bins."""
    first, second = zip(*rows)
    margin = score(model, list(first), dtype)
    if isinstance(second[0], list):
        margin = margin - score(model, list(second), dtype)
        right = np.ones(len(rows))
    else:
        right = np.array(second)
    p = margin.double().sigmoid().numpy()                      # of what the label says, or of the chosen one
    is_right = (p > 0.5) == (right > 0.5)
    low, high = wilson(is_right.sum(), len(rows))
    confidence, bins = np.maximum(p, 1 - p), np.minimum((np.maximum(p, 1 - p) * 10).astype(int), 9)
    error = sum(abs(confidence[bins == b].mean() - is_right[bins == b].mean()) * (bins == b).mean()
                for b in set(bins.tolist()))
    return {"accuracy": is_right.mean(), "low": low, "high": high, "calibration": error}


def wilson(right, count, z=1.96):
    """The 95% interval of a share."""
    share, shrink = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / shrink
    return middle - half, middle + half

"""A task that a tiny model learns within a few rollouts: to sample token 7."""

import grpo
import model as model_module

END = 3
MANY_ENDS = (END, 6, 9, 11, 14)  # so that lengths differ, whatever a seed draws


def share_of_sevens(text, example):
    return text.split().count("7") / max(1, len(text.split()))


def train_on_sevens(model, config, **arguments):
    """The metrics of each rollout without the times; `arguments` take the place of those that grpo.train gets here."""
    history = []

    def log(metrics, rollout):
        history.append({name: value for name, value in metrics.items() if "seconds" not in name})

    defaults = dict(encode=list, decode=lambda ids: " ".join(map(str, ids)), generate=model_module.generate,
                    end_ids=[END], rewards={"sevens": share_of_sevens}, log=log)
    grpo.train(model, [[1, 2], [4, 5, 6], [8]], config=config, **defaults | arguments)
    return history

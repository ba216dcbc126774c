"""How far apart are sampler and trainer? |log pi_sampler - log pi_trainer| of each token of a rollout, by precision.

    python tests/gap.py DIR               # a model directory; problems of the mini-world
    python tests/gap.py DIR --data FILE   # a problem set

float16 has three bits more than bfloat16, and the gap shrinks by so much [arXiv 2510.26788]. The metric sampler_gap of
a training with old_logprobs "trainer" is the first column.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import grpo  # noqa: E402
from data import world  # noqa: E402
from lab.asking import decoder  # noqa: E402
from lab.graphs import generate  # noqa: E402
from lab.scripts import encoder, open_model, read_problem_set  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")


def gaps(model, tokenizer, examples, dtype, group_size=8, max_new_tokens=160):
    """(n,) of the n sampled tokens: between sampler and trainer; and between the sampler and the trainer in float32."""
    def of_trainer(dtype):
        return grpo.all_logprobs(model, r, grpo.GRPOConfig(dtype=dtype))

    config = grpo.GRPOConfig(group_size=group_size, max_new_tokens=max_new_tokens, dtype=dtype)
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(0)
    r = grpo.rollout(grpo.cast_copy(model, dtype), examples, encode=encoder(tokenizer),
                     decode=decoder(tokenizer, examples), generate=generate, end_ids=tokenizer.end_ids, rewards={
                         "none": lambda text, example: 0.0}, weights={}, config=config, generator=generator)
    return [(r.sampled_logprobs - of_trainer(other)).abs()[r.mask] for other in (dtype, "float32")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dir")
    parser.add_argument("--data")
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()
    model, tokenizer = open_model(args.dir, torch.float32)
    examples = read_problem_set(args.data) if args.data else world.problems(0, "validation", args.prompts)
    print(f"{'':10}{'tokens':>8}{'mean':>12}{'99%':>12}{'largest':>12}{'to float32':>12}")
    for dtype in DTYPES:
        gap, to_float32 = gaps(model.eval(), tokenizer, examples[:args.prompts], dtype)
        figures = gap.mean(), gap.quantile(0.99), gap.max(), to_float32.mean()
        print(f"{dtype:10}{len(gap):8}" + "".join(f"{figure.item():12.2e}" for figure in figures))


if __name__ == "__main__":
    main()

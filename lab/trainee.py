"""A model to be trained, in full or with what a small card needs: LoRA's adapters, or Adam on the CPU.

    memory = Memory(lora=32)
    trainee = Trainee(load_model(dir, device, memory.dtype("bfloat16")), memory, dir)
    train(trainee.model, ..., **trainee.optimizer(adam), save=trainee.save(save), resume=trainee.resume(resume))
    trainee.whole()     # the model to write, in float32: an adapter is added to the weights as the files hold them
"""

import torch

from lab.adapters import add_adapters_of, load_model
from lab.architectures import is_deepseek
from lab.checkpoint import is_alone
from lab.layers import plain_products, recompute
from variants.lora import add_adapters
from variants.offload import send_weights, step_on_cpu


def check_can_shard():
    if is_alone():
        raise ValueError("shard: there is one process; start several with torchrun")


class Trainee:
    def __init__(self, model, memory, dir=None, seed=0):
        """model, on its device, is what is trained; dir: where it was loaded from; seed: of the adapters."""
        self.model, self.memory, self.dir, self.masters = model, memory, dir, None
        if memory.lora and is_deepseek(model):  # the experts are stacked, and decoding folds kv_b_proj into others
            raise ValueError(f"lora {memory.lora}: adapters of a deepseek_v3 are not supported")
        if memory.recompute:
            recompute(model)
        if memory.lora > model.config.hidden_size:
            raise ValueError(f"lora {memory.lora} is above the model's hidden_size {model.config.hidden_size}: "
                             "adapters would be larger than the matrices")
        if memory.lora:
            generator = torch.Generator().manual_seed(seed)
            add_adapters(plain_products(model), memory.lora, memory.lora_alpha, generator=generator)
        if memory.offload_optimizer:
            self.masters = self.load()

    def shard(self, estimator=None):
        """Shares the model out among the processes, if that was asked for; and what a PPO or PRIME has beside it."""
        if not self.memory.shard or hasattr(self.model, "whole"):
            return
        check_can_shard()
        if is_deepseek(self.model):
            raise ValueError("shard: of a deepseek_v3 it is not supported")
        from lab.sharding import shard, shard_estimator  # here: FSDP takes a while to import
        shard(self.model)
        if hasattr(estimator, "optimizer"):
            shard_estimator(estimator)

    def load(self):
        return load_model(self.dir, "cpu", torch.float32)

    def optimizer(self, make_optimizer):
        """{"make_optimizer": ...} as `train` takes it, where its default will not do."""
        if self.masters is None:
            return {}

        def make(parameters, **settings):
            return step_on_cpu(make_optimizer(self.masters.parameters(), **settings), self.model, self.masters)

        return {"make_optimizer": make}

    def save(self, save):
        """A training's save(**parts) that saves the float32 weights, wherever they are."""
        if self.masters is None:
            return save
        return lambda **parts: save(**parts | {"model": self.masters})

    def resume(self, resume):
        if self.masters is None or resume is None:
            return resume

        def resume_masters(**objects):
            rest = resume(**objects | {"model": self.masters})
            send_weights(self.model, self.masters)
            return rest

        return resume_masters

    def whole(self):
        """The model to write; of a sharded one a copy, in the first process alone."""
        if self.memory.lora:
            return add_adapters_of(self.model, self.load())
        if hasattr(self.model, "whole"):
            return self.model.whole()
        return self.masters or self.model

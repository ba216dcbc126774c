"""What saves a GPU's memory, and what a training takes of it."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """What saves a GPU's memory. The same training but for LoRA, which is another."""
    recompute: bool = False          # activations, a second time in the backward pass
    lora: int = 0                    # the rank of adapters that are trained in the weights' place
    lora_alpha: float = 32.0
    offload_optimizer: bool = False  # float32 weights and Adam's moments are the CPU's
    cache_tokens: int = 2 ** 18      # of a rollout that are sampled at once

    def __post_init__(self):
        if self.lora < 0:
            raise ValueError(f"lora {self.lora} must not be negative: it is the rank of adapters, 0 for none")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha {self.lora_alpha} must be positive and finite")
        if self.cache_tokens < 1:
            raise ValueError(f"cache_tokens {self.cache_tokens} must be positive")
        if self.lora and self.offload_optimizer:
            raise ValueError("offload_optimizer beside lora: adapters leave nothing to offload")

    def dtype(self, fast):
        """In which precision a model is loaded to be trained: float32, unless its weights are only computed with."""
        return getattr(torch, fast if self.lora or self.offload_optimizer else "float32")

    def check(self, config):
        """Raises ValueError for an RL's settings that mean nothing here."""
        if self.lora and config.offload_reference:
            raise ValueError("offload_reference beside lora: the reference has no weights of its own")

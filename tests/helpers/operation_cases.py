"""Calls of the operation that every backend is tested with."""

from dataclasses import dataclass

import pytest
import torch

from hf_neural_attention.models.neural_attention_scorer import NeuralScorer
from tests.helpers.numerics import CPU_BACKENDS, randomize


# Chooses by mark what other processes run with another kernel: Triton's cases in its interpreter (`make test-triton`), the
# native ones for older processors (test_native.py)
MARKS = {"native": pytest.mark.instruction_set, "triton": pytest.mark.interpreter}
every_backend = pytest.mark.parametrize("backend", [pytest.param(name, marks=MARKS.get(name, ())) for name in CPU_BACKENDS])


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    queries: int = 7
    keys: int | None = None
    head_dim: int = 8
    value_dim: int | None = None
    proj_dim: int | None = 4
    hidden_dims: tuple[int, int] | None = None
    per_head: bool = False
    mode: str = "replace"
    scale: float | None = None
    is_causal: bool = False
    mask: str | None = None  # "bool" or "float"
    mask_shape: tuple[int, ...] | None = None  # default: the full one
    sinks: bool = False
    softcap: float | None = None

    def draw(self) -> tuple[dict[str, torch.Tensor], NeuralScorer]:
        keys = self.queries if self.keys is None else self.keys
        kv_heads = self.kv_heads or self.heads
        tensors = {
            "query": torch.randn(self.batch, self.heads, self.queries, self.head_dim, dtype=torch.float64),
            "key": torch.randn(self.batch, kv_heads, keys, self.head_dim, dtype=torch.float64),
            "value": torch.randn(self.batch, kv_heads, keys, self.value_dim or self.head_dim, dtype=torch.float64),
        }
        if self.mask is not None:
            shape = (self.batch, self.heads, self.queries, keys) if self.mask_shape is None else self.mask_shape
            attends = torch.rand(shape) < 0.7
            added = torch.randn(shape, dtype=torch.float64).masked_fill(~attends, float("-inf"))
            tensors["attn_mask"] = attends if self.mask == "bool" else added
        if self.sinks:
            tensors["sinks"] = torch.randn(self.heads, dtype=torch.float64)
        scorer = NeuralScorer(
            self.head_dim, self.proj_dim, self.hidden_dims, self.mode, num_heads=self.heads if self.per_head else None
        ).double()
        randomize(scorer)
        return tensors, scorer

    @property
    def options(self) -> dict:
        options = {"is_causal": self.is_causal, "scale": self.scale}
        return options if self.softcap is None else options | {"softcap": self.softcap}


CASES = {
    "one token": Case(queries=1),
    "paper": Case(queries=63, head_dim=64, proj_dim=None, is_causal=True),
    "111 tokens": Case(batch=1, queries=111, head_dim=128, proj_dim=None),
    "head size 60": Case(queries=13, head_dim=60, proj_dim=1),
    "head size 100": Case(queries=13, head_dim=100, proj_dim=3, is_causal=True),
    "proj_dim 32": Case(queries=9, head_dim=32, proj_dim=32),
    "wide first layer": Case(hidden_dims=(16, 1)),
    "wide second layer": Case(hidden_dims=(3, 12), is_causal=True),
    "more keys": Case(queries=5, keys=11),
    "more keys, causal": Case(queries=5, keys=11, is_causal=True),
    "more queries, causal": Case(queries=11, keys=5, is_causal=True),
    "one query": Case(queries=1, keys=17, mask="bool", mask_shape=(17,)),
    "value size": Case(value_dim=5, is_causal=True),
    "grouped queries": Case(heads=6, kv_heads=2, is_causal=True),
    "multi-query": Case(heads=4, kv_heads=1, mask="float", mask_shape=(4, 7, 7)),
    "per head": Case(per_head=True, mask="bool"),
    "per head, grouped": Case(heads=4, kv_heads=2, per_head=True, is_causal=True),
    "per head, residual": Case(per_head=True, mode="residual", mask="float"),
    "residual": Case(queries=20, mode="residual", is_causal=True),
    "residual, scale": Case(mode="residual", scale=0.7, heads=4, kv_heads=2, mask="bool"),
    "residual, scale 0": Case(mode="residual", scale=0.0),
    "bool [Tq, Tk]": Case(mask="bool", mask_shape=(7, 7)),
    "bool [1, Tk]": Case(mask="bool", mask_shape=(1, 7)),
    "bool [B, 1, 1, Tk]": Case(mask="bool", mask_shape=(2, 1, 1, 7), is_causal=True),
    "bool [1, H, 1, Tk]": Case(mask="bool", mask_shape=(1, 2, 1, 7)),
    "bool [B, 1, Tq, Tk]": Case(mask="bool", mask_shape=(2, 1, 7, 7), is_causal=True),
    "float": Case(mask="float", is_causal=True),
    "float [Tq, 1]": Case(mask="float", mask_shape=(7, 1)),
    "float [H, 1, Tk]": Case(mask="float", mask_shape=(2, 1, 7), is_causal=True),
    "float [1, Tq, Tk]": Case(mask="float", mask_shape=(1, 7, 7)),
    "float [B, 1, 1, Tk]": Case(mask="float", mask_shape=(2, 1, 1, 7), queries=3, keys=7),
    "float [B, H, Tq, 1]": Case(mask="float", mask_shape=(2, 2, 7, 1)),
    "float [1, 1, 1, 1]": Case(mask="float", mask_shape=(1, 1, 1, 1)),
    "sinks": Case(queries=40, sinks=True, is_causal=True),
    "sinks, bool": Case(heads=4, kv_heads=2, sinks=True, mask="bool"),
    "sinks, per head, residual": Case(per_head=True, mode="residual", sinks=True, mask="float"),
    "soft cap": Case(queries=20, head_dim=64, mode="residual", softcap=0.8, is_causal=True),
    "soft cap, scale": Case(mode="residual", scale=2.5, softcap=5.0, heads=4, kv_heads=2, mask="bool"),
    "soft cap, per head, sinks": Case(per_head=True, mode="residual", softcap=3.0, sinks=True, mask="float"),
}  # fmt: skip

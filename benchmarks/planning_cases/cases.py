"""The planning cases: which model, how many GPUs, which batch; and the rows of the table with their promises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
T5_INPUTS = ("--input", "input_ids=int64[B,S]<32128", "--input", "labels=int64[B,S/4]<32128")


@dataclass(frozen=True, slots=True)
class Case:
    """One model on a number of H100: `target` is relative to the repository's root."""

    name: str
    title: str
    target: str
    gpus: int
    seq_len: int
    global_batch: int
    arguments: tuple[str, ...] = ()

    def command(self, root: str = "") -> list[str]:
        """The arguments of `tpplan suggest`, with the target under `root`."""
        return [
            *("suggest", root + self.target, "--gpus", str(self.gpus), "--hardware", "h100-sxm"),
            *("--seq-len", str(self.seq_len), "--global-batch", str(self.global_batch)),
            *self.arguments,
        ]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: a case with flags, the gap it is run with, and the promised seconds."""

    case: Case
    group: str
    gap: float
    promised_s: float
    flags: tuple[str, ...] = ()

    def command(self, root: str = "") -> list[str]:
        """The arguments of `tpplan suggest`, with the target under `root`."""
        return [*self.case.command(root), *self.flags, "--gap", f"{self.gap:g}"]

    @property
    def name(self) -> str:
        """A name that no other row has."""
        return f"{self.case.name}.{self.group}"


LLAMA_8B = Case("llama3-8b", "Llama-3 8B, 16 H100", "examples/llama3_8b", 16, 4096, 256)
LLAMA_70B = Case("llama3-70b", "Llama-3 70B, 64 H100", "examples/llama3_70b", 64, 4096, 256)
# Batch and sequence length as in Narayanan et al. 2021 (table 1) and in the Llama 3 report (table 4).
GPT3_175B = Case("gpt3-175b", "GPT-3 175B, 1,024 H100", "benchmarks/planning_cases/gpt3_175b", 1024, 2048, 1536)
LLAMA_405B = Case("llama3-405b", "Llama-3 405B, 16,384 H100", "examples/llama3_405b", 16384, 8192, 2048)
UNET = Case("unet", "Stable Diffusion 1.5 UNet, 32 H100", "benchmarks/zoo/models/unet.py:unet", 32, 64, 2048)
T5 = Case(
    "t5-36-12",
    "T5 XXL with 36 encoder and 12 decoder layers, 32 H100",
    "benchmarks/planning_cases/t5_36_12",
    32,
    2048,
    256,
    T5_INPUTS,
)
CASES = (LLAMA_8B, LLAMA_70B, GPT3_175B, LLAMA_405B, UNET, T5)

PIPELINED = ("--min", "pp=4", "--forbid", "schedule=interleaved")
ONLY_1F1B = ("--fix", "schedule=1f1b")

ROWS = (
    Row(LLAMA_8B, "plain", 1e-4, 12),
    Row(LLAMA_70B, "plain", 5e-3, 15),
    Row(GPT3_175B, "plain", 1e-2, 25),
    Row(LLAMA_405B, "plain", 5e-3, 40),
    Row(UNET, "plain", 1e-4, 15),
    Row(T5, "plain", 1e-4, 15),
    *(Row(case, "pipelined", 1e-4, 30, PIPELINED) for case in (UNET, T5)),
    *(Row(case, "1f1b", 1e-4, 20, ONLY_1F1B) for case in CASES),
    *(Row(case, "pipelined-1f1b", 1e-4, 20, ("--min", "pp=4", *ONLY_1F1B)) for case in (UNET, T5)),
    *(Row(case, "tight", 1e-4, 600) for case in (LLAMA_8B, LLAMA_70B, GPT3_175B, LLAMA_405B)),
)

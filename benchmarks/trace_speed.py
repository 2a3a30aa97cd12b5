"""How long tracing takes, and how much memory: large transformers, and a model that loops over time steps.

    python -m benchmarks.trace_speed            every model, each in a process of its own
    python -m benchmarks.trace_speed mamba      one

Prints a markdown table: seconds of wall and of processor time for the trace (three microbatch sizes, forward and
backward; importing torch and building the model on the meta device apart), the peak memory of the process, units
and classes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "Llama-3 405B": (
        "llama",
        "LlamaForCausalLM",
        4096,
        {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    "GPT-3 175B": (
        "gpt2",
        "GPT2LMHeadModel",
        2048,
        {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048},
    ),
    "DeepSeek-V3 671B": ("deepseek_v3", "DeepseekV3ForCausalLM", 4096, {}),
    "gpt_neo": ("gpt_neo", "GPTNeoForCausalLM", 2048, {}),
    "mamba": ("mamba", "MambaForCausalLM", 2048, {}),
}
HEADER = (
    "| model | tokens | parameters | wall s | processor s | peak MiB | units | classes | operators |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def measure(name: str) -> str:
    """One row of the table, measured in this process."""
    import transformers
    from tpplan.planner.target import load_target
    from tpplan.planner.trace import trace

    transformers.logging.set_verbosity_error()
    model_type, architecture, tokens, options = MODELS[name]
    config = {**transformers.AutoConfig.for_model(model_type, **options).to_dict(), "architectures": [architecture]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config, default=str))
        target = load_target(str(path))
        target.build("meta")
        wall, processor = time.perf_counter(), time.process_time()
        graph = trace(target, sequence_length=tokens)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    launches = sum(op.repeat for u in graph.units for op in graph.classes[u.class_index].ops)
    return (
        f"| {name} | {tokens} | {graph.parameter_count / 1e9:.1f} B | {wall:.1f} | {processor:.1f} | {peak} "
        f"| {len(graph.units)} | {len(graph.classes)} | {launches} |"
    )


def main() -> None:
    """Print the rows of the models named on the command line, or of all."""
    wanted = sys.argv[1:] or list(MODELS)
    if len(wanted) == 1:
        print(measure(wanted[0]))
        return
    print(HEADER, flush=True)
    for name in wanted:
        row = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        print(row.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

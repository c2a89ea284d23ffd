"""One phase of a model: what is launched and moved: `python -m benchmarks.fusion_count llama decode`.

A process of its own: it believes in a GPU (`benchmarks.assumed_gpu`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.assumed_gpu import Generated, generated, install

if TYPE_CHECKING:
    from fxopt.codegen.kernel_file import KernelFile
    from fxopt.ir.target import Target

BATCH, LENGTH, CACHE = 4, 512, 1024
# Sizes of Llama 3.2 1B, BERT base, T5 base and ViT base.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "bert": ("BertForMaskedLM", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 768, "d_ff": 3072, "num_heads": 12, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
    "vit": ("ViTForImageClassification", {}),
}
LAYERS = {"t5": ("num_layers", "num_decoder_layers")}
# Of larger products only a model of the GPU says which kernels are a win: they stay with the library.
OPTIONS = {"inductor": None, "fxopt": {"kernels": "always", "gemm": "never", "strict": True}}
PHASES = ("forward", "training", "decode")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--target", default="h200")
    parser.add_argument("--code", type=Path, help="directory to write the generated code into")
    arguments = parser.parse_args()
    target = install(arguments.target)
    import torch
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {compiler: [] for compiler in OPTIONS}
    with FakeTensorMode(), torch.device("cuda"):
        for compiler, layers in itertools.product(OPTIONS, arguments.layers):
            made, kernels = _compiled(arguments.model, arguments.phase, compiler, layers, target)
            found[compiler].append(count(made, kernels))
            for place, one in enumerate(made if arguments.code else ()):
                (arguments.code / f"{compiler}_{layers}_{place}.py").write_text(one.code)
    print(json.dumps(found))
    return 0


def _compiled(
    name: str, phase: str, compiler: str, layers: int, target: Target
) -> tuple[list[Generated], list[KernelFile]]:
    import torch

    from fxopt.report.record import collect

    torch._dynamo.reset()
    with generated(target) as made, collect() as records:
        run, model = step(name, phase, layers)
        model.compile(backend=compiler, options=OPTIONS[compiler])
        run()
    return made, [kernel for record in records for kernel in record.kernels]


def step(name: str, phase: str, layers: int) -> tuple[Callable[[], Any], Any]:
    """What runs the phase, and the model, with parameters that have no memory."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    kind, config = MODELS[name]
    cls = getattr(transformers, kind)
    names = LAYERS.get(name, ("num_hidden_layers",))
    config = cls.config_class(**config, **dict.fromkeys(names, layers))
    with no_init_weights():  # there is no memory to write to
        model = cls._from_config(config, dtype=torch.bfloat16).train(phase == "training")
    if phase == "decode":
        return _decode(model), model
    inputs = _inputs(name, config, labels=phase == "training")
    if phase == "training":
        return lambda: model(**inputs).loss.backward(), model

    def forward() -> Any:
        with torch.no_grad():
            return model(**inputs)

    return forward, model


def _inputs(name: str, config: Any, labels: bool) -> dict[str, Any]:
    import torch

    ids = torch.randint(0, 100, (BATCH, LENGTH))
    if name == "vit":
        sides = (config.num_channels, config.image_size, config.image_size)
        given = {"pixel_values": torch.randn(BATCH, *sides, dtype=torch.bfloat16)}
        return given | ({"labels": torch.zeros(BATCH, dtype=torch.int64)} if labels else {})
    if name == "bert":
        return {"input_ids": ids} | ({"labels": ids} if labels else {})
    given = {"input_ids": ids, "use_cache": False} | ({"labels": ids} if labels else {})
    return given if name != "t5" or labels else given | {"decoder_input_ids": ids}


def _decode(model: Any) -> Callable[[], Any]:
    """One token over a static cache."""
    import torch
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config, max_cache_len=CACHE)
    width = config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, width, torch.bfloat16, torch.device("cuda"))
    token, place = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), LENGTH)

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True)

    return run


def count(made: list[Generated], kernels: list[KernelFile]) -> dict[str, Any]:
    """Launches by kind, and bytes: of fxopt's kernels as their files say, of others as Inductor says."""
    from fxopt.runtime.kernel_cache import default_cache

    cache = default_cache()
    ours = {
        str(cache.path(kernel.name, kernel.render())): kernel.about.seen[0] / len(kernel.launches)
        for kernel in kernels
    }
    launches: Counter[str] = Counter()
    for one in made:
        launches.update(
            _launches(one.code, {launch.entry for kernel in kernels for launch in kernel.launches})
        )
    moved = sum(ours.get(name, size) for one in made for name, size in one.moved)
    return {"launches": dict(launches), "bytes": moved, "graphs": len(made)}


def _launches(code: str, own: set[str]) -> Counter[str]:
    """The launches in a wrapper: kernels of fxopt and of Inductor, products, and other calls of libraries."""
    found: Counter[str] = Counter()
    body = code[code.index("async_compile.wait") :]
    for name in re.findall(r"^\s+(\w+)\.run\(", body, re.MULTILINE):
        found["fxopt" if re.sub(r"_\d+$", "", name) in own else "inductor"] += 1
    found["products"] = len(re.findall(r"^\s+(?:\w+ = )?extern_kernels\.\w+\(", body, re.MULTILINE))
    found["other"] = len(re.findall(r"^\s+(?:\w+ = )?torch\.ops\.\w+\.\w+[\w.]*\(", body, re.MULTILINE))
    return found


if __name__ == "__main__":
    raise SystemExit(main())

"""A user's own training loop with accelerate: three steps on random tokens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    history = []
    for tokens in torch.randint(97, (3, 4, 16)):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item()})
    accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(args.output_dir)
    (args.output_dir / "trainer_state.json").write_text(json.dumps({"log_history": history}))


if __name__ == "__main__":
    main()

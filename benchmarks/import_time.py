"""What fxopt adds to `import torch`, in milliseconds.

    python benchmarks/import_time.py [--repetitions 40]

Two figures, because a difference of 5 ms hardly shows in a total of seconds:
- `entry point`: the time from loading fxopt's entry point to its return, alone, in a fresh process each time;
- `whole import`: processor time of `import torch` with fxopt and without it (its entry point hidden from
  torch, all else equal), in alternating order; the difference of the medians with its 95 % interval.
For comparison, the time that `import wrapt` takes after `import torch`, where it is installed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys

CHILD = """
import importlib.metadata, json, sys, time
everything = importlib.metadata.entry_points
def others(**params):
    return [entry for entry in everything(**params) if entry.name != "fxopt"]
def only_fxopt(**params):
    return [entry for entry in everything(**params) if entry.name == "fxopt"]
def milliseconds(action, clock):
    start = clock()
    action()
    return 1000 * (clock() - start)
def run_entry_points(found):
    for entry in found:
        entry.load()()
def import_torch():
    import torch
def import_wrapt():
    try:
        import wrapt
    except ImportError:
        pass
hidden = sys.argv[1] == "without"
if hidden:
    importlib.metadata.entry_points = others
result = {"whole": milliseconds(import_torch, time.process_time)}
if hidden:
    found = only_fxopt(group="torch.backends")
    result["entry"] = milliseconds(lambda: run_entry_points(found), time.perf_counter)
    result["wrapt"] = milliseconds(import_wrapt, time.perf_counter)
print(json.dumps(result))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=40)
    repetitions = parser.parse_args().repetitions
    samples: dict[str, list[float]] = {"with": [], "without": [], "entry": [], "wrapt": []}
    for repetition in range(repetitions + 1):
        order = ["with", "without"] if repetition % 2 else ["without", "with"]
        for variant in order:
            result = measure(variant)
            if repetition == 0:  # writes the .pyc files and fills the disk cache
                continue
            samples[variant].append(result["whole"])
            for name in ("entry", "wrapt"):
                if name in result:
                    samples[name].append(result[name])
    report(samples)


def measure(variant: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, variant], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def report(samples: dict[str, list[float]]) -> None:
    low, high = interval(samples["with"], samples["without"])
    difference = statistics.median(samples["with"]) - statistics.median(samples["without"])
    print(f"repetitions             {len(samples['with'])}")
    print(f"entry point             {summary(samples['entry'])}")
    print(f"whole import, without   {summary(samples['without'])}")
    print(f"whole import, with      {summary(samples['with'])}")
    print(f"difference of medians   {difference:.2f} ms (95 % interval {low:.2f} to {high:.2f})")
    print(f"import wrapt, beside    {summary(samples['wrapt'])}")


def summary(values: list[float]) -> str:
    ordered = sorted(values)
    return (
        f"median {statistics.median(ordered):.2f} ms, smallest {ordered[0]:.2f}, "
        f"95th percentile {ordered[int(0.95 * (len(ordered) - 1))]:.2f}"
    )


def interval(first: list[float], second: list[float], draws: int = 2000) -> tuple[float, float]:
    """Bootstrap interval of the difference of two medians."""
    rng = random.Random(0)
    differences = sorted(
        statistics.median(rng.choices(first, k=len(first)))
        - statistics.median(rng.choices(second, k=len(second)))
        for _ in range(draws)
    )
    return differences[int(0.025 * draws)], differences[int(0.975 * draws) - 1]


if __name__ == "__main__":
    main()

"""How training scales on this machine: `train` on one process, then with each way on several, every process with as
many blocks as the one had; tokens a second, and efficiency = those of N processes / (N times those of one).

    python examples/accelerate/scaling.py scaling --processes 2 --ways ddp fsdp2 -- --model MODEL --train_data TEXT
        --batch_size 64 --loss_chunk 16384 --steps 36"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WAYS = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
# Steps at the beginning that are not counted: kernels are compiled and measured, and buffers take their sizes in them.
WARM = 12


def command_of(output: Path, way: str | None, processes: int, precision: str, options: list[str]) -> list[str]:
    """The words that train in `output`; way is None for one process."""
    launch = ["-m", "hf_sparse_attention.train"]
    if way is not None:
        file = str(HERE / f"{way}.yaml")
        given = ["--config_file", file, "--num_processes", str(processes), "--mixed_precision", precision]
        launch = ["-m", "accelerate.commands.launch", *given, *launch]
    return [
        sys.executable, *launch, "--output", str(output), "--stage", "pretrain", "--alpha_schedule", "none",
        "--statistics_blocks", "0", "--log_every", "1", "--checkpoint_every", "0", *options,
        "--mixed_precision", precision, "--overwrite",
    ]  # fmt: skip


def rates_of(run: Path) -> tuple[float, float | None]:
    """Medians over the steps after the first: tokens a second of all processes, share of the cards' peak if known.

    Raises:
        ValueError: if there are too few steps to tell.
    """
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    timings = [line["timing"] for line in lines if line["kind"] == "train" and line["step"] > WARM]
    if len(timings) < 3:
        raise ValueError(f"{run} has {len(timings)} steps after the first {WARM}; give more: --steps {WARM + 24}")
    shares = [timing["flop_utilisation"] for timing in timings if "flop_utilisation" in timing]
    return statistics.median(timing["tokens_per_second"] for timing in timings), (
        statistics.median(shares) if shares else None
    )


def summary_of(run: Path, processes: int, alone: dict | None) -> dict:
    """What a run says of itself.

    Raises:
        ValueError: if it was trained on another number of processes, otherwise than the run on one, or skipped steps.
    """
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    count, device = summary["hardware"].split(" x ", 1)
    if int(count) != processes:
        raise ValueError(f"{run} was trained on {count} processes, not {processes}: give --processes {count}")
    if summary["skipped_steps"]:
        raise ValueError(f"{run} skipped {summary['skipped_steps']} steps, which trained nothing but count as tokens")
    one = {"device": device, "mixed_precision": summary["mixed_precision"], **summary["options"]}
    if alone is not None:
        other = {"device": alone["device"], "mixed_precision": alone["mixed_precision"], **alone["options"]}
        if different := sorted(name for name in {*one, *other} if one.get(name) != other.get(name)):
            raise ValueError(
                f"{run} was trained otherwise than the run on one process ({', '.join(different)}): train both anew"
            )
    return {**summary, "device": device}


def table_of(folder: Path, runs: dict[str, int]) -> str:
    """A line for each run of `folder`; `runs` is the processes of each, `one` first."""
    alone, _ = rates_of(folder / "one")
    summary_of_one = summary_of(folder / "one", 1, None)
    lines = ["| way | processes | on | tokens/s | of the peak | efficiency |", "|---|---:|---|---:|---:|---:|"]
    for name, processes in runs.items():
        rate, share = rates_of(folder / name)
        hardware = summary_of(folder / name, processes, summary_of_one)["hardware"]
        shown = "-" if share is None else f"{share:.1%}"
        lines.append(f"| {name} | {processes} | {hardware} | {rate:,.0f} | {shown} | {rate / processes / alone:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument("--processes", type=int, default=2, help="processes of the runs with several")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["ddp", "fsdp2"], help="files of this folder")
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "bf16"), help="of every run")
    parser.add_argument("--kept", action="store_true", help="train nothing: the table of runs that are there")
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    runs = {"one": 1, **dict.fromkeys(arguments.ways, arguments.processes)}
    for name, processes in {} if arguments.kept else runs.items():
        way = None if name == "one" else name
        command = command_of(arguments.output / name, way, processes, arguments.mixed_precision, options)
        code = subprocess.run(command, check=False).returncode
        if code:
            sys.exit(f"{name} ended with {code}: {' '.join(command)}")
    print(table_of(arguments.output, runs))


if __name__ == "__main__":
    main()

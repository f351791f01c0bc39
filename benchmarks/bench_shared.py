"""Four engines on one draft server: the same outputs, fair shares, and what each keeps of the speed that it has alone.

The forwards of all models are stretched by sleeping (`emulation`), so that two cores do not decide it; all other work is as it is.
Every engine has prompts of its own. Each repetition runs every engine alone, the others idle, and then all at once; a plain engine
gives the outputs to compare with, and the speed without speculation. Owns what is run and its table. Runs offline:

    python benchmarks/bench_shared.py --out result.json
"""

import argparse
import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.result_file import begin, finish, require_counts, say
from vllm_specbranch.emulation import Pace, PaceFile, RecordFile, within
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.lineup import Lineup, Placement, place
from vllm_specbranch.measure import Engine, running
from vllm_specbranch.measure_messages import Emulation, EngineSpec, Forward, RunResult
from vllm_specbranch.prompts import default_prompts_path, read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.report import table
from vllm_specbranch.shipped_pair import draft_path, target_path

SCHEMA_VERSION = 1
# How far an engine's share may be from an equal one.
FAIR_WITHIN = 0.2
READY_TIMEOUT_S = 300.0
MAX_MODEL_LEN = 1024


@dataclasses.dataclass
class Row:
    """One engine: its runs alone, and beside the others."""

    name: str
    prompts: list[list[int]]
    expected: list[list[int]] = dataclasses.field(default_factory=list)
    alone: list[RunResult] = dataclasses.field(default_factory=list)
    together: list[RunResult] = dataclasses.field(default_factory=list)

    @property
    def is_identical(self) -> bool:
        """Whether all outputs are plain vLLM's."""
        runs = [*self.alone, *self.together]
        return all([one.token_ids for one in run.requests] == self.expected for run in runs)

    def figures(self) -> dict[str, Any]:
        """Medians of both ways, with all values beside them."""
        return {
            "name": self.name,
            "is_identical": self.is_identical,
            "alone": _figures(self.alone),
            "together": _figures(self.together),
            "speed_kept": _speed(self.together) / _speed(self.alone),
        }


def _tokens_per_s(runs: Sequence[RunResult]) -> list[float]:
    return [run.num_tokens / run.wall_s for run in runs]


def _speed(runs: Sequence[RunResult]) -> float:
    return statistics.median(_tokens_per_s(runs))


def _figures(runs: Sequence[RunResult]) -> dict[str, Any]:
    def total(name: str) -> float:
        return sum(run.server_counters.get(name, 0.0) for run in runs)

    accepted = sum(run.num_accepted_tokens for run in runs)
    return {
        "tokens_per_s": _speed(runs),
        "all_tokens_per_s": _tokens_per_s(runs),
        "mean_acceptance_length": 1 + accepted / max(1, sum(run.num_drafts for run in runs)),
        "hit_rate": total("num_hits") / max(1.0, total("num_rounds")),
        "num_rows": total("num_rows"),
        "num_reply_timeouts": sum(run.engine_counters.get("num_reply_timeouts", 0.0) for run in runs),
        "num_overruns": sum(run.num_overruns for run in runs),
    }


class DraftServer:
    """The shared draft server of a benchmark, in its own process.

    Args:
        folder: for the files that set its pace and note its steps.
        placement: whose draft cores it takes.
        gamma: most draft tokens of a chunk.
    """

    def __init__(self, folder: Path, placement: Placement, gamma: int) -> None:
        self._pace, self._records = PaceFile(folder / "pace"), RecordFile(folder / "records")
        self._log = folder / "server.log"
        cores = ",".join(map(str, placement.draft_cores))
        words = [folder / "pace", folder / "records", draft_path(), cores, MAX_MODEL_LEN, gamma]
        script = Path(__file__).with_name("shared_server.py")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script), *map(str, words)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def wait_until_ready(self) -> str:
        """Its address.

        Raises:
            SpecBranchError: it ended, or takes too long.
        """
        until_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            text = self._log.read_text(errors="replace")
            ready = [line for line in text.splitlines() if line.startswith("draft server ready at ")]
            if ready:
                return ready[0].split()[4].rstrip(":")
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise SpecBranchError(f"the draft server did not start: {text[-2000:]}")
            time.sleep(0.2)

    @contextlib.contextmanager
    def stretched(self, pace: Pace, into: list[list[Forward]]) -> Iterator[None]:
        """Let its steps last so long; those that it took meanwhile are added to `into`."""
        self._records.take()
        self._pace.write(pace)
        started_s = time.perf_counter()
        yield
        ended_s = time.perf_counter()
        self._pace.write(Pace())
        into.append(within(self._records.take(), started_s, ended_s))

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self._records.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 for words that cannot be used, 1 for a result that is not what it should be."""
    args = _parser().parse_args(argv)
    try:
        return 0 if bench(args) else 1
    except SpecBranchError as error:
        sys.stderr.write(f"bench_shared: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def bench(args: argparse.Namespace) -> bool:
    """Run all engines, write table and JSON; returns whether outputs are identical and shares fair."""
    begin(args.out)
    options = ("num_engines", "max_tokens", "batch_size", "gamma", "repetitions")
    require_counts({"--" + name.replace("_", "-"): getattr(args, name) for name in options})
    if gpus():
        raise ConfigError("a GPU", "a CPU build of vLLM: forwards are stretched by sleeping", "device")
    origin = provenance(Path(__file__).parent)
    placement = place(available_cores(), 0, None, None)
    with tempfile.TemporaryDirectory() as folder:
        server = DraftServer(Path(folder), placement, args.gamma)
        try:
            plain, rows, steps = measure(args, placement, server)
        finally:
            server.close()
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "options": vars(args),
        "runs_on": placement.describe(with_draft=True),
        "plain": {"tokens_per_s": _speed(plain), "all_tokens_per_s": _tokens_per_s(plain)},
        "draft_server_busy": {name: _busy(taken) for name, taken in steps.items()},
        **summary(rows),
    }
    say("\n" + as_table(result) + "\n")
    finish(result, args.out)
    return bool(result["is_identical"] and result["is_fair"])


def specs(args: argparse.Namespace, placement: Placement, address: str) -> list[EngineSpec]:
    """The plain engine, and those that share the server."""
    lineup = Lineup(
        target=str(target_path()),
        draft=str(draft_path()),
        placement=placement,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=args.batch_size,
        kv_cache_bytes=64 << 20,
        enforce_eager=True,
        observe=True,
    )
    # `Lineup.specbranch` names the draft's cores, which is for an engine that starts its server itself.
    shared = {
        "method": "specbranch",
        "model": str(draft_path()),
        "num_speculative_tokens": args.gamma,
        "draft_placement": address,
        "draft_keys": "insecure",
    }
    engine = msgspec.structs.replace(lineup.plain(), speculative=shared)
    names = [f"engine {index}" for index in range(args.num_engines)]
    return [lineup.plain(async_scheduling=False), *(msgspec.structs.replace(engine, name=name) for name in names)]


def measure(
    args: argparse.Namespace, placement: Placement, server: DraftServer
) -> tuple[list[RunResult], list[Row], dict[str, list[list[Forward]]]]:
    """(runs of plain vLLM, a row per engine, draft steps of the runs alone and together)."""
    emulation = Emulation(args.target_ms, 0.0, args.target_token_cost)
    pace = Pace(args.draft_ms, args.draft_token_cost)
    plain_runs: list[RunResult] = []
    steps: dict[str, list[list[Forward]]] = {"alone": [], "together": []}
    with running(specs(args, placement, server.wait_until_ready()), at_once=2) as engines:
        plain, *shared = engines
        texts = [prompt.text for prompt in read_prompts(default_prompts_path(), args.num_engines * args.batch_size)]
        known = plain.encode(texts)
        rows = [Row(one.spec.name, known[index :: args.num_engines]) for index, one in enumerate(shared)]

        def run(engine: Engine, row: Row) -> RunResult:
            return engine.run(row.prompts, args.max_tokens, args.batch_size, emulation=emulation)

        for row in rows:
            plain_runs.append(run(plain, row))
            row.expected = [one.token_ids for one in plain_runs[-1].requests]
        with ThreadPoolExecutor(len(shared)) as pool:
            for repetition in range(args.repetitions + 1):
                # The first round is the warm-up.
                taken = steps if repetition else {"alone": [], "together": []}
                for engine, row in zip(shared, rows, strict=True):
                    with server.stretched(pace, taken["alone"]):
                        alone = run(engine, row)
                    row.alone += [alone] if repetition else []
                with server.stretched(pace, taken["together"]):
                    together = list(pool.map(run, shared, rows))
                for row, one in zip(rows, together, strict=True):
                    row.together += [one] if repetition else []
                say(f"Repetition {repetition} of {args.repetitions} done.\n" if repetition else "Warm.\n")
    return plain_runs, rows, steps


def _busy(runs: Sequence[Sequence[Forward]]) -> float:
    """Share of the time from first to last draft step in which the draft model computed."""
    spans = [steps[-1].end_s - steps[0].start_s for steps in runs if steps]
    return sum(one.end_s - one.start_s for steps in runs for one in steps) / max(1e-9, sum(spans))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures per engine, and how far the greatest and the least share of speed and rows are from an equal one."""
    figures = [row.figures() for row in rows]
    deviations = {}
    for name in ("tokens_per_s", "num_rows"):
        values = [one["together"][name] for one in figures]
        # Engines differ in their prompts, and so in what they reach alone: what is to be equal is what is kept of it.
        kept = [value / max(1e-9, one["alone"][name]) for value, one in zip(values, figures, strict=True)]
        mean = statistics.mean(kept)
        deviations[name] = max(abs(one / mean - 1) for one in kept)
    return {
        "engines": figures,
        "largest_deviation": deviations,
        "is_identical": all(one["is_identical"] for one in figures),
        "is_fair": max(deviations.values()) <= FAIR_WITHIN,
    }


def as_table(result: dict[str, Any]) -> str:
    """A line per engine, and what is to be seen in them."""
    headers = [
        "engine",
        "alone, tokens/s",
        "together, tokens/s",
        "kept",
        "rows alone",
        "rows together",
        "hits",
        "identical",
    ]
    lines = [
        [
            one["name"],
            f"{one['alone']['tokens_per_s']:.0f}",
            f"{one['together']['tokens_per_s']:.0f}",
            f"{one['speed_kept']:.0%}",
            f"{one['alone']['num_rows']:.0f}",
            f"{one['together']['num_rows']:.0f}",
            f"{one['together']['hit_rate']:.0%}",
            "yes" if one["is_identical"] else "NO",
        ]
        for one in result["engines"]
    ]
    busy, off = result["draft_server_busy"], result["largest_deviation"]
    return (
        table(headers, lines)
        + f"\n\nPlain: {result['plain']['tokens_per_s']:.0f} tokens/s per engine. "
        + f"Draft model busy: {busy['alone']:.0%} with one engine, {busy['together']:.0%} with all.\n"
        + f"Furthest from an equal share: {off['tokens_per_s']:.0%} of speed, {off['num_rows']:.0%} of rows."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Several engines on one draft server, against one engine alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--num-engines", type=int, default=4, help="on one draft server")
    add("--batch-size", type=int, default=2, help="requests of each engine, all at the same time")
    add("--max-tokens", type=int, default=64, help="new tokens per request")
    add("--gamma", type=int, default=8, help="most draft tokens in a chunk")
    add("--target-ms", type=float, default=100.0, help="a forward of the target")
    add("--target-token-cost", type=float, default=0.0, help="of each further token, relative to one")
    add("--draft-ms", type=float, default=10.0, help="a draft step of one row")
    add("--draft-token-cost", type=float, default=0.02, help="of each further row, relative to one")
    add("--repetitions", type=int, default=3, help="after the warm-up")
    return parser


if __name__ == "__main__":
    sys.exit(main())
